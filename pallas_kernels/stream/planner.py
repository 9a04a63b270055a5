"""The planner: cuts a step of given sizes for a given GPU."""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.dims import Dims, ceil_div, next_power_of_2
from pallas_kernels.gpu import INTERPRETER, Gpu
from pallas_kernels.stream.layout import SharedLayout
from pallas_kernels.stream.plan import (
    COLUMNS,
    LINE,
    LOT,
    MAX_PIECES,
    MAX_PROGRAMS,
    MAX_ROWS,
    MAX_SLOTS,
    MAX_SPLITS,
    MIN_FLUSH,
    MIN_SPAN,
    PIECE,
    RESERVED_TILE,
    AttentionPlan,
    Segment,
    SegmentPlan,
    StreamPlan,
)
from pallas_kernels.stream.tuning import Tuning

__all__ = ["COMPILER_BYTES", "make_stream_plan", "splits_of", "why_not", "why_not_on"]

DEFAULT = Tuning()
# Shared memory that the compiler takes for itself, at most.
COMPILER_BYTES = 6 * 1024


class _Geometry:
    """Of tiles, whatever the device."""

    def __init__(self, dims: Dims, tuning: Tuning):
        self.batch = 1 if dims.batch == 1 else COLUMNS
        line = LINE * (COLUMNS if self.batch == 1 else 1)
        widest = max(dims.model_dim, dims.attn_dim)
        most = MAX_PIECES if self.batch == 1 else 2 * MAX_PIECES
        # Of several sequences each thread has 8 times as much to collect.
        warps = 4 if self.batch == 1 or ceil_div(widest, 4 * line) <= MAX_PIECES // 2 else 8
        self.product_warps = warps
        # Those beyond feed the ring meanwhile.
        self.num_warps = max(warps, tuning.num_warps or warps)
        self.unit = warps * line  # inputs of one piece of every thread
        self.pieces = ceil_div(widest, self.unit)
        self.most = most
        self.rows = self._rows(dims, self.pieces * self.unit, tuning)
        # The down projection's inputs are split where threads, or tiles of two rows, have no room.
        room = max(self.pieces, 4)
        if self.batch == 1:
            room = max(1, min(MAX_PIECES // 2, tuning.tile_bytes // (2 * 2 * self.unit)))
        self.splits = ceil_div(dims.ffw_dim, room * self.unit)
        self.width = ceil_div(ceil_div(dims.ffw_dim, self.splits), PIECE) * PIECE
        self.down_pieces = ceil_div(self.width, self.unit)
        self.down_rows = min(self.rows, self._rows(dims, self.down_pieces * self.unit, tuning))

    def _rows(self, dims: Dims, span: int, tuning: Tuning) -> int:
        """Rows of a tile: whole pairs, of RoPE, and of gate and up, of one head."""
        rows = 2
        limit = MAX_ROWS if self.batch == 1 else COLUMNS
        while 2 * rows <= limit and 4 * rows * span <= tuning.tile_bytes:
            if dims.head_dim % (2 * rows):
                break
            rows *= 2
        return rows


def splits_of(dims: Dims, tuning: Tuning = DEFAULT) -> int:
    """Parts that the down projection's inputs are cut into."""
    return _Geometry(dims, tuning).splits


def why_not(dims: Dims, programs: int, tuning: Tuning = DEFAULT) -> str | None:
    """Why these sizes cannot be streamed, as a sentence; None if they can."""
    geometry = _Geometry(dims, tuning)
    if geometry.pieces > geometry.most:
        return (
            f"The streamed kernel holds at most {geometry.most * geometry.unit} activations of "
            f"each of {dims.batch} sequences in place; this model has "
            f"{max(dims.model_dim, dims.attn_dim)}. Take the phased kernel."
        )
    if geometry.splits > programs:
        return (
            f"The streamed kernel splits {dims.ffw_dim} hidden activations among "
            f"{geometry.splits} programs; this GPU has {programs}. Take the phased kernel."
        )
    if odd := [n for n in (dims.model_dim, dims.attn_dim, dims.ffw_dim) if n % PIECE]:
        return (
            f"The streamed kernel copies rows of weights of whole {PIECE} elements; this model "
            f"has rows of {odd[0]}. Take the phased kernel."
        )
    return None


def why_not_on(gpu: Gpu, dims: Dims, tuning: Tuning = DEFAULT) -> str | None:
    """Why these sizes cannot be streamed on a GPU, as a sentence; None if they can."""
    if (reason := _why_not_there(gpu) or why_not(dims, gpu.cores, tuning)) is not None:
        return reason
    # Interpreted, no shared memory is taken.
    return None if gpu == INTERPRETER else make_stream_plan(dims, gpu, tuning).why_no_room


def _why_not_there(gpu: Gpu) -> str | None:
    if gpu.cores > MAX_PROGRAMS:
        return (
            f"The programs of a streamed step hand over what is theirs in at most {MAX_PROGRAMS} "
            f"places; this GPU has {gpu.cores} multiprocessors, a program each. Take the phased "
            "kernel."
        )
    if float(gpu.capability) < 9:
        return (
            "Weights are streamed by an instruction of compute capability 9.0 and newer; "
            f"this GPU has {gpu.capability}. Take the phased kernel."
        )
    return None


@functools.lru_cache
def make_stream_plan(dims: Dims, gpu: Gpu, tuning: Tuning = DEFAULT) -> StreamPlan:
    """The plan for a streamed step of these sizes on a GPU.

    Args:
        dims: the sizes.
        gpu: the device.
        tuning: what may be chosen freely.

    Raises:
        ValueError: the sizes cannot be streamed there; see `why_not_on`.
    """
    d, programs = dims, gpu.cores
    if (reason := _why_not_there(gpu) or why_not(dims, programs, tuning)) is not None:
        raise ValueError(reason)
    g = _Geometry(dims, tuning)

    def segment(out: int, inner: int, outputs: int = g.rows) -> SegmentPlan:
        groups = ceil_div(out, outputs)
        return SegmentPlan(
            out=out,
            inner=inner,
            rows=g.rows,
            pieces=g.pieces,
            groups=groups,
            splits=1,
            width=inner,
            teams=programs,
            run=1,
            tiles=ceil_div(groups, programs),
        )

    # Whoever computes whole rows of the down projection owns them: it has a group's tiles in
    # a row. Split, they are dealt out tile by tile.
    whole = ceil_div(d.model_dim, g.rows)
    a_group = g.rows // g.down_rows
    groups = whole * a_group
    teams = programs // g.splits
    tiles = ceil_div(groups, teams) if g.splits > 1 else ceil_div(whole, programs) * a_group
    down = SegmentPlan(
        out=d.model_dim,
        inner=d.ffw_dim,
        rows=g.down_rows,
        pieces=g.down_pieces,
        groups=groups,
        splits=g.splits,
        width=g.width,
        teams=teams,
        run=a_group if g.splits == 1 else 1,
        tiles=tiles,
    )
    segments = {
        Segment.QKV: segment(d.qkv_dim, d.model_dim),
        Segment.ATTN_OUT: segment(d.model_dim, d.attn_dim),
        # A group holds half its rows of the gate and the same rows of the up projection.
        Segment.GATE_UP: segment(d.ffw_dim, d.model_dim, g.rows // 2),
        Segment.DOWN: down,
        Segment.HEAD: segment(d.vocab_size, d.model_dim),
    }
    owned = next_power_of_2(ceil_div(ceil_div(d.model_dim, g.rows), programs))
    # What is rotated, and what is added to the residual, is made use of at once.
    flush = next_power_of_2(max(MIN_FLUSH, owned, segments[Segment.QKV].tiles))
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
        slot_bytes=2 * max(p.rows * p.width for p in segments.values()),
        room=0,
        tail_bytes=2 * max(p.pieces * g.unit - p.width for p in segments.values()),
        flush=flush,
        padded_batch=g.batch,
        rows=g.rows,
        segments=segments,
        attention=_attention(d, gpu, g.num_warps, tuning),
        owned=owned,
        tuning=tuning,
    )
    # What lies beside the slots; of their barriers there is an even number.
    room = taken * RESERVED_TILE - COMPILER_BYTES - SharedLayout.of(plan).size - 8
    slots = max(2, min(MAX_SLOTS, room // (plan.slot_bytes + 8)))
    return dataclasses.replace(plan, slots=min(tuning.slots or slots, slots), room=room)


def _attention(d: Dims, gpu: Gpu, num_warps: int, tuning: Tuning) -> AttentionPlan:
    # Of keys and values; where room is scarce, half.
    size = min(tuning.cache_tile_bytes, 32 * 1024 if gpu.shared_memory >= 128 * 1024 else 16 * 1024)
    block = min(128, size // (4 * d.head_dim))
    lots = ceil_div(d.q_per_kv, LOT)
    splits = max(1, min(MAX_SPLITS, gpu.cores // d.num_kv_heads))
    splits = 1 << (splits.bit_length() - 1)
    return AttentionPlan(
        block=block,
        min_span=MIN_SPAN,
        max_splits=splits,
        lots=lots,
        warps=min(num_warps, block // 8),
        tiles=tuning.cache_tiles,
    )
