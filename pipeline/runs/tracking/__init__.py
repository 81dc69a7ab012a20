"""Tell the figures of a run to experiment trackers: Weights & Biases, MLflow."""
