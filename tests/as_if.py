"""A GPU that is taken for another: its multiprocessors, with the other's copies and shared memory.

`python -m tests.as_if a100 MODULE ARGUMENTS` runs a module so, `pytest --as-if a100` the tests. So
one sees on a newer GPU what the kernel does on devices of compute capability 8. What is compiled is
compiled for the device that there is.
"""

from __future__ import annotations

import dataclasses
import os
import runpy
import sys
from typing import Any

__all__ = ["VARIABLE", "take_device_for"]

# Processes that are started learn of it by the environment.
VARIABLE = "FFJAX_TESTS_AS_IF"


def take_device_for(name: str | None = None) -> None:
    """From here on the device counts as one like `name`, a target of `pallas_kernels.targets`.

    Args:
        name: None: what the environment says, if it does.
    """
    if (name := name or os.environ.get(VARIABLE)) is None:
        return
    from pallas_kernels.gpu import Gpu
    from pallas_kernels.targets import target

    like, found_by = target(name).gpu, Gpu.of

    def of(device: Any) -> Gpu | None:
        found = found_by(device)
        if found is None:
            return None
        # No row of the table of tunings is meant.
        return dataclasses.replace(like, name=f"{found.name} as if {name}", cores=found.cores)

    os.environ[VARIABLE] = name
    Gpu.of = staticmethod(of)  # type: ignore[method-assign]


if __name__ == "__main__":
    take_device_for(sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
