"""Train a student on the crops and labels of a store (stage two)."""
