"""`python -m tests.soak`, from the checkout."""

import pathlib
import sys

# Tests import each other by their files' names.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from soak.command import main

if __name__ == "__main__":
    sys.exit(main())
