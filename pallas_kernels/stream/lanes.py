"""Which inputs of a span each thread of a program holds.

In a product of tensor cores, the threads of a warp hold the operand's 8 columns as 8 groups of
4. Each thread *reads* 16 bytes of a row of weights at once, 8, 16 or 32 neighbouring inputs, as
often as the warps share. A single sequence's columns are chunks, whose lines of 4 reads take turns;
several sequences are columns themselves, and every column's threads hold the same inputs.

Where a single sequence meets integers, its activations are two digits, and each chunk has two
columns, one a digit: of the 16 rows of weights that a product takes, 4 are then the same chunk of
different rows. The threads of both columns wait for half of the inputs each.

Warps that do not multiply hold zeros.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.program import iota
from pallas_kernels.stream.layout import SPARE_BYTES
from pallas_kernels.stream.plan import COLUMNS, PIECE, QUAD, SegmentPlan, StreamPlan

__all__ = [
    "column_of",
    "feeding_thread",
    "first_input",
    "first_read",
    "multiplies",
    "next_input",
    "place_aside",
    "place_in_mail",
    "waits",
]


def _lane(plan: StreamPlan) -> Array:
    return iota((plan.threads,), 0) & 31


def column_of(plan: StreamPlan) -> Array:
    """The column that each thread holds inputs of, 0 to 7: int32 `[T]`."""
    return lax.shift_right_logical(_lane(plan), 2)


def first_read(plan: StreamPlan, part: SegmentPlan) -> Array:
    """Reads of a row that come before each thread's first: int32 `[T]`."""
    column = column_of(plan)
    return _first(plan, part, column if part.bits == 16 else column & 3)


def _first(plan: StreamPlan, part: SegmentPlan, chunk: Array) -> Array:
    warp = lax.shift_right_logical(iota((plan.threads,), 0), 5) & (plan.product_warps - 1)
    first = warp * (part.reads * plan.line(part)) + (_lane(plan) & 3)
    return first + chunk * QUAD if plan.chunked else first


def first_input(plan: StreamPlan, part: SegmentPlan) -> Array:
    """The first input whose activation each thread waits for: int32 `[T]`."""
    column = column_of(plan)
    if part.held == part.grain:
        return _first(plan, part, column) * part.grain
    pair = lax.shift_right_logical(column, 1)
    return _first(plan, part, pair) * part.grain + (column & 1) * part.held


def multiplies(plan: StreamPlan) -> Array:
    """Whether each thread is one of those that multiply: bool `[T]`."""
    return iota((plan.threads,), 0) < 32 * plan.product_warps


def feeding_thread(plan: StreamPlan) -> int:
    """The thread that asks for tiles: of the last warp, which may be one that does not multiply."""
    return plan.threads - 32


def waits(plan: StreamPlan) -> Array:
    """Whether each thread waits for inputs: those that multiply, and the one that feeds the ring.

    The last warp's do, so that its first one feeds the ring for as long. Bool `[T]`.
    """
    return multiplies(plan) | (iota((plan.threads,), 0) >= feeding_thread(plan))


def next_input(plan: StreamPlan, part: SegmentPlan) -> int:
    """Inputs from a thread's read to its next one."""
    return plan.line(part) * part.grain


def place_aside(plan: StreamPlan, part: SegmentPlan, start: Any, spare: Any) -> Array:
    """Where each thread puts aside what it makes of a tile: addresses, int32 `[T]`.

    Of a single sequence, what is of use is that whose row and column of a product are the same
    chunk's. A store that the other threads left out would part their warps, and to put them
    together again takes longer.

    Args:
        plan: the step's.
        part: that of the tile's segment.
        start: address where the tile's products begin: int32 scalar, or int.
        spare: likewise where what is of no use goes, `SPARE_BYTES` a warp.
    """
    thread = iota((plan.threads,), 0)
    warp, column = lax.shift_right_logical(thread, 5), column_of(plan)
    if not plan.chunked:
        return start + (warp * part.rows + column) * (4 * COLUMNS) + (thread & 3) * 8
    if part.bits == 16:
        chunk, of_use = column, lax.shift_right_logical(column, 1)
        where = (warp * plan.columns(part) + chunk) * (4 * part.rows)
    else:  # each half of the columns has half of the rows
        chunk = of_use = column & 3
        half = lax.shift_right_logical(column, 2) * (2 * part.rows)
        where = (warp * plan.columns(part) + chunk) * (4 * part.rows) + half
    spare = spare + SPARE_BYTES * warp
    return jnp.where(of_use == (thread & 3), start + where, spare)


def place_in_mail(plan: StreamPlan, part: SegmentPlan, element: Any) -> Any:
    """Where in its row of the mail an input of the segment lies: int32, or int.

    Threads wait for 8 activations at a time. Where 16 or 32 neighbours are a thread's, the four of
    its column would read from different lines; so pieces lie in the order in which they are read.
    `element` is an input, a thread's first one, or the distance from there to one of its pieces.
    """
    size, pieces = QUAD * part.grain, part.grain // PIECE
    if plan.chunked or pieces == 1 or part.inner % size:
        return element
    thread, piece = (
        _shifted(element, part.grain) & (QUAD - 1),
        _shifted(element, PIECE) & (pieces - 1),
    )
    inside = piece * (QUAD * PIECE) + thread * PIECE + (element & (PIECE - 1))
    return element - (element & (size - 1)) + inside


def _shifted(element: Any, size: int) -> Any:
    """Divided by a power of two."""
    return element >> (size.bit_length() - 1)
