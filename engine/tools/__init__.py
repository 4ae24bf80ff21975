"""Command-line tools for data, and the built-in dataset."""
