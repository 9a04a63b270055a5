"""In which order the words of a buffer of the exchange lie: that in which warps load them."""

from __future__ import annotations

from typing import Any

from pallas_kernels.stream.fragment_layout import next_input, piece_step
from pallas_kernels.stream.plan import PIECE, QUAD, SegmentPlan, StreamPlan

__all__ = ["LOAD", "within_piece", "word_in_exchange"]

# Words that a thread loads at once; those of a warp's threads lie side by side.
LOAD = 4


def within_piece(word: int) -> int:
    """Words from a piece's first one to another."""
    return word // LOAD * 32 * LOAD + word % LOAD


def word_in_exchange(plan: StreamPlan, part: SegmentPlan, column: Any, element: Any) -> Any:
    """Which word of its buffer of the exchange an input of the segment is in: int32, or int.

    Whatever passes from the L2 cache to a multiprocessor does so by whole sectors of 32 bytes, and
    what is polled passes through no cache that would keep the other half of one. So the words lie
    in the order in which a warp loads them, 16 bytes a thread: side by side. Of several sequences
    that means all of them, since each warp has all columns.

    Args:
        plan: the step's.
        part: that of the segment that reads it.
        column: of the step's tokens; 0 where there is one.
        element: an input; or, with column 0, the distance from a thread's first one to the first
            one of another of its pieces, whose words then are as far apart.
    """
    held = part.held
    line, within = _divided(element, next_input(plan, part))  # what a warp reads at once
    if (step := piece_step(plan, part)) > PIECE:
        # The pieces of a read lie `step` apart, and those of other threads between them.
        thread, within = _divided(within, held * step // PIECE)
        piece, within = _divided(within, step)
        fourth, word = _divided(within, PIECE)
        thread, word = thread * QUAD + fourth, piece * PIECE + word
    else:
        thread, word = _divided(within, held)
    if not plan.chunked:
        thread = thread + column * QUAD
    per_word = 2 if plan.half2 else 1
    load, inside = _divided(_divided(word, per_word)[0], LOAD)
    return line * (32 * held // per_word) + load * (32 * LOAD) + thread * LOAD + inside


def _divided(number: Any, size: int) -> tuple[Any, Any]:
    """Quotient and remainder by a power of two."""
    return number >> (size.bit_length() - 1), number & (size - 1)
