"""Arrays put onto the default device block by block, without a whole one on the host."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from checkpoints.blocks import Block

__all__ = ["Placing", "is_host"]


def is_host() -> bool:
    """Whether the default device's memory is the host's: it uses an array of numpy as it is."""
    (device,) = jax.device_put(np.zeros(())).devices()  # which compiles nothing
    return device.platform == "cpu"


class Placing:
    """Arrays on the device, of which block after block arrives.

    Beside them, two blocks at most are on the host and on the device: one is read while the one
    before is on its way.

    Attributes:
        arrays: those that blocks have come of, by their dotted names.
    """

    def __init__(self, shapes: Mapping[str, Any]):
        """Begins with none.

        Args:
            shapes: of all arrays, by their dotted names, each with a `shape`.
        """
        self.arrays: dict[str, Array] = {}
        self._shapes = shapes
        self._last: str | None = None

    def put(self, block: Block) -> None:
        """Sends a block on its way. Its numbers may not be written to any more."""
        name, start, numbers = block
        shape = self._shapes[name].shape
        if self._last is not None:
            # The block before has arrived, and its memory is free.
            self.arrays[self._last].block_until_ready()
        self._last = name
        if len(numbers) == shape[0]:
            self.arrays[name] = jax.device_put(numbers)
            return
        array = self.arrays.pop(name) if start else jnp.zeros(shape, numbers.dtype)
        self.arrays[name] = _put(array, jax.device_put(numbers), start)


@functools.partial(jax.jit, donate_argnums=0)
def _put(array: Array, block: Array, start: int) -> Array:
    """The array, in the same memory, with other rows from `start` on."""
    return lax.dynamic_update_slice_in_dim(array, block, start, 0)
