"""The command `python -m pallas_kernels.spec`, which knows the models of `ffjax` by their names.

No module imports this one: what is below `ffjax` stays below it (`tests/test_imports.py`).
"""

import sys

from ffjax.commands.spec import main

if __name__ == "__main__":
    sys.exit(main())
