"""Read and write a run's folder: its checkpoints, metrics and curves; and compare
runs."""
