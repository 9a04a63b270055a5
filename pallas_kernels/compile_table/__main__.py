"""The command `python -m pallas_kernels.compile_table`; no module imports this one."""

import sys

from ffjax.commands.compile_table import main

if __name__ == "__main__":
    sys.exit(main())
