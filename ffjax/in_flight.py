"""What the device still computes when Python ends: it is waited for.

A computation that ends while Python takes itself apart gives back what it held of Python, from a
thread of its own. Python 3.12 ends that thread there, and the process aborts ("terminate called
without an active exception"): after a Ctrl-C, say, which leaves a block of steps on its way.
"""

from __future__ import annotations

import atexit
import contextlib
from typing import Any

import jax

__all__ = ["note"]

_latest: list[Any] = []


def note(array: Any) -> None:
    """Notes what the device was ordered to make last, a small array."""
    _latest[:] = [array]


def _wait() -> None:
    # A second Ctrl-C, or a device that has failed, is no reason to stay.
    with contextlib.suppress(BaseException):
        jax.block_until_ready(_latest)


# JAX's own farewells are said after ours: they were registered before.
atexit.register(_wait)
