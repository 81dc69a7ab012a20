"""What both stages need of the machine: threads, devices, processes, precision,
progress, profiles."""
