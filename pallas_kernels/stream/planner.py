"""The planner: cuts a step of given sizes for a given GPU."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from pallas_kernels.dims import Dims, Stored, WeightGroups, ceil_div, next_power_of_2
from pallas_kernels.gpu import INTERPRETER, Gpu
from pallas_kernels.stream.layout import ALIGNMENT, SharedLayout
from pallas_kernels.stream.plan import (
    COLUMNS,
    LOT,
    MAX_INTEGER_ROWS,
    MAX_PIECES,
    MAX_PROGRAMS,
    MAX_ROWS,
    MAX_SLOTS,
    MAX_SPLITS,
    MIN_FLUSH,
    MIN_SPLIT,
    PIECE,
    QUAD,
    READ,
    RESERVED_TILE,
    AttentionPlan,
    Segment,
    SegmentPlan,
    StreamPlan,
    grain_of,
    is_paired,
    line_of,
)
from pallas_kernels.stream.tuning import Tuning, tuning_for

__all__ = [
    "fitting",
    "make_stream_plan",
    "splits_of",
    "tuned",
    "why_not",
    "why_not_on",
]

DEFAULT = Tuning()
# Hand-overs after which the tags of queries, keys and values come round: they have 8 bits.
MOST_BETWEEN = 256
# What to do where a step cannot run fused.
_INSTEAD = "Use implementation='xla'."
# Bytes of tiles of weights, and of keys and values, that are tried in turn: see `fitting`.
_SHRINKING = [
    (1 << a, 1 << b) for a, b in ((15, 15), (15, 14), (15, 13), (14, 14), (14, 13), (13, 13))
]


class _Geometry:
    """Of tiles, whatever the device."""

    def __init__(self, dims: Dims, tuning: Tuning, unit: int = READ, *, whole: bool = False):
        """Cuts.

        Args:
            dims: the sizes.
            tuning: what may be chosen freely.
            unit: `Gpu.copied_bytes`, by which scales are copied.
            whole: whether rows are never split: interpreted, a program is alone, and threads hold
                whatever they are given.
        """
        self.dims, self.tuning, self.scale_unit, self.whole = dims, tuning, unit, whole
        self.columns = 1 if dims.columns == 1 else COLUMNS
        self.widest = max(dims.model_dim, dims.attn_dim)
        self.most = MAX_PIECES if self.columns == 1 else 2 * MAX_PIECES
        # Of several sequences each thread has 8 times as much to collect.
        few = ceil_div(self.widest, 4 * QUAD * PIECE) <= MAX_PIECES // 2
        self.product_warps = 4 if self.columns == 1 or few else 8
        # Those beyond feed the ring meanwhile.
        self.num_warps = max(self.product_warps, tuning.num_warps or self.product_warps)
        self.rows = self.rows_of(dims.stored("attn_out"), paired=False)
        self._cut_down()

    def grain(self, stored: Stored) -> int:
        """Neighbouring inputs that a thread reads at once."""
        return grain_of(self.columns == 1, stored)

    def unit(self, stored: Stored) -> int:
        """Inputs of one read of every thread."""
        return self.product_warps * line_of(self.columns == 1, stored.bits) * self.grain(stored)

    def held(self, stored: Stored) -> int:
        """Inputs of a read whose activations a thread waits for."""
        grain = self.grain(stored)
        return grain // 2 if self.columns == 1 and stored.bits != 16 else grain

    def reads(self, stored: Stored) -> int:
        """Of a row of the model's width, by a thread."""
        return ceil_div(self.widest, self.unit(stored))

    def rows_of(self, stored: Stored, *, paired: bool) -> int:
        """Rows of a tile of the model's width.

        Args:
            stored: how the matrix is.
            paired: whether half of its rows lie elsewhere: see `is_paired`.
        """
        rows = self._rows(stored, self.reads(stored))
        # Scales are copied by whole units: those of neighbouring rows are such.
        size = stored.scale_bytes(self.dims.model_dim)
        while rows // (2 if paired else 1) * size % self.scale_unit and rows < MAX_ROWS:
            rows *= 2
        return rows

    def gap(self, stored: Stored, rows: int, *, whole: bool) -> int:
        """Bytes between the halves of a tile's rows.

        Rows begin in the same bank; where threads read those of both halves at once, half a read
        lies between them. See `ptx.chunk_groups`.

        Args:
            stored: how the matrix is.
            rows: of a tile.
            whole: whether all tiles have as many, and inputs are not split.
        """
        apart = self.columns == 1 and stored.fine and stored.bits == 4
        return READ if apart and whole and rows > 1 else 0

    def scale_gap(self, stored: Stored, rows: int, size: int, *, whole: bool) -> int:
        """Bytes between the scales of the halves of a tile's rows.

        Of 16 rows threads read those of 8 at once, which begin in the same bank. Pairs of numbers
        are read by half of the threads at a time, those of 4 rows.

        Args:
            stored: how the matrix is.
            rows: of a tile.
            size: inputs of a row.
            whole: as of `gap`.
        """
        if self.columns > 1 or not (whole and stored.fine and rows == MAX_ROWS):
            return 0
        assert stored.groups is not None
        units = rows // 2 * stored.scale_bytes(size) % self.scale_unit == 0
        return READ if units and stored.groups.offset is None else 0

    def _cut_down(self) -> None:
        """The down projection's inputs are split where threads, or tiles, have no room."""
        stored, size = self.dims.stored("down"), self.dims.ffw_dim
        bits, unit, pieces = stored.bits, self.unit(stored), self.held(stored) // PIECE
        room = max(self.reads(stored), ceil_div(4, pieces))
        if self.columns == 1:
            # Integers leave room for twice as many: their rows are shorter.
            held = (MAX_PIECES // 2 if bits == 16 else MAX_PIECES) // pieces
            room = max(1, min(held, self.tuning.tile_bytes // (2 * unit * bits // 8)))
        if self.whole:
            room = max(room, ceil_div(size, unit))
        self.splits = ceil_div(size, room * unit)
        # Words of the inputs that a warp reads at once lie in the order of its loads; and of int4
        # weights there are whole groups.
        whole = PIECE if self.splits == 1 else unit // self.product_warps
        self.width = ceil_div(ceil_div(size, self.splits), whole) * whole
        self.splits = ceil_div(size, self.width)
        self.down_reads = ceil_div(self.width, unit)
        self.down_rows = min(self.rows, self._rows(stored, self.down_reads))
        if self.splits > 1:
            self.down_rows = self.most_rows(stored, self.down_reads, self.down_rows)
        if self.splits > 1 and stored.fine:
            # Scales come for whole rows, of which a part has few weights.
            row = self.width * bits // 8 + stored.scale_bytes(size)
            while (
                self.down_rows > COLUMNS and 4 * self.down_rows * row > 5 * self.tuning.tile_bytes
            ):
                self.down_rows //= 2
        # Where a tile's scales come without those of its run.
        scales = stored.scale_bytes(size)
        while self.splits > 1 and self.down_rows * scales % self.scale_unit:
            if self.down_rows >= self.rows:
                break
            self.down_rows *= 2

    def most_rows(self, stored: Stored, reads: int, rows: int) -> int:
        """Rows of a tile where a program has many: fewer tiles are fewer meetings of its warps.

        Args:
            stored: how the matrix is.
            reads: of a row, by a thread.
            rows: that a tile has elsewhere.
        """
        if self.columns == 1 or stored.bits == 16:
            return rows
        return self._grown(rows, MAX_INTEGER_ROWS, stored, reads)

    def _rows(self, stored: Stored, reads: int) -> int:
        """Rows of a tile: whole pairs, of RoPE, and of gate and up, of one head."""
        limit = COLUMNS if self.columns > 1 and stored.bits == 16 else MAX_ROWS
        of_a_head = self.dims.head_dim & -self.dims.head_dim  # the largest power of two in it
        return self._grown(2, min(limit, of_a_head), stored, reads)

    def _grown(self, rows: int, limit: int, stored: Stored, reads: int) -> int:
        """Rows of a tile, doubled up to a limit and as long as there is room."""
        row_bytes = reads * self.unit(stored) * stored.bits // 8
        while 2 * rows <= limit and 2 * rows * row_bytes <= self.tuning.tile_bytes:
            rows *= 2
        return rows


def splits_of(dims: Dims, tuning: Tuning = DEFAULT) -> int:
    """Parts that the down projection's inputs are cut into."""
    return _Geometry(dims, tuning).splits


def why_not(
    dims: Dims,
    programs: int,
    tuning: Tuning = DEFAULT,
    unit: int = READ,
    *,
    whole: bool = False,
) -> str | None:
    """Why no fused step has these sizes, as a sentence; None if one has.

    Args:
        dims: the sizes.
        programs: P.
        tuning: what may be chosen freely.
        unit: `Gpu.copied_bytes` of the device.
        whole: whether the step is interpreted, where no rows are split.
    """
    geometry = _Geometry(dims, tuning, unit, whole=whole)
    held = geometry.product_warps * line_of(geometry.columns == 1, 16) * PIECE * geometry.most
    if geometry.widest > held:
        return (
            f"The fused kernel holds at most {held} activations of "
            f"each of a step's {dims.columns} tokens in place; this model has "
            f"{max(dims.model_dim, dims.attn_dim)}. {_INSTEAD}"
        )
    if geometry.splits > programs:
        return (
            f"The fused kernel splits {dims.ffw_dim} hidden activations among "
            f"{geometry.splits} programs; this GPU has {programs}. {_INSTEAD}"
        )
    for name, inner in _inputs(dims).items():
        stored = dims.stored(name)
        grain = 8 * READ // stored.bits if stored.groups is None else stored.groups.size
        if inner % grain:
            return (
                f"The fused kernel copies rows of weights of whole {grain} elements, of "
                f"{stored.bits} bits each; this model's {name} has rows of {inner}. {_INSTEAD}"
            )
    if (gap := _longest_gap(dims.features.local_layers)) >= MOST_BETWEEN:
        return (
            "The fused kernel tells apart the queries and keys of layers that are less than "
            f"{MOST_BETWEEN} apart; from one layer of a kind, local or global, to the next one, "
            f"this model has up to {gap}. {_INSTEAD}"
        )
    segments = _segments(dims, programs, geometry)
    for name, (segment, part) in zip(_inputs(dims), segments.items(), strict=True):
        rows = part.scaled_rows // 2 if is_paired(segment) else part.scaled_rows
        if rows * part.scale_bytes % unit:
            return (
                f"The fused kernel copies scales by whole {unit} bytes; those of {rows} rows "
                f"of this model's {name}, which it copies at once, are "
                f"{rows * part.scale_bytes}. {_INSTEAD}"
            )
    return None


def _longest_gap(local_layers: tuple[bool, ...]) -> int:
    """Hand-overs from one layer of a kind, local or global, to the next one, at most.

    Also from the last one of a step to the first one of the next: the end of a step counts as one.
    """
    gaps = [0]
    for kind in set(local_layers):
        layers = [i for i, local in enumerate(local_layers) if local == kind]
        following = [*layers[1:], layers[0] + len(local_layers) + 1]
        gaps += [b - a for a, b in zip(layers, following, strict=True)]
    return max(gaps)


def _inputs(dims: Dims) -> dict[str, int]:
    """Inputs of each matrix, in the order of `Segment`."""
    d = dims.model_dim
    return {"qkv": d, "attn_out": dims.attn_dim, "gate_up": d, "down": dims.ffw_dim, "head": d}


def why_not_on(gpu: Gpu, dims: Dims, tuning: Tuning | None = None) -> str | None:
    """Why no fused step of these sizes runs on a GPU, as a sentence; None if one does.

    Args:
        gpu: the device.
        dims: the sizes.
        tuning: as in `make_stream_plan`.
    """
    tuning = tuning or fitting(dims, gpu)
    if (reason := _why_not_planned(dims, gpu, tuning)) is not None:
        return reason
    # Interpreted, no shared memory is taken.
    return None if gpu == INTERPRETER else make_stream_plan(dims, gpu, tuning).why_no_room


def _why_not_planned(dims: Dims, gpu: Gpu, tuning: Tuning) -> str | None:
    """Why there is no plan, whatever room there is; None if there is one."""
    whole = gpu == INTERPRETER
    return _why_not_there(gpu) or why_not(dims, gpu.cores, tuning, gpu.copied_bytes, whole=whole)


def _why_not_there(gpu: Gpu) -> str | None:
    if gpu.cores > MAX_PROGRAMS:
        return (
            f"The programs of the fused kernel hand over what is theirs in at most {MAX_PROGRAMS} "
            f"places; this GPU has {gpu.cores} multiprocessors, a program each. {_INSTEAD}"
        )
    return None


def _segments(d: Dims, programs: int, g: _Geometry) -> dict[Segment, SegmentPlan]:
    """How each mat-vec is cut and dealt out."""

    def segment(out: int, inner: int, kind: Segment) -> SegmentPlan:
        stored, paired = d.stored(kind.matrix), is_paired(kind)
        rows = g.rows_of(stored, paired=paired)
        if kind == Segment.GATE_UP:
            rows = g.most_rows(stored, g.reads(stored), rows)
        # A group of gate and up holds half its rows of each.
        of_each = rows // 2 if kind == Segment.GATE_UP else rows
        groups = ceil_div(out, of_each)
        return SegmentPlan(
            out=out,
            inner=inner,
            stored=stored,
            grain=g.grain(stored),
            rows=rows,
            reads=g.reads(stored),
            held=g.held(stored),
            groups=groups,
            splits=1,
            width=inner,
            teams=programs,
            run=1,
            tiles=ceil_div(groups, programs),
            scaled_rows=rows,
            gap=g.gap(stored, rows, whole=out % of_each == 0),
            scale_gap=g.scale_gap(stored, rows, inner, whole=out % of_each == 0),
        )

    # Whoever computes whole rows of the down projection owns them: it has a group's tiles in
    # a row. Split, they are dealt out tile by tile.
    whole = ceil_div(d.model_dim, g.rows)
    a_group = max(1, g.rows // g.down_rows)
    groups = ceil_div(d.model_dim, g.down_rows) if g.splits > 1 else whole * a_group
    teams = programs // g.splits
    tiles = ceil_div(groups, teams) if g.splits > 1 else ceil_div(whole, programs) * a_group
    of_down, run = d.stored("down"), a_group if g.splits == 1 else 1
    # Scales of small groups are many, and those of few rows whole units.
    own = of_down.fine and g.down_rows * of_down.scale_bytes(d.ffw_dim) % g.scale_unit == 0
    down = SegmentPlan(
        out=d.model_dim,
        inner=d.ffw_dim,
        stored=of_down,
        grain=g.grain(of_down),
        rows=g.down_rows,
        reads=g.down_reads,
        held=g.held(of_down),
        groups=groups,
        splits=g.splits,
        width=g.width,
        teams=teams,
        run=run,
        tiles=tiles,
        scaled_rows=g.down_rows * (1 if own else run),
        gap=g.gap(of_down, g.down_rows, whole=g.splits == 1 and d.model_dim % g.down_rows == 0),
        scale_gap=0,
    )
    return {
        Segment.QKV: segment(d.qkv_dim, d.model_dim, Segment.QKV),
        Segment.ATTN_OUT: segment(d.model_dim, d.attn_dim, Segment.ATTN_OUT),
        Segment.GATE_UP: segment(d.ffw_dim, d.model_dim, Segment.GATE_UP),
        Segment.DOWN: down,
        Segment.HEAD: segment(d.vocab_size, d.model_dim, Segment.HEAD),
    }


def _plan_with_room(dims: Dims, gpu: Gpu, tuning: Tuning) -> StreamPlan | None:
    """The plan of a tuning; None where shared memory has no room for it."""
    if _why_not_planned(dims, gpu, tuning) is not None:
        return None
    plan = make_stream_plan(dims, gpu, tuning)
    return plan if plan.why_no_room is None else None


@functools.lru_cache
def fitting(dims: Dims, gpu: Gpu) -> Tuning:
    """The defaults, with tiles so small that shared memory holds some of them.

    On a device with little shared memory fewer bytes need be on their way: those of all its
    multiprocessors have to last for the time that memory takes to answer, about a microsecond, and
    memory that is slow, or shared by many of them, brings less in it. Tiles of keys and values
    shrink first, since each tile of weights is a meeting of a program's warps, until three tiles of
    weights fit; else the largest are taken of which two do.

    Of several sequences, tiles are larger where only those have two hidden activations, which then
    share a word (`StreamPlan.half2`): bfloat16 rows of more than 4096 inputs. On an H200, 10 layers
    of Phi 4 took 2012 us with 8 sequences instead of 3092, and 1988 with 3 instead of 3646.

    Returns:
        The tuning; the smallest tiles where no choice fits.
    """
    found, planned = None, DEFAULT
    # Without bulk copies a warp that multiplies has to ask for tiles, and does so less often.
    others: dict[str, Any] = {} if gpu.bulk_copies else {"in_flight": 3, "l2_tiles": 0}
    if dims.columns > 1 and gpu.bulk_copies:
        usual = _plan_with_room(dims, gpu, DEFAULT)
        if usual is None or not usual.half2:
            larger = Tuning(tile_bytes=2 * DEFAULT.tile_bytes)
            wide = _plan_with_room(dims, gpu, larger)
            if wide is not None and wide.half2 and wide.slots > 2:
                return larger
    for tile_bytes, cache_tile_bytes in _SHRINKING:
        tuning = Tuning(tile_bytes=tile_bytes, cache_tile_bytes=cache_tile_bytes, **others)
        if _why_not_planned(dims, gpu, tuning) is not None:
            continue
        planned = tuning
        if (plan := _plan_with_room(dims, gpu, tuning)) is None:
            continue
        if plan.slots > 2:
            return tuning
        found = found or tuning
    return found or planned


def tuned(dims: Dims, gpu: Gpu) -> Tuning | None:
    """The tuning of the table's row for a GPU and these sizes; None: there is none.

    Rows are of the usual groups of int4. For other groups that of weights of as many bits is taken,
    unless their tiles have no room then.
    """
    found = tuning_for(gpu.name, dims)
    if found is None or dims.weight_groups == WeightGroups():
        return found
    return found if why_not_on(gpu, dims, found) is None else None


@functools.lru_cache
def make_stream_plan(dims: Dims, gpu: Gpu, tuning: Tuning | None = None) -> StreamPlan:
    """The plan for a fused step of these sizes on a GPU.

    Args:
        dims: the sizes.
        gpu: the device.
        tuning: what may be chosen freely; None: what `fitting` says.

    Raises:
        ValueError: no fused step of these sizes runs there; see `why_not_on`.
    """
    tuning = tuning or fitting(dims, gpu)
    d, programs = dims, gpu.cores
    if (reason := _why_not_planned(dims, gpu, tuning)) is not None:
        raise ValueError(reason)
    g = _Geometry(dims, tuning, gpu.copied_bytes, whole=gpu == INTERPRETER)
    segments = _segments(dims, programs, g)
    owned = next_power_of_2(ceil_div(ceil_div(d.model_dim, g.rows), programs))
    # What is rotated, and what is added to the residual, is made use of at once.
    least = MIN_FLUSH if g.product_warps * g.rows <= 64 else MIN_FLUSH // 2
    flush = next_power_of_2(max(least, owned, segments[Segment.QKV].tiles))
    taken = gpu.shared_memory // RESERVED_TILE
    plan = StreamPlan(
        dims=dims,
        programs=programs,
        # A program's tiles in flight take most of a multiprocessor's shared memory.
        resident=programs,
        num_warps=g.num_warps,
        product_warps=g.product_warps,
        num_stages=taken + 1,
        slots=0,
        in_flight=tuning.in_flight,
        slot_bytes=READ * max(ceil_div(p.tile_bytes, READ) for p in segments.values()),
        room=0,
        tail_bytes=max(
            p.reads * g.unit(p.stored) * p.bits // 8 - p.row_bytes for p in segments.values()
        ),
        flush=flush,
        padded_columns=g.columns,
        rows=g.rows,
        segments=segments,
        attention=_attention(d, gpu, g.num_warps, tuning),
        owned=owned,
        bulk=gpu.bulk_copies,
        scale_unit=gpu.copied_bytes,
        tuning=tuning,
    )
    if plan.box is not None:  # boxes come to such addresses alone
        aligned = ALIGNMENT * ceil_div(plan.slot_bytes, ALIGNMENT)
        plan = dataclasses.replace(plan, slot_bytes=aligned)
    # What lies beside the slots; of their barriers there is an even number.
    room = taken * RESERVED_TILE - plan.compiler_bytes - SharedLayout.of(plan).size - 8
    slots = max(2, min(MAX_SLOTS, room // (plan.slot_bytes + 8)))
    plan = dataclasses.replace(plan, slots=min(tuning.slots or slots, slots), room=room)
    # After slots of odd sizes, what follows begins at the next multiple of `ALIGNMENT`.
    while (over := SharedLayout.of(plan).size + plan.compiler_bytes - taken * RESERVED_TILE) > 0:
        if plan.slots == 2:
            left = min(room, 2 * (plan.slot_bytes + 8) - over)
            return dataclasses.replace(plan, room=left)
        plan = dataclasses.replace(plan, slots=plan.slots - 1)
    return plan


def _attention(d: Dims, gpu: Gpu, num_warps: int, tuning: Tuning) -> AttentionPlan:
    block = min(128, tuning.cache_tile_bytes // (4 * d.head_dim))
    warps = min(num_warps, block // 8)
    lots, abreast = ceil_div(d.queries, LOT), 1
    if d.tokens > 1:  # keys and values are read once for all queries, as far as warps go
        abreast = min(next_power_of_2(lots), warps)
    splits = max(1, min(MAX_SPLITS, gpu.cores // d.num_kv_heads))
    splits = 1 << (splits.bit_length() - 1)
    return AttentionPlan(
        block=block,
        min_split=MIN_SPLIT,
        max_splits=splits,
        lots=ceil_div(lots, abreast),
        abreast=abreast,
        warps=warps,
        tiles=tuning.cache_tiles,
    )
