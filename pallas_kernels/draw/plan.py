"""How the vocabulary is cut among the programs of the kernel that draws."""

from __future__ import annotations

import dataclasses

from pallas_kernels.dims import ceil_div, next_power_of_2
from pallas_kernels.gpu import Gpu

__all__ = ["DrawPlan", "make_draw_plan"]

_LEAST_WIDTH = 256
# Logits that a thread may hold, beside as many with noise, without spilling.
_MOST_PER_THREAD = 16
_LEAST_WARPS, _MOST_WARPS = 8, 32
# What is summed of a vocabulary of so many tokens stays within the exchange's integers.
_MOST_TOKENS = 1 << 20


@dataclasses.dataclass(frozen=True)
class DrawPlan:
    """The shape of a launch.

    Attributes:
        batch: B.
        vocab_size: V.
        width: tokens of a program, a power of two.
        programs: P; all of them are on the device at once, since they wait for each other.
        num_warps: of a program.
    """

    batch: int
    vocab_size: int
    width: int
    programs: int
    num_warps: int

    @property
    def padded_batch(self) -> int:
        """B, rounded up to a power of two."""
        return next_power_of_2(self.batch)


def make_draw_plan(batch: int, vocab_size: int, gpu: Gpu) -> DrawPlan | None:
    """The plan for a device; None where a program would have more than its registers hold.

    Args:
        batch: B.
        vocab_size: V.
        gpu: the device.
    """
    width = max(_LEAST_WIDTH, next_power_of_2(ceil_div(vocab_size, gpu.cores)))
    rows = next_power_of_2(batch)
    warps = max(_LEAST_WARPS, ceil_div(rows * width, 32 * _MOST_PER_THREAD))
    if gpu.cores > 1 and (warps > _MOST_WARPS or vocab_size > _MOST_TOKENS):
        return None
    return DrawPlan(
        batch=batch,
        vocab_size=vocab_size,
        width=width,
        programs=ceil_div(vocab_size, width),
        num_warps=min(next_power_of_2(warps), _MOST_WARPS),
    )
