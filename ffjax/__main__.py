"""`python -m ffjax`: the command line."""

import sys

from ffjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
