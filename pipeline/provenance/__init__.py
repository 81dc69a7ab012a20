"""What a store was made from, and whether a command or a machine is still the same."""
