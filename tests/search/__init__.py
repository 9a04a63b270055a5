"""A search for wrong steps: see `python -m tests.search --help`."""
