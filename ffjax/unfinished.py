"""What a device is still at when the program ends: it is waited for.

Steps are ordered ahead of their reader, who may leave before they have run. XLA's threads on a CPU
that still run them then find no Python any more, and have the process abort.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
from typing import Any

import jax  # noqa: F401

__all__ = ["noted"]

_lock = threading.Lock()
_unfinished: list[Any] = []


def noted(array: Any) -> None:
    """Has the program's end wait for an array."""
    with _lock:
        _unfinished[:] = [one for one in _unfinished if not _is_done(one)] + [array]


def _is_done(array: Any) -> bool:
    return array.is_deleted() or array.is_ready()


# Behind JAX's import, whose own function for the end, which frees the devices, so comes later.
@atexit.register
def _wait() -> None:
    for array in _unfinished:
        with contextlib.suppress(Exception):  # whoever wanted it is told
            array.block_until_ready()
