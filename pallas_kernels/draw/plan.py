"""How the rows, and the vocabulary of each, are cut among the programs of the kernel that draws."""

from __future__ import annotations

import dataclasses

from pallas_kernels.dims import ceil_div, next_power_of_2
from pallas_kernels.gpu import Gpu

__all__ = ["DrawPlan", "make_draw_plan"]

_LEAST_WIDTH = 256
# Logits that a thread holds, beside as many with noise and as many masses. With 16 warps of so many
# nothing to speak of is spilled; with 32, a thread's registers are half as many, and some are.
# On an H200, 8 sequences of 128256 tokens took 24 to 35 us more than a launch that draws nothing
# with 16 warps of 16 a thread, and 26 to 45 with 32 of 8: by an older text.
_PER_THREAD = 16
_LEAST_WARPS, _MOST_WARPS = 8, 32
# In so small a batch noise takes less time than a meeting, and one meeting may be enough. In a
# larger one some row needs two, and noise is made of what the first leaves.
_EARLY = 2
# Masses of so many tokens are still told apart finely: `pallas_kernels.draw.mass`.
_MOST_TOKENS = 1 << 19


@dataclasses.dataclass(frozen=True)
class DrawPlan:
    """The shape of a launch: B * parts programs, each with a part of one row.

    Attributes:
        batch: B.
        vocab_size: V.
        width: W, tokens of a part, a power of two.
        parts: of a row, a power of two; all programs are on the device at once, since those of a
            row wait for each other.
        num_warps: of a program.
        early: whether the first meeting tells which token is ahead, or noise is made meanwhile.
        filters: whether tokens may be left out.
        draws: whether any token is drawn; else the likeliest ones are taken.
        penalizes: whether logits are changed by which tokens came before, by the kernel.
    """

    batch: int
    vocab_size: int
    width: int
    parts: int
    num_warps: int
    early: bool
    filters: bool
    draws: bool = True
    penalizes: bool = False

    @property
    def programs(self) -> int:
        """Of the launch."""
        return self.batch * self.parts


def make_draw_plan(
    batch: int,
    vocab_size: int,
    gpu: Gpu,
    *,
    filters: bool = True,
    draws: bool = True,
    penalizes: bool = False,
) -> DrawPlan | None:
    """The plan for a device; None where a program would have more than its registers hold.

    Args:
        batch: B.
        vocab_size: V.
        gpu: the device. On one core, which the interpreter is, each row is one part.
        filters: whether tokens may be left out.
        draws: whether any token is drawn.
        penalizes: whether the kernel changes logits by which tokens came before.
    """
    how = {
        "early": not filters or batch <= _EARLY,
        "filters": filters,
        "draws": draws,
        "penalizes": penalizes,
    }
    if gpu.cores == 1:
        return DrawPlan(batch, vocab_size, next_power_of_2(vocab_size), 1, _LEAST_WARPS, **how)
    if batch > gpu.cores or vocab_size > _MOST_TOKENS:
        return None
    most = 1 << ((gpu.cores // batch).bit_length() - 1)
    width = max(_LEAST_WIDTH, next_power_of_2(ceil_div(vocab_size, most)))
    if width > 32 * _MOST_WARPS * _PER_THREAD:
        return None
    warps = min(max(_LEAST_WARPS, width // (32 * _PER_THREAD)), _MOST_WARPS)
    parts = next_power_of_2(ceil_div(vocab_size, width))
    return DrawPlan(batch, vocab_size, width, parts, warps, **how)
