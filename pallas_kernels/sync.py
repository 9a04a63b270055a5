"""How long the programs of a launch wait for each other at most."""

__all__ = ["MAX_POLLS"]

# A poll takes about a microsecond, so a wait ends after some seconds.
MAX_POLLS = 1 << 22
