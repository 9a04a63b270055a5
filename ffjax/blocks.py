"""How many decode steps the device is given at a time.

The device runs a block of steps without asking the host, and the host reads its tokens when all of
it has run. So tokens come block by block; a new request waits for the blocks that are ordered; and
after an early end, which only the host sees, the device runs the rest of its block and the one
ordered ahead. A block should be short, then, and yet longer than the host takes to order the next
one. That took 0.6 ms for 8 steps on an H200's host.

How long a fused step takes is what its weights take to be read. The rates are rough: a block may
well take twice as long, or half. Steps of the reference have blocks of 8: on a CPU XLA converts
weights to float32 once a block, and steps of SmolLM2-135M one by one took 1.6 times as long.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from ffjax.config import ModelConfig
from ffjax.decode import Implementation, is_fused
from ffjax.dims import step_dims
from pallas_kernels.dims import next_power_of_2
from pallas_kernels.gpu import Gpu

__all__ = ["BLOCK", "block_steps"]

BLOCK = 8
"""Most decode steps of a block. Caches have room for so many positions beyond their capacity."""
# A block takes as long as this, or up to twice as long, unless `BLOCK` steps take less.
_LEAST_SECONDS = 4e-3
# Bytes a second that memory brings: of data centres' GPUs from Hopper on; of the A100; of others,
# which have less shared memory.
_HOPPER, _A100, _SMALLER = 4e12, 2e12, 8e11


def block_steps(
    config: ModelConfig, batch: int, device: Any, implementation: Implementation
) -> int:
    """Decode steps of a block: a power of two, 1 to `BLOCK`.

    Args:
        config: the model's.
        batch: B.
        device: a JAX device.
        implementation: of the steps.
    """
    gpu = Gpu.of(device)
    if gpu is None or not is_fused(implementation):
        return BLOCK
    return _block_steps(config, batch, _rate(gpu))


def _rate(gpu: Gpu) -> float:
    if gpu.bulk_copies:
        return _HOPPER
    return _A100 if gpu.capability == "8.0" else _SMALLER


@functools.lru_cache
def _block_steps(config: ModelConfig, batch: int, rate: float) -> int:
    seconds = step_dims(config, batch, BLOCK).step_weight_bytes / rate
    return min(next_power_of_2(math.ceil(_LEAST_SECONDS / seconds)), BLOCK)
