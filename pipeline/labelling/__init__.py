"""Label every crop once with the teachers, and keep the soft labels in a store (stage
one)."""
