"""Render crops: decode images, cut and resize crops, and paste them for CutMix."""
