"""The layout of activation fragments: which inputs each thread of a program holds.

A product of tensor cores (`mma.m16n8k16`, of integers `mma.m16n8k32`) is 16 rows of weights, A,
times 8 columns of activations, B. Lane t of a warp holds numbers of column t // 4 of B, of rows
t // 4 and t // 4 + 8 of A, and of the result these two rows of columns 2 (t % 4) and the next one.

Which inputs a product adds up, and in which order, is free, as long as A and B agree. So each
thread *reads* 16 bytes of a row of weights at once, 8, 16 or 32 neighbouring inputs, and they go
into its registers of A as they come. It holds the activations of these same inputs, as B.

- Several sequences are the columns. Every column's threads hold the same inputs.
- A single sequence would leave 7 columns empty. Its inputs are cut into 8 chunks, which become the
  columns; A is 8 chunks of each of two rows of weights. So a chunk of weights meets all chunks of
  activations, and only the product with its own one is of use: the chunk diagonal. The chunks'
  reads take turns in a row, 4 each, so that a warp reads a whole line of neighbouring bytes.
- Where a single sequence meets integers, its activations are two digits, and each of 4 chunks has
  two columns, one a digit: of the 16 rows of A, 4 are then the same chunk of different rows. The
  threads of both columns wait for half of the inputs each.
- Where groups of scales are fine, all that a product adds up for a row must be of one group. So the
  four threads of a column hold a fourth of each group's inputs; `ptx.chunk_groups` has the weights
  come that way. Of the line that a warp reads at once, each half is dealt out to the chunks: two
  neighbouring groups of 32 int4 weights each, or one of 64, or one of 32 of int8.

A row's inputs are shared out among the warps that multiply, and their sums are added up later
(`product.sum_up`). Warps that do not multiply hold zeros.

The words, with where they are set:

    piece    8 neighbouring activations, which a thread waits for at once: `plan.PIECE`
    read     16 bytes of a row of weights (of fine groups of several sequences, a fourth of a
             group), which a thread loads at once
    grain    inputs of a read: `plan.grain_of`
    held     inputs of a read whose activations the thread itself waits for: `SegmentPlan.held`
    line     reads of a row that a warp makes side by side: `plan.line_of`
    reads    reads of each row that a thread makes, one a line: `SegmentPlan.reads`

For example the `qkv` matrix of Llama 3.2 1B, of 2048 inputs, with the default tuning. For read q,
lane t of warp w waits for some neighbouring inputs, the first of which is

    bfloat16, one sequence    512 w + 256 q + 8 t: 8 of chunk t // 4; 4 warps, 2 reads
    bfloat16, 8 sequences     256 w + 32 q + 8 (t % 4): 8 of sequence t // 4; 8 warps, 8 reads
    int4, one sequence        512 w + 128 (t // 8) + 16 (t // 4 % 2) + 32 (t % 4): 16 of chunk
                              t // 8; 4 warps, 1 read
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.inline_ptx.anew import anew
from pallas_kernels.program import iota
from pallas_kernels.stream.layout import SPARE_BYTES
from pallas_kernels.stream.plan import COLUMNS, PIECE, QUAD, SegmentPlan, StreamPlan

__all__ = [
    "column_of",
    "distances",
    "feeding_thread",
    "first_input",
    "first_read",
    "multiplies",
    "next_input",
    "offset_of_use",
    "piece_step",
    "pieces_there",
    "place_aside",
    "place_of_offset",
    "waits",
]


def _threads(plan: StreamPlan, *, of_tile: bool = False) -> Array:
    """Each thread's number, int32 `[threads]`; as `StreamEnv.iota`.

    Args:
        plan: the step's.
        of_tile: whether what follows is of use for a tile's product. By bulk copies it is kept from
            tile to tile, unless rows are wide: then there is no register for it.
    """
    threads = iota((plan.threads,), 0)
    is_anew = plan.wide if of_tile and plan.bulk else plan.indices_anew
    return anew(threads) if is_anew else threads


def _lane(plan: StreamPlan, *, of_tile: bool = False) -> Array:
    return _threads(plan, of_tile=of_tile) & 31


def column_of(plan: StreamPlan, *, of_tile: bool = False) -> Array:
    """The column that each thread holds inputs of, 0 to 7: int32 `[threads]`."""
    return lax.shift_right_logical(_lane(plan, of_tile=of_tile), 2)


def first_read(plan: StreamPlan, part: SegmentPlan) -> Array:
    """Reads of a row that come before each thread's first: int32 `[threads]`.

    Of one sequence and groups that are fine, before its warp's.
    """
    if part.fine:
        first = _first(plan, part, None, of_tile=True)
        return first & ~3 if plan.chunked else first
    column = column_of(plan, of_tile=True)
    return _first(plan, part, column if part.bits == 16 else column & 3, of_tile=True)


def _first(
    plan: StreamPlan, part: SegmentPlan, chunk: Array | None, *, of_tile: bool = False
) -> Array:
    """Reads of a row that come before each thread's first one: int32 `[threads]`.

    A warp has `part.reads` lines of a row. A line is 4 reads, one for each thread of a column; of a
    single sequence 4 for each chunk, and `chunk` says which one a thread's is (None: the first).
    """
    threads = _threads(plan, of_tile=of_tile)
    warp = lax.shift_right_logical(threads, 5) & (plan.product_warps - 1)
    first = warp * (part.reads * plan.line(part)) + (_lane(plan, of_tile=of_tile) & 3)
    return first + chunk * QUAD if plan.chunked and chunk is not None else first


def first_input(plan: StreamPlan, part: SegmentPlan) -> Array:
    """The first input whose activation each thread waits for: int32 `[threads]`."""
    column = column_of(plan)
    if part.held == part.grain:
        return _first(plan, part, column) * part.grain
    # Two columns are both digits of one chunk. The threads of each wait for half of its inputs, and
    # hand the other column's digit of them over when digits are made (`ptx.pack_digits`).
    chunk = lax.shift_right_logical(column, 1)
    if part.fine:
        # One half of the line, or the other. In it lie 4 threads' inputs of each of 4 chunks.
        within = (column & 1) * (2 * COLUMNS) + chunk * QUAD
        return first_read(plan, part) * part.grain + within * part.held + (_lane(plan) & 3) * PIECE
    return _first(plan, part, chunk) * part.grain + (column & 1) * part.held


def multiplies(plan: StreamPlan) -> Array:
    """Whether each thread is one of those that multiply: bool `[threads]`."""
    return _threads(plan) < 32 * plan.product_warps


def feeding_thread(plan: StreamPlan) -> int:
    """The thread that asks for tiles: of the last warp, which may be one that does not multiply."""
    return plan.threads - 32


def waits(plan: StreamPlan) -> Array:
    """Whether each thread waits for inputs: those that multiply, and the one that feeds the ring.

    The last warp's do, so that its first one feeds the ring for as long. Bool `[threads]`.
    """
    return multiplies(plan) | (_threads(plan) >= feeding_thread(plan))


def next_input(plan: StreamPlan, part: SegmentPlan) -> int:
    """Inputs from a thread's read to its next one."""
    return plan.line(part) * part.grain


def piece_step(plan: StreamPlan, part: SegmentPlan) -> int:
    """Inputs from a thread's piece of a read to the next one of the same read."""
    return QUAD * PIECE if plan.chunked and part.fine and part.held > PIECE else PIECE


def distances(plan: StreamPlan, part: SegmentPlan) -> list[int]:
    """Inputs from a thread's first piece to each of its pieces."""
    step, pieces = next_input(plan, part), part.held // PIECE
    more = piece_step(plan, part)
    return [q * step + i * more for q in range(part.reads) for i in range(pieces)]


def pieces_there(plan: StreamPlan, part: SegmentPlan, left: Array) -> Array:
    """The pieces that each thread has of a row that may end early: int32 `[threads]`.

    Args:
        plan: the step's.
        part: that of the segment.
        left: int32 `[threads]`, inputs of the row from each thread's first one on.
    """
    step = next_input(plan, part)
    if part.grain == PIECE:  # a read is a piece
        return jnp.clip(lax.div(left + (step - 1), jnp.int32(step)), 0, part.pieces)
    # All pieces of whole lines; of the line in which the row ends, those that begin before that.
    left = jnp.maximum(left, 0)
    lines = lax.div(left, jnp.int32(step))
    a_read = part.held // PIECE
    size = piece_step(plan, part)
    rest = lax.div(left - lines * step + (size - 1), jnp.int32(size))
    return jnp.minimum(lines * a_read + jnp.minimum(rest, a_read), part.pieces)


def place_aside(plan: StreamPlan, part: SegmentPlan, start: Any, spare: Any) -> Array:
    """Where each thread puts aside what it makes of a tile: addresses, int32 `[threads]`.

    For a single sequence, only products on the chunk diagonal are used: those whose row and column
    mean the same chunk. The other threads store theirs to a spare place. If they skipped the store,
    the threads of a warp would part, and bringing them together again takes longer.

    Args:
        plan: the step's.
        part: that of the tile's segment.
        start: address where the tile's products begin: int32 scalar, or int. They are float32
            `[warps, rows, 8]` of several sequences, `[warps, chunks, rows]` of one.
        spare: likewise where unused products go, `SPARE_BYTES` a warp.
    """
    thread = _threads(plan, of_tile=True)
    warp, column = lax.shift_right_logical(thread, 5), column_of(plan, of_tile=True)
    # In a product's result, `row` is a thread's row, and `quarter` says which two columns it has.
    row, quarter = column, thread & 3
    if not plan.chunked:
        return start + (warp * part.rows + row) * (4 * COLUMNS) + quarter * 8
    if part.fine:
        return _fine_place_aside(plan, part, start, spare, warp, row, quarter)
    if part.bits == 16:
        # Row g is chunk g; columns 2 q and 2 q + 1 are chunks. On the diagonal, q is g // 2.
        chunk, of_use = row, lax.shift_right_logical(row, 1)
        where = (warp * plan.columns(part) + chunk) * (4 * part.rows)
    else:
        # Rows g and g + 4 are chunk g, of different halves of the tile's rows. Columns 2 q and
        # 2 q + 1 are both digits of chunk q. On the diagonal, q is g % 4.
        chunk = of_use = row & 3
        half = lax.shift_right_logical(row, 2) * (2 * part.rows)
        where = (warp * plan.columns(part) + chunk) * (4 * part.rows) + half
    spare = spare + SPARE_BYTES * warp
    return jnp.where(of_use == quarter, start + where, spare)


def _fine_place_aside(
    plan: StreamPlan,
    part: SegmentPlan,
    start: Any,
    spare: Any,
    warp: Array,
    row: Array,
    quarter: Array,
) -> Array:
    """The same of a single sequence and groups that are fine.

    `ptx.chunk_groups` makes several products, whose chunks come in other orders: in the i-th one,
    row g is chunk (g ^ i) % 4. So the columns of each thread, those of chunk `quarter`, meet their
    chunk in the product of number (g ^ quarter) % 4. A product takes two rows of each half of the
    tile. Where the tile has fewer than four products take, the others' sums are in the first ones'.
    """
    chunk, half = quarter, lax.shift_right_logical(row, 2)
    product, fours = (row ^ chunk) & 3, max(1, part.rows // 4)
    rows = part.rows // 2 * half + 2 * (product & (fours - 1))
    where = start + (warp * plan.columns(part) + chunk) * (4 * part.rows) + 4 * rows
    return jnp.where(product < fours, where, spare + SPARE_BYTES * warp)


def place_of_offset(plan: StreamPlan, part: SegmentPlan, start: Any, size: int) -> Array:
    """Where each thread puts its sums of a group's activations: addresses, int32 `[threads]`.

    Args:
        plan: the step's.
        part: that of a segment whose weights have an offset.
        start: address where such sums begin: int32 scalar, or int.
        size: bytes from a warp's to the next one's.
    """
    if plan.chunked and part.fine:  # whoever makes use of a sum could have made it
        return offset_of_use(plan, part, start, size)
    warp, column = lax.shift_right_logical(_threads(plan), 5), column_of(plan)
    if plan.chunked:
        column = lax.shift_right_logical(column, 1)
    return start + warp * size + 4 * column


def offset_of_use(plan: StreamPlan, part: SegmentPlan, start: Any, size: int) -> Array:
    """Where the sums begin that each thread makes use of: addresses, int32 `[threads]`.

    Args: see `place_of_offset`.
    """
    warp = lax.shift_right_logical(_threads(plan, of_tile=True), 5)
    fourth = _lane(plan, of_tile=True) & 3
    each = 8 if not plan.chunked else 4 * QUAD if part.fine else 4
    return start + warp * size + each * fourth
