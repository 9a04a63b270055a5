"""What a device is still at when the program ends: it is waited for.

Steps are ordered ahead of their reader, who may leave before they have run. XLA's threads on a CPU
that still run them then find no Python any more, and have the process abort.
"""

from __future__ import annotations

import atexit
import contextlib
import threading

import jax

__all__ = ["noted"]

_lock = threading.Lock()
_unfinished: list[jax.Array] = []


def noted(array: jax.Array) -> jax.Array:
    """The array, for which the program's end waits."""
    with _lock:
        _unfinished[:] = [one for one in _unfinished if not _is_done(one)] + [array]
    return array


def _is_done(array: jax.Array) -> bool:
    return array.is_deleted() or array.is_ready()


# Behind JAX's import, whose own function for the end, which frees the devices, so comes later.
@atexit.register
def _wait() -> None:
    for array in _unfinished:
        with contextlib.suppress(Exception):  # whoever wanted it is told
            array.block_until_ready()
