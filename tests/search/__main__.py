"""`python -m tests.search`, from the repository's root: looks for wrong steps, or plans."""

from __future__ import annotations

import pathlib
import sys

# The tests know each other by plain names.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from .command import main

if __name__ == "__main__":
    sys.exit(main())
