"""What a store needs of the operating system: writes that last, claims of one process,
signals that ask to stop."""
