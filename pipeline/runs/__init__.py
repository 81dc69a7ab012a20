"""A run's folder: its checkpoints, metrics, curves, and comparing several."""
