"""A tile times its activations, and the sums of the products of some tiles.

Summing up takes a program's warps two meetings. So the products of a tile are put aside, and
summed up for several tiles at once: of a segment that is short, for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.dims import GROUP
from pallas_kernels.stream import access, ptx
from pallas_kernels.stream.env import StreamEnv, select
from pallas_kernels.stream.fragment_layout import (
    distances,
    first_input,
    first_read,
    offset_of_use,
    pieces_there,
    place_aside,
)
from pallas_kernels.stream.fragments import Fragments, inputs_of
from pallas_kernels.stream.interpreted_tiles import read_tile
from pallas_kernels.stream.layout import SharedLayout, offset_pitch
from pallas_kernels.stream.plan import (
    COLUMNS,
    PIECE,
    READ,
    Segment,
    SegmentPlan,
    StreamPlan,
    is_residual,
)
from pallas_kernels.stream.ring import Turn, products_address, slot_address, wait_for_tile
from pallas_kernels.stream.tiles import Place

__all__ = [
    "Outputs",
    "Sums",
    "integer_tile",
    "multiply",
    "outputs_of",
    "pieces_of_tile",
    "products_shape",
    "rows_of",
    "scales_at_once",
    "sum_up",
]


class Outputs(NamedTuple):
    """What a flush makes: pairs of rows of some groups, for each sequence; int32 `[E]`.

    A pair is a row of a group's first half and the same one of its second half; where words hold
    two activations, of the residual two neighbours.
    """

    number: Array  # of the group among those that are flushed
    pair: Array  # of the group
    column: Array  # of the step's tokens


class Sums(NamedTuple):
    """Dot products of the pairs of `Outputs`, float32 `[E]`."""

    first: Array
    second: Array


def outputs_of(env: StreamEnv, segment: Segment, every: int = 1, *, anew: bool = False) -> Outputs:
    """What a flush of the segment makes, or the residual that a program owns.

    Args:
        env: the program's view.
        segment: which.
        every: of a group's pairs; the first one included.
        anew: whether the compiler is to compute what follows from them each time: see `ptx.anew`.
    """
    plan, columns = env.plan, env.plan.padded_columns
    rows = plan.rows if segment == Segment.EMBED else env.segment(segment).run_rows
    pairs = rows // 2 // every
    index = env.iota((plan.flushed(segment) * pairs * columns,), 0)
    if anew and not env.interpret:
        index = ptx.anew(index)
    pair = lax.div(index, jnp.int32(columns))
    number = lax.div(pair, jnp.int32(pairs))
    return Outputs(number, (pair - number * pairs) * every, index & (columns - 1))


def rows_of(
    env: StreamEnv, segment: Segment, pair: Array, rows: int, group: Array | None = None
) -> Iterator[Array]:
    """Both rows of a pair, counted in its group of so many or, given that, in the matrix."""
    if env.plan.half2 and is_residual(segment):
        both = 2 * pair, 2 * pair + 1
        if group is None:
            yield from both
            return
        start = group * rows
        yield from (start + row for row in both)
        return
    first = pair if group is None else group * rows + pair
    yield from (first, first + rows // 2)


def products_shape(plan: StreamPlan) -> tuple[int, int, int, int]:
    """Of the products put aside in interpret mode, float32: programs, tiles, rows, sequences."""
    down = plan.segments[Segment.DOWN]
    rows = max(part.rows for part in plan.segments.values())
    return plan.programs, plan.flush * down.run, rows, plan.padded_columns


def _of_segment(env: StreamEnv, segment: Array, kind: list[Segment], of: str) -> Array:
    """An attribute of the segment's plan, one of a kind's."""
    values = {s: getattr(env.segment(s), of) for s in kind}
    return select(segment, [values.get(s, values[kind[0]]) for s in sorted(env.plan.segments)])


def multiply(env: StreamEnv, turn: Turn, index: Array, place: Place, fragments: Fragments) -> None:
    """Waits for the program's `index`-th tile, multiplies it, and puts the products aside.

    Args:
        env: the program's view.
        turn: the tile's turn.
        index: int32 scalar.
        place: the tile's.
        fragments: of its segment.
    """
    wait_for_tile(env, turn)

    def product(kind: list[Segment]) -> Array:
        if env.interpret:
            pitch = _of_segment(env, place.segment, kind, "row_bytes")
            _interpreted(env, index, place, pitch, env.segment(kind[0]), fragments)
            return index
        return _multiply(env, turn, place, fragments, kind)

    _switch_kind(env, place.segment, product)


def _multiply(
    env: StreamEnv, turn: Turn, place: Place, fragments: Fragments, kind: list[Segment]
) -> Array:
    """The tile that lies in the turn's slot, times the fragments, by tensor cores.

    Segments of a kind share the code, so what differs between them is selected: the rows' length.

    Args:
        env: the program's view.
        turn: the tile's turn.
        place: the tile's.
        fragments: of its segment.
        kind: segments whose tiles are multiplied alike, the tile's among them.
    """
    plan, part = env.plan, env.segment(kind[0])
    pitch = _of_segment(env, place.segment, kind, "row_bytes")
    start = products_address(env) + place.flush_index * plan.products_bytes(kind[0])
    where = place_aside(plan, part, start, env.shared + SharedLayout.of(plan).spare)
    first = first_read(plan, part)
    slot = slot_address(env, turn)
    pitches = jnp.full((plan.threads,), pitch)
    words = fragments.words[: part.pieces * PIECE // 2]
    # Rows are read a whole span at a time. What lies beyond a shorter one meets activations of 0.
    ragged = any(plan.is_ragged(s) for s in kind)
    if part.bits == 16:
        # 0 times a NaN is one. Other rows of bfloat16 have none; in a slot that held integers, any
        # bits may lie there, and a thread's pieces beyond the row are left out.
        guarded = plan.quantized and ragged
        there = pieces_of_tile(env, place, kind) if guarded else None
        return ptx.multiply_tile(
            slot + READ * first,
            pitches,
            words,
            where,
            there,
            rows=part.rows,
            step=READ * plan.line(part),
            chunked=plan.chunked,
            threads=32 * plan.product_warps,
        )
    assert fragments.scale is not None
    scales = _scales_of_tile(place, part, slot + part.rows * pitch)
    size = GROUP if part.grouping is None else part.grouping.size
    # Groups that come first in a row: all of its scales come, also those of the inputs that other
    # programs multiply.
    before = place.split * (part.width // size) if part.splits > 1 else 0
    # Of fine groups, `multiply_integers` counts on from the warp's first one.
    own = first & ~3 if part.fine else first
    return ptx.multiply_integers(
        slot + part.read_bytes * first,
        pitches,
        where,
        jnp.full((plan.threads,), scales),
        fragments.scale,
        lax.div(own * part.grain, jnp.int32(size)) + before,
        words,
        integer_tile(plan, part, ragged=ragged),
        _offsets(env, part),
    )


def _scales_of_tile(place: Place, part: SegmentPlan, end: Array) -> Array:
    """Where a tile's scales begin in shared memory: int32 scalar.

    Args:
        place: the tile's.
        part: its segment's plan.
        end: where its rows would end if there were no gap between the two halves of them.
    """
    scales = end + part.gap
    if part.scaled_rows > part.rows:  # those of all tiles of a run have come with each of them
        scales += (place.number & (part.run - 1)) * (part.rows * part.scale_bytes)
    return scales


def integer_tile(plan: StreamPlan, part: SegmentPlan, *, ragged: bool) -> ptx.IntegerTile:
    """What multiplying a tile of integers needs to know.

    Args:
        plan: the step's.
        part: that of the tile's segment.
        ragged: whether some tile's rows are shorter than its span.
    """
    groups, more = part.grouping, {}
    if groups is not None:
        more = {
            "group": groups.size,
            "scales": groups.scales,
            "offset": groups.offset,
            "fine": part.fine,
            "scales_at_once": scales_at_once(plan, part),
            "gap": part.gap,
            "scale_gap": part.scale_gap,
        }
    return ptx.IntegerTile(
        bits=part.bits,
        rows=part.rows,
        reads=part.reads,
        step=part.read_bytes * plan.line(part),
        scale_bytes=part.scale_bytes,
        ragged=ragged,
        chunked=plan.chunked,
        threads=32 * plan.product_warps,
        **more,
    )


def scales_at_once(plan: StreamPlan, part: SegmentPlan) -> int:
    """Bytes of neighbouring groups' scales that a thread may load at once: 2 to 16.

    They must begin at a multiple of it: of each row, warp and part of the inputs.
    """
    assert part.grouping is not None
    each = part.grouping.bytes
    of_warp = each * (part.reads * plan.line(part) * part.grain // part.grouping.size)
    sizes = [READ, part.scale_bytes, of_warp, part.weight_bytes]
    if part.splits > 1:
        sizes.append(each * (part.width // part.grouping.size))
    return math.gcd(*sizes)


def _offsets(env: StreamEnv, part: SegmentPlan) -> Array | None:
    """Where each thread's sums of groups' activations begin: int32 `[threads]`; None: no sums."""
    plan = env.plan
    if part.grouping is None or part.grouping.offset is None:
        return None
    start = env.shared + SharedLayout.of(plan).offsets
    return offset_of_use(plan, part, start, offset_pitch(plan))


def pieces_of_tile(env: StreamEnv, place: Place, kind: list[Segment]) -> Array:
    """Pieces of a tile's rows that each thread has: int32 `[threads]`.

    Args:
        env: the program's view.
        place: the tile's.
        kind: segments whose tiles are multiplied alike, the tile's among them.
    """
    part, width = env.segment(kind[0]), _of_segment(env, place.segment, kind, "width")
    if part.splits > 1:  # the last part of the inputs may be shorter; no other segment is split
        width = jnp.minimum(width, part.inner - place.split * part.width)
    return pieces_there(env.plan, part, width - first_read(env.plan, part) * part.grain)


def _switch_kind(env: StreamEnv, segment: Array, way: Callable[[list[Segment]], Array]) -> None:
    """Goes the way of the kind that the segment is of; the embedding's is of no matter."""
    down, *others = sorted(env.plan.kinds, key=lambda kind: kind != [Segment.DOWN])
    if len(others) == 1:
        lax.cond(segment == Segment.DOWN, lambda: way(down), lambda: way(others[0]))
        return
    kinds = [down, *others]
    numbers = [
        next(i for i, kind in enumerate(kinds) if s in kind) for s in sorted(env.plan.segments)
    ]
    lax.switch(select(segment, numbers), [lambda kind=kind: way(kind) for kind in kinds])


def sum_up(env: StreamEnv, segment: Segment, outputs: Outputs) -> Sums:
    """Sums up the products of the tiles of a flush.

    All threads have put theirs aside: a barrier stands before. Another must stand after.
    """
    plan, part = env.plan, env.segment(segment)

    def of(row: Array) -> Array:
        tile = outputs.number
        if part.run > 1:  # a group's rows are those of several tiles
            inside = lax.div(row, jnp.int32(part.rows))
            tile, row = tile * part.run + inside, row - inside * part.rows
        if env.interpret:
            return access.load(env["products"].at[env.program, tile, row, outputs.column])
        at = products_address(env) + tile * plan.products_bytes(segment)
        if plan.chunked:
            at += 4 * row
            return ptx.sum_shared(at, plan.columns(part) * plan.product_warps, 4 * part.rows)
        at += 4 * (row * COLUMNS + outputs.column)
        return ptx.sum_shared(at, plan.product_warps, 4 * COLUMNS * part.rows)

    first, second = rows_of(env, segment, outputs.pair, part.run_rows)
    return Sums(of(first), of(second))


def _interpreted(
    env: StreamEnv,
    index: Array,
    place: Place,
    pitch: Array,
    part: SegmentPlan,
    fragments: Fragments,
) -> None:
    """Puts a tile's sums where `sum_up` finds them."""
    plan = env.plan
    first = first_input(plan, part)
    inputs = jnp.stack([first + x + j for x in distances(plan, part) for j in range(PIECE)])
    values = jnp.stack(inputs_of(part, fragments))  # [inputs, threads]
    rows = jnp.arange(part.rows)[:, None, None]
    rows = rows * pitch + jnp.where(rows < part.rows // 2, 0, part.gap)
    weights = read_tile(env, index, part, rows + lax.div(inputs * part.bits, 8)[None], inputs)
    products = (weights * values).sum(axis=1)  # [rows, threads]
    if plan.chunked:
        sums = products.sum(axis=1)[:, None]
    else:
        sums = products.reshape(part.rows, plan.num_warps, COLUMNS, 4).sum(axis=(1, 3))
    row, b = env.iota(sums.shape, 0), env.iota(sums.shape, 1)
    access.store(env["products"].at[env.program, place.flush_index, row, b], sums)
