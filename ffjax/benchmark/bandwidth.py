"""The read bandwidth of the device, which bounds every decode step."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ffjax.benchmark.timing import Samples

__all__ = ["Bandwidth", "default_bytes", "read_bandwidth"]

# Far beyond any cache. On an H200, 8 GB read at 4.41 to 4.43 TB/s.
_GPU_BYTES = 8_000_000_000
# Where the device does not say how much memory it has: beyond a CPU's last cache.
_OTHER_BYTES = 512_000_000
# Integers of a row: few enough for XLA to reduce a row in one go.
_ROW = 8192
# Reads of the array in a row, so that starting the first and waiting for the last weigh little.
_PASSES = 4


@dataclasses.dataclass(frozen=True)
class Bandwidth:
    """How fast the device reads memory.

    Attributes:
        array_bytes: size of the array that was read.
        pass_seconds: seconds one read of it took, a number a repetition.
    """

    array_bytes: int
    pass_seconds: tuple[float, ...]

    @property
    def bytes_per_second(self) -> float:
        """The median."""
        return self.array_bytes / Samples(self.pass_seconds).median

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return Samples(self.pass_seconds).spread


def default_bytes(device: Any) -> int:
    """Size of the array to read: 8 GB, or a quarter of the device's memory where that is less."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return _OTHER_BYTES if not limit else min(_GPU_BYTES, limit // 4)


def read_bandwidth(array_bytes: int, repetitions: int = 7) -> Bandwidth:
    """Measures the read bandwidth of the default device by the maxima of a large array.

    Args:
        array_bytes: size of the array, rounded down to whole rows of 32 KiB, one at least.
        repetitions: measurements.
    """
    rows = max(array_bytes // (4 * _ROW), 1)
    # Not zeros: a page of zeros need not be in memory at all.
    values = jax.jit(lambda: lax.broadcasted_iota(jnp.int32, (rows, _ROW), 1))()
    # A result a row: XLA would reduce to a single number in two steps, and on one core of a CPU.
    read = jax.jit(lambda values: jnp.max(values, axis=1))
    seconds = []
    for repetition in range(repetitions + 1):
        start = time.perf_counter()
        jax.block_until_ready([read(values) for _ in range(_PASSES)])
        if repetition:  # the first one compiled
            seconds.append((time.perf_counter() - start) / _PASSES)
    size = values.nbytes
    values.delete()  # the weights that follow may need the room
    return Bandwidth(size, tuple(seconds))
