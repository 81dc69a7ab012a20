"""Models: their names, weights, inputs and outputs."""
