"""Use the operating system for a store: writes that last, claims of one process,
signals that ask to stop."""
