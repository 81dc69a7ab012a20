"""Everything between an image folder and a trained student."""
