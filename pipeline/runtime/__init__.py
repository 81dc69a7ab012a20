"""Threads, devices, processes, precision, progress and profiles, for both stages."""
