"""Labels and students from and for other programs."""
