"""The rate of dense bfloat16 products on the device, which bounds every long prefill."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from ffjax.benchmark.timing import Samples

__all__ = ["DenseRate", "default_size", "dense_rate"]

# Rows and columns. On a GPU large enough to fill it; elsewhere a product of some milliseconds.
_GPU_SIZE = 8192
_OTHER_SIZE = 1024
# Products in a row, so that starting the first and waiting for the last weigh little.
_PASSES = 8


@dataclasses.dataclass(frozen=True)
class DenseRate:
    """How fast the device multiplies matrices.

    Attributes:
        size: rows and columns of the matrices.
        product: seconds of a product.
    """

    size: int
    product: Samples

    @property
    def flops_per_second(self) -> float:
        """The median; a multiplication and an addition are two."""
        return 2 * self.size**3 / self.product.median


def default_size(device: Any) -> int:
    """Size of the matrices that are multiplied to measure a device."""
    return _GPU_SIZE if device.platform == "gpu" else _OTHER_SIZE


def dense_rate(size: int, repetitions: int = 7) -> DenseRate:
    """Measures products of bfloat16 matrices on the default device, by XLA as it likes it best.

    The numbers are random: a GPU multiplies zeros faster, with less power.

    Args:
        size: rows and columns.
        repetitions: measurements.
    """
    left, right = (
        jax.random.normal(key, (size, size), jnp.bfloat16) / math.sqrt(size)
        for key in jax.random.split(jax.random.key(0))
    )
    multiply = jax.jit(jnp.matmul)
    seconds = []
    for repetition in range(repetitions + 1):
        start = time.perf_counter()
        jax.block_until_ready([multiply(left, right) for _ in range(_PASSES)])
        if repetition:  # the first one compiled
            seconds.append((time.perf_counter() - start) / _PASSES)
    return DenseRate(size, Samples(tuple(seconds)))
