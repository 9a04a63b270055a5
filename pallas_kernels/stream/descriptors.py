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
from collections.abc import Callable, Sequence
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


class _Table(NamedTuple):
    """The rows of the table: each is one tile's, and all numbers of it are arrays `[rows]`."""

    entry: Array  # int32, a row's number
    segments: list[Segment]
    parts: list[SegmentPlan]  # theirs
    firsts: list[int]  # the row of each segment's first tile
    beyond: list[Array]  # bool: whether a row is of the second segment or a later one, and so on

    @classmethod
    def of_plan(cls, plan: StreamPlan) -> _Table:
        """Row 0 is the embedding's, which is empty: it counts as the first segment's."""
        entry = iota((next_power_of_2(descriptor_rows(plan)),), 0)
        segments = sorted(plan.segments)
        parts = [plan.segments[s] for s in segments]
        firsts = [1]
        for part in parts[:-1]:
            firsts.append(firsts[-1] + part.tiles)
        return cls(entry, segments, parts, firsts, [entry >= first for first in firsts[1:]])

    def of(self, values: Sequence[Array | int]) -> Array:
        """Of each row its segment's value: int32."""
        return jnp.broadcast_to(pick(self.beyond, values), self.entry.shape)

    def each(self, value: Callable[[SegmentPlan], Array | int]) -> Array:
        """Likewise, of each segment's plan."""
        return self.of([value(part) for part in self.parts])

    def each_segment(self, value: Callable[[Segment, SegmentPlan], Array | int]) -> Array:
        """Likewise, of each segment and its plan."""
        return self.of([value(s, p) for s, p in zip(self.segments, self.parts, strict=True)])


class _Tiles(NamedTuple):
    """Which part of its matrix each tile is: int32 `[rows]`."""

    number: Array  # of the tile, among this program's of the segment; negative: the embedding's
    outputs: Array  # rows of the matrix; of two halves that lie apart, those of one
    row: Array  # the first of them
    begin_row: Array  # where layer 0's would be: the head's tiles count as layers
    column: Array  # the first input


def _tiles(env: StreamEnv, table: _Table) -> _Tiles:
    """Which rows and inputs of the matrices this program's tiles have.

    Groups of rows are dealt out to the teams in turn, `run` neighbouring ones at a time.
    """
    d, parts = env.dims, table.parts
    number, of_head = table.entry - table.of(table.firsts), table.beyond[-1]
    # Two rows are the head's: that of all tiles but the last one, and that of the last one.
    head = parts[Segment.HEAD]
    number = jnp.where(of_head & (number > 0), head.tiles - 1, number)
    team = table.each(lambda p: team_of(env, p))
    run = table.each(lambda p: p.run)
    turn = lax.div(number, run)
    group = (team + turn * table.each(lambda p: p.teams)) * run + number - turn * run
    outputs = table.each_segment(lambda s, p: p.rows // 2 if is_paired(s) else p.rows)
    row = group * outputs
    # A group of queries, keys and values has rows of a head's first half. After the last group of a
    # head, the next one's rows come after the head's second half.
    qkv, half_head = parts[Segment.QKV], d.head_dim // 2
    heads_before = lax.div(jnp.maximum(group, 0), jnp.int32(d.head_dim // qkv.rows))
    row += table.of([heads_before * half_head, *([0] * (len(parts) - 1))])
    # The head's tiles count as layers L, L + 1 and so on. Layer 0's would lie L tiles before them.
    apart = _rows_apart(head)
    begin_row = jnp.where(of_head, team * outputs - d.num_layers * apart, row)
    part_of_inputs = env.program - team * table.each(lambda p: p.splits)
    column = part_of_inputs * table.each(lambda p: p.width)
    return _Tiles(number, outputs, row, begin_row, column)


def _rows_apart(head: SegmentPlan) -> int:
    """Rows from one of a program's tiles of the head to the next one."""
    return head.teams * head.rows


def make_descriptors(env: StreamEnv, table: Array) -> None:
    """Works out the table's rows of this program.

    Args:
        env: the program's view.
        table: int32 scalar, where the table begins in shared memory. Interpreted, it is the
            array `descriptors`.
    """
    rows = _Table.of_plan(env.plan)
    words = _words(env, rows, _tiles(env, rows))
    count = descriptor_rows(env.plan)
    if env.interpret:
        for number, word in enumerate(words):
            place = env["descriptors"].at[env.program, rows.entry, number]
            access.store(place, word, mask=rows.entry < count)
        return
    for first in range(0, len(words), ROW_WORDS):
        at = table + 4 * (rows.entry * len(words) + first)
        ptx.write_row(at, words[first : first + ROW_WORDS], rows.entry < count)
    access.meet()


def _words(env: StreamEnv, table: _Table, tiles: _Tiles) -> list[Array]:
    """What the table says: of weights 8 words, see `Descriptor`; of their scales 8 more."""
    plan, parts, head = env.plan, table.parts, table.parts[Segment.HEAD]
    # Where a tile begins, in units of 16 bytes.
    inner = table.each(lambda p: _units(p.inner * p.bits))
    start = tiles.begin_row * inner
    start += lax.div(tiles.column * table.each(lambda p: p.bits), jnp.int32(8 * READ))
    weights = weights_of(env)
    strides = _strides(weights, _units(_rows_apart(head) * head.inner * head.bits))
    begin = ptx.begin_words(
        weights[0], weights, strides, table.beyond, start, unit=READ, interpret=env.interpret
    )
    # How many rows there are, from the first one on, and how many inputs. All groups of a head are
    # whole.
    out = table.of([env.dims.qkv_dim, *(p.out for p in parts[1:])])
    there = jnp.clip(out - tiles.row, 0, tiles.outputs)
    width = table.each(lambda p: p.width)
    width = jnp.minimum(width, table.each(lambda p: p.inner) - tiles.column)
    # How many copies: a copy a row where the inputs are split; two where a tile's halves lie apart
    # in the matrix, or are to lie apart in the slot; else one.
    paired = table.each_segment(lambda s, _: int(is_paired(s))) != 0
    split = table.each(lambda p: int(p.splits > 1)) != 0
    halved = [_is_halved(s, p.gap) for s, p in zip(table.segments, parts, strict=True)]
    apart = [_is_halved(s, p.scale_gap) for s, p in zip(table.segments, parts, strict=True)]
    second = _second_halves(env, table, any(halved) or any(apart))
    busy = (tiles.number >= 0) & (tiles.number < table.each(lambda p: busy_tiles(env, p)))
    count = jnp.where(split, there, jnp.where(paired, 2, 1))
    pitch = table.each_segment(
        lambda s, p: p.row_bytes * (p.rows // 2 if is_paired(s) or p.gap else 1) + p.gap
    )
    of_copy = there
    if any(halved):
        is_halved = table.of([int(x) for x in halved]) != 0
        count = jnp.where(is_halved, 2, count)
        of_copy = jnp.where(is_halved, lax.div(there, jnp.int32(2)), there)
    stride = jnp.where(split, inner, second * inner)
    row_bytes = lax.div(width * table.each(lambda p: p.bits), jnp.int32(8))
    size = row_bytes * jnp.where(split, 1, of_copy)
    copies = jnp.where(busy & (there > 0), count, 0)
    box = _box_word(plan, split & (copies > 0), tiles.row, tiles.column)
    words = [*begin, stride, size, copies, pitch, box]
    assert len(words) == ROW_WORDS
    if not plan.quantized:
        return words
    if any(apart):
        halves = lax.div(there, jnp.int32(2))
        there = jnp.where(table.of([int(x) for x in apart]) != 0, halves, there)
    return [*words, *_scale_words(env, table, tiles.begin_row, second, there, copies)]


def _is_halved(segment: Segment, gap: int) -> bool:
    """Whether rows that are neighbours come in two halves, for there is a gap in the slot."""
    return gap > 0 and not is_paired(segment)


def _second_halves(env: StreamEnv, table: _Table, neighbours_too: bool) -> Array:
    """Rows of the matrix from a tile's first half to its second one: int32 `[rows]`.

    Args:
        env: the program's view.
        table: the table's rows.
        neighbours_too: whether halves that are neighbours may come apart.
    """
    parts, between = table.parts, {Segment.QKV: env.dims.head_dim // 2}
    between[Segment.GATE_UP] = env.dims.ffw_dim
    of_neighbours = [part.rows // 2 if neighbours_too else 0 for part in parts]
    pairs = zip(table.segments, of_neighbours, strict=True)
    return table.of([between.get(segment, rows) for segment, rows in pairs])


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
    table: _Table,
    row: Array,
    second: Array,
    there: Array,
    copies: Array,
) -> list[Array]:
    """What the table says of the tiles' scales: of whole rows, also where the inputs are split.

    Args:
        env: the program's view.
        table: the table's rows.
        row: `_Tiles.begin_row`.
        second: rows from a pair's first half to the second.
        there: rows of a copy of weights, where these are not split.
        copies: of weights; 0 for an empty tile.
    """
    parts, whole = table.parts, env.plan.scale_unit
    unit = jnp.int32(whole)
    pairs = list(zip(table.segments, parts, strict=True))

    def array_of(segment: Segment) -> Any:
        # Of what has no scales, nothing is copied.
        quantized = env.segment(segment).bits != 16
        return scales_of(env, segment) if quantized else env[segment.matrix]

    # All tiles of a run have the scales of all its rows, or each those of its own.
    shared = [p.scaled_rows > p.rows for p in parts]
    each = [p.scaled_rows if more else 1 for p, more in zip(parts, shared, strict=True)]
    row = row - lax.rem(row, table.of(each))
    there = table.of(
        [p.scaled_rows if more else there for p, more in zip(parts, shared, strict=True)]
    )
    arrays = [array_of(segment) for segment in table.segments]
    sizes = table.each(lambda p: p.scale_bytes)
    start, base = lax.div(row * sizes, unit), weights_of(env)[0]
    head = parts[Segment.HEAD]
    strides = _strides(arrays, _rows_apart(head) * head.scale_bytes // whole, whole)
    begin = ptx.begin_words(
        base, arrays, strides, table.beyond, start, unit=whole, interpret=env.interpret
    )
    # Whole units: one that holds a scale lies in the array.
    size = lax.div(there * sizes + (whole - 1), unit) * whole
    most = table.each_segment(lambda s, p: (1 + (is_paired(s) or p.scale_gap > 0)) * (p.bits != 16))
    # Where weights come in one copy, scales may come in two.
    if any(p.scale_gap and not (p.gap or is_paired(s)) for s, p in pairs):
        copies = jnp.where(copies > 0, jnp.maximum(copies, most), 0)
    pitch = size
    if any(p.scale_gap for p in parts):
        pitch = size + table.each(lambda p: p.scale_gap)
    place = table.each(lambda p: p.weight_bytes)
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
