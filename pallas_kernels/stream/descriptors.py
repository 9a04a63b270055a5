"""Copy descriptors: where in memory each tile of a program's stream lies.

What a tile's copies need is worked out for all tiles at once when a step begins, a row of a
table for each, and read back a tile at a time: it would take the loop longer to work it out
than to multiply the tile. All layers share their rows. So do the head's tiles, which are many: they
lie equally far apart, and count as one tile of so many more layers; only the last one, which may be
shorter, or empty, has a row of its own.

A tile is copied in one piece where its rows are neighbours. In a group of queries, keys and
values the first half of the rows holds elements of the first half of a head and the second half
those that RoPE rotates them with; in one of gate and up, rows of the gate and the same ones of
the up projection: those come in two pieces. So do others between whose halves of rows there is a
gap in the slot, against conflicts of banks.

Where the inputs are split, every row is a piece of its own, or all are one *box*: see `plan.Box`.

Scales of quantized weights come to the tile's slot too, after its rows, by copies of their own: of
all the rows that are dealt out together, so that they begin at whole 16 bytes; of small groups, of
the tile's own rows, where those do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.dims import next_power_of_2
from pallas_kernels.program import iota
from pallas_kernels.stream import access, ptx
from pallas_kernels.stream.env import StreamEnv, pick
from pallas_kernels.stream.layout import ROW_WORDS, descriptor_rows, descriptor_words
from pallas_kernels.stream.plan import READ, Segment, SegmentPlan, StreamPlan, is_paired

__all__ = [
    "Descriptor",
    "busy_tiles",
    "descriptors_shape",
    "make_descriptors",
    "most_copies",
    "read_descriptor",
    "scales_of",
    "team_of",
    "weights_of",
]


class Descriptor(NamedTuple):
    """A tile's copies: where its weights lie, and where they go.

    Int32 scalars, as they stand in the table. After them stands the box, see `_box_word`. Of
    scales the same follows; but before `pitch` stands where in the slot the first copy goes, and
    there is no box.

    Attributes:
        begin: where the tile begins.
        stride: units of 16 bytes from a copy's beginning to the next one's.
        size: bytes of a copy.
        copies: how many; 0 for an empty tile.
        pitch: bytes from a copy's place in the slot to the next one's.
    """

    begin: ptx.Begin
    stride: Array
    size: Array
    copies: Array
    pitch: Array


def descriptors_shape(plan: StreamPlan) -> tuple[int, int, int]:
    """Of the table, int32: programs, rows, words."""
    return plan.programs, descriptor_rows(plan), descriptor_words(plan)


def most_copies(plan: StreamPlan) -> int:
    """Copies of a tile's weights at most; a box is one."""
    if plan.box is not None:
        return 2
    return max([2, *(part.rows for part in plan.segments.values() if part.splits > 1)])


def weights_of(env: StreamEnv) -> list[Any]:
    """The arrays in the order of `Segment`."""
    return [env[segment.matrix] for segment in sorted(env.plan.segments)]


def scales_of(env: StreamEnv, segment: Segment) -> Any:
    """The scales of a quantized matrix."""
    return env[f"{segment.matrix}_scale"]


def team_of(env: StreamEnv, part: SegmentPlan) -> Array:
    """Which of a segment's teams this program belongs to."""
    return lax.div(env.program, jnp.int32(part.splits)) if part.splits > 1 else env.program


def busy_tiles(env: StreamEnv, part: SegmentPlan) -> Array:
    """This program's groups of a segment. A program that no team has room for has none."""
    team, runs = team_of(env, part), part.groups // part.run
    mine = lax.div(runs - team + (part.teams - 1), jnp.int32(part.teams))
    return jnp.where(team < part.teams, jnp.maximum(mine, 0) * part.run, 0)


def make_descriptors(env: StreamEnv, table: Array) -> None:
    """Works out the table's rows of this program.

    Args:
        env: the program's view.
        table: int32 scalar, where the table begins in shared memory. Interpreted, it is the
            array `descriptors`.
    """
    plan, d = env.plan, env.dims
    rows = descriptors_shape(plan)[1]
    entry = iota((next_power_of_2(rows),), 0)
    order = sorted(plan.segments)
    parts = [plan.segments[s] for s in order]
    firsts = [1]  # row of each segment's first tile
    for part in parts[:-1]:
        firsts.append(firsts[-1] + part.tiles)
    beyond = [entry >= first for first in firsts[1:]]

    def of(values: Sequence[Array | int]) -> Array:
        return jnp.broadcast_to(pick(beyond, values), entry.shape)

    number, of_head = entry - of(firsts), beyond[-1]
    head_tiles = parts[Segment.HEAD].tiles
    number = jnp.where(of_head & (number > 0), head_tiles - 1, number)
    team = of([team_of(env, part) for part in parts])
    run = of([part.run for part in parts])
    turn = lax.div(number, run)
    group = (team + turn * of([part.teams for part in parts])) * run + number - turn * run
    # Of a pair's two halves, this is the first one's row.
    outputs = of(
        [p.rows // 2 if is_paired(s) else p.rows for s, p in zip(order, parts, strict=True)]
    )
    row = group * outputs
    qkv = parts[Segment.QKV]
    # Groups of queries, keys and values go on after the second halves of a head.
    head = lax.div(jnp.maximum(group, 0), jnp.int32(d.head_dim // qkv.rows))
    row += of([head * (d.head_dim // 2), *([0] * (len(parts) - 1))])
    # Where a tile of the head would begin, if there were one for each layer before the first.
    head_part = parts[Segment.HEAD]
    apart = head_part.teams * head_part.rows
    begin_row = jnp.where(of_head, team * outputs - d.num_layers * apart, row)
    column = (env.program - team * of([part.splits for part in parts])) * of(
        [p.width for p in parts]
    )
    inner = of([_units(p.inner * p.bits) for p in parts])
    start = begin_row * inner + lax.div(column * of([p.bits for p in parts]), jnp.int32(8 * READ))
    weights = weights_of(env)
    strides = _strides(weights, _units(apart * head_part.inner * head_part.bits))
    interpret = env.interpret
    begin = ptx.begin_words(
        weights[0], weights, strides, beyond, start, unit=READ, interpret=interpret
    )
    # Rows of a copy's kind that there are; all groups of a head are whole.
    out = of([d.qkv_dim, *(p.out for p in parts[1:])])
    there = jnp.clip(out - row, 0, outputs)
    width = jnp.minimum(of([p.width for p in parts]), of([p.inner for p in parts]) - column)
    paired = of([int(is_paired(s)) for s in order]) != 0
    split = of([int(p.splits > 1) for p in parts]) != 0
    # Others come in two pieces where there is to be a gap between these.
    halved = [int(p.gap > 0 and not is_paired(s)) for s, p in zip(order, parts, strict=True)]
    apart_scales = [p.scale_gap > 0 and not is_paired(s) for s, p in zip(order, parts, strict=True)]
    second = of(
        [
            d.head_dim // 2,
            parts[Segment.ATTN_OUT].rows // 2,
            d.ffw_dim,
            parts[Segment.DOWN].rows // 2,
            parts[Segment.HEAD].rows // 2,
        ]
        if any(halved) or any(apart_scales)
        else [d.head_dim // 2, 0, d.ffw_dim, 0, 0]
    )
    busy = (number >= 0) & (number < of([busy_tiles(env, part) for part in parts]))
    count = jnp.where(split, there, jnp.where(paired, 2, 1))
    pitch = of(
        [
            p.row_bytes * (p.rows // 2 if is_paired(s) or p.gap else 1) + p.gap
            for s, p in zip(order, parts, strict=True)
        ]
    )
    of_copy = there
    if any(halved):
        count = jnp.where(of(halved) != 0, 2, count)
        of_copy = jnp.where(of(halved) != 0, lax.div(there, jnp.int32(2)), there)
    words = [
        *begin,
        jnp.where(split, inner, second * inner),
        lax.div(width * of([p.bits for p in parts]), jnp.int32(8)) * jnp.where(split, 1, of_copy),
        jnp.where(busy & (there > 0), count, 0),
        pitch,
    ]
    words.append(_box_word(plan, split & (words[5] > 0), row, column))
    assert len(words) == ROW_WORDS
    if plan.quantized:
        if any(apart_scales):
            halves = lax.div(there, jnp.int32(2))
            there = jnp.where(of([int(x) for x in apart_scales]) != 0, halves, there)
        words += _scale_words(env, parts, beyond, begin_row, second, there, words[5])
    if env.interpret:
        for number, word in enumerate(words):
            access.store(env["descriptors"].at[env.program, entry, number], word, mask=entry < rows)
        return
    for first in range(0, len(words), ROW_WORDS):
        at = table + 4 * (entry * len(words) + first)
        ptx.write_row(at, words[first : first + ROW_WORDS], entry < rows)
    access.meet()


def _box_word(plan: StreamPlan, is_box: Array, row: Array, column: Array) -> Array:
    """Where in a layer's matrix a tile's box begins: its row, its piece in bits 16 to 30, and the
    sign; 0 where it comes by other copies.

    Args:
        plan: the step's.
        is_box: of each row of the table, whether its tile has one if there are boxes.
        row: the first that a tile has.
        column: likewise the first input.
    """
    if plan.box is None:
        return jnp.zeros_like(row)
    part = plan.segments[Segment.DOWN]
    piece = lax.div(column, jnp.int32(part.width)) * plan.box.pieces
    return jnp.where(is_box, jnp.int32(-(2**31)) | lax.shift_left(piece, 16) | row, 0)


def _units(bits: int) -> int:
    """Whole units of 16 bytes."""
    return bits // (8 * READ)


def _strides(arrays: Sequence[Any], head: int, unit: int = READ) -> list[int]:
    """Units of a layer of each array; of the head, which is the last, those between its tiles."""
    sizes = [math.prod(ref.shape[1:]) * jnp.dtype(ref.dtype).itemsize for ref in arrays[:-1]]
    return [*(size // unit for size in sizes), head]


def _scale_words(
    env: StreamEnv,
    parts: list[SegmentPlan],
    beyond: list[Array],
    row: Array,
    second: Array,
    there: Array,
    copies: Array,
) -> list[Array]:
    """What the table says of the tiles' scales: of whole rows, also where the inputs are split.

    Args:
        env: the program's view.
        parts: the segments.
        beyond: of each row of the table, whether it is one of a later segment.
        row: the first that a tile has; of the head see `make_descriptors`.
        second: rows from a pair's first half to the second.
        there: rows of a copy of weights, where these are not split.
        copies: of weights; 0 for an empty tile.
    """
    names, whole = sorted(env.plan.segments), env.plan.scale_unit
    unit = jnp.int32(whole)

    def of(values: Sequence[Array | int]) -> Array:
        return jnp.broadcast_to(pick(beyond, values), row.shape)

    def array_of(segment: Segment) -> Any:
        # Of what has no scales, nothing is copied.
        quantized = env.segment(segment).bits != 16
        return scales_of(env, segment) if quantized else env[segment.matrix]

    # All tiles of a run have the scales of all its rows, or each those of its own.
    shared = [p.scaled_rows > p.rows for p in parts]
    each = [p.scaled_rows if more else 1 for p, more in zip(parts, shared, strict=True)]
    row = row - lax.rem(row, of(each))
    there = of([p.scaled_rows if more else there for p, more in zip(parts, shared, strict=True)])
    arrays, sizes = [array_of(segment) for segment in names], of([p.scale_bytes for p in parts])
    start, base = lax.div(row * sizes, unit), weights_of(env)[0]
    head = parts[Segment.HEAD]
    apart = head.teams * head.rows * head.scale_bytes // whole
    strides, interpret = _strides(arrays, apart, whole), env.interpret
    begin = ptx.begin_words(base, arrays, strides, beyond, start, unit=whole, interpret=interpret)
    # Whole units: one that holds a scale lies in the array.
    size = lax.div(there * sizes + (whole - 1), unit) * whole
    most = of(
        [
            (1 + (is_paired(s) or p.scale_gap > 0)) * (p.bits != 16)
            for s, p in zip(names, parts, strict=True)
        ]
    )
    # Where weights come in one copy, scales may come in two.
    if any(p.scale_gap and not (p.gap or is_paired(s)) for s, p in zip(names, parts, strict=True)):
        copies = jnp.where(copies > 0, jnp.maximum(copies, most), 0)
    pitch = size
    if any(p.scale_gap for p in parts):
        pitch = size + of([p.scale_gap for p in parts])
    place = of([p.weight_bytes for p in parts])
    stride = lax.div(second * sizes, unit)
    return [*begin, stride, size, jnp.minimum(copies, most), place, pitch]


def read_descriptor(env: StreamEnv, index: Array) -> tuple[Descriptor, Array]:
    """The descriptor of this program's `index`-th tile, and its layer, for interpret mode."""
    plan, layers = env.plan, env.plan.dims.num_layers
    in_layers = index - 1  # the embedding's comes first
    layer = jnp.minimum(lax.div(in_layers, jnp.int32(plan.layer_tiles)), layers)
    within = in_layers - layer * plan.layer_tiles
    of_head, last = layer == layers, plan.segments[Segment.HEAD].tiles - 1
    in_head = plan.layer_tiles + 1 + (within == last).astype(jnp.int32)
    entry = jnp.where(of_head, in_head, within + 1)
    words = [env["descriptors"][env.program, entry, number] for number in range(ROW_WORDS)]
    low, high, stride = words[:3]
    low += jnp.where(of_head, (layers + within) * stride, 0)
    return Descriptor(ptx.Begin(low, high, stride), *words[3:7]), layer
