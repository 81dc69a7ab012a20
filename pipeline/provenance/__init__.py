"""Record what a store was made from, and refuse a command or a machine that differs."""
