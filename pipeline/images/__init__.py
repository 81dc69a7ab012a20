"""Images: where they lie, what is in them, and reading them."""
