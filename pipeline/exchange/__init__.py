"""Exchange labels and students with other programs."""
