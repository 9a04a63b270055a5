"""Arrays on the host that a device takes as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["empty"]

# Where an array begins that JAX's CPU device uses in place: at a multiple of this many bytes. Of
# any other it makes a copy, which for a model of some gigabytes takes as long as reading it.
_ALIGNMENT = 64


def empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array without numbers: to be filled, then passed to `jax.device_put`, then forgotten.

    On a CPU the device's array is this memory. Nothing may be written to it any more.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
