"""Several small arrays sent to the device as one.

A copy to the device costs the host the same for 4 bytes as for some thousand, and a program waits
for each. A call of a compiled program sends an array of numpy by itself, in some microseconds;
`jax.device_put` ahead of it takes ten times that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, lax

__all__ = ["Layout", "as_words"]

_BYTES = 4


class Layout(NamedTuple):
    """What is where in a parcel; static.

    Attributes:
        tree: of the pytree.
        arrays: shape and dtype of each of its arrays.
    """

    tree: Any
    arrays: tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]

    def opened(self, words: Array) -> Any:
        """The pytree again, of int32 `[words]` that may be traced."""
        parts, start = [], 0
        for shape, dtype in self.arrays:
            stop = start + int(np.prod(shape, dtype=int))
            part = lax.slice(words, (start,), (stop,)).reshape(shape)
            parts.append(lax.bitcast_convert_type(part, dtype))
            start = stop
        return jax.tree.unflatten(self.tree, parts)


def as_words(tree: Any) -> tuple[np.ndarray, Layout]:
    """One array, int32 `[words]`, for all of a pytree.

    Args:
        tree: arrays of numpy, of dtypes of 4 bytes.
    """
    arrays, structure = jax.tree.flatten(tree)
    for array in arrays:
        assert array.dtype.itemsize == _BYTES, array.dtype
    words = [np.ascontiguousarray(array).reshape(-1).view(np.int32) for array in arrays]
    layout = Layout(structure, tuple((array.shape, array.dtype) for array in arrays))
    return np.concatenate(words), layout
