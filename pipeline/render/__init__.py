"""Pixels: the one renderer, which decodes images and cuts crops."""
