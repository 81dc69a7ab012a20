"""Image files: class folders, scans and reading."""
