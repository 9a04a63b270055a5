"""What the device still computes when Python ends: it is waited for.

A computation that ends while Python takes itself apart gives back what it held of Python, from a
thread of its own. Python 3.12 ends that thread there, and the process aborts ("terminate called
without an active exception"): after a Ctrl-C, say, which leaves a block of steps on its way.
"""

from __future__ import annotations

import atexit
import contextlib
import time
from typing import Any

import jax

__all__ = ["note"]

_latest: list[Any] = []
_LAST_SECONDS = 0.1


def note(array: Any) -> None:
    """Notes what the device was ordered to make last, a small array."""
    _latest[:] = [array]


def _wait() -> None:
    # A second Ctrl-C, or a device that has failed, is no reason to stay.
    with contextlib.suppress(BaseException):
        if not all(array.is_ready() for array in _latest):
            jax.block_until_ready(_latest)
            # What was computed is there before the last of what it held is given back.
            time.sleep(_LAST_SECONDS)


# JAX's own farewells are said after ours: they were registered before.
atexit.register(_wait)
