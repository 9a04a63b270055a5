"""The plan of a streamed step: the tiles, the segments, and each program's share of them.

A *tile* is some rows of a weight matrix by a *span* of their inputs. Its products are those of
16 x 8 x 16 blocks on tensor cores. A single sequence has one column of activations: its span is
cut into 8 *chunks*, which become the block's 8 columns and 8 of its rows, and of the product
the entries where both mean the same chunk are summed. Several sequences are the columns
themselves. The span's inputs are shared out among the threads of a program, see `lanes`.

A *segment* is a mat-vec's part of the stream. Its rows are dealt out in groups, one tile
each. Where a mat-vec has more inputs than its span, they are split among teams of programs, and
the partial sums of a row are added up by the program that owns the row.
"""

from __future__ import annotations

import dataclasses
import enum
import functools

from pallas_kernels.dims import Dims, ceil_div, next_power_of_2
from pallas_kernels.gpu import INTERPRETER, Gpu
from pallas_kernels.plan import AttentionPlan
from pallas_kernels.stream.tuning import Tuning

__all__ = [
    "Segment",
    "SegmentPlan",
    "StreamPlan",
    "compiler_bytes",
    "make_stream_plan",
    "splits_of",
    "why_not",
    "why_not_on",
]

DEFAULT = Tuning()
# Columns of a tensor core's block: several sequences are padded to as many.
COLUMNS = 8
# Inputs that a thread reads at once: 16 bytes.
PIECE = 8
# Threads that read one row's, or chunk's, inputs: 4 pieces.
LINE = 4 * PIECE
# Pieces that a thread holds of the operand: half of its 255 registers, packed in pairs.
MAX_PIECES = 16
MAX_ROWS = 16
MAX_SLOTS = 16
MIN_FLUSH = 8
# One on each of 320 multiprocessors: the mail, made before the device is known, has room for them.
MAX_PROGRAMS = 320
# Spans that attention over one head is cut into at most.
MAX_SPLITS = 64
# Elements of one tile of keys or values.
ATTENTION_TILE = 8192
# The compiler's own tile of the ring's stand-in, bytes: see `ring`.
RESERVED_TILE = 32 * 1024


class Segment(enum.IntEnum):
    """The segments in the order of the stream; those with weights have their array's number."""

    QKV = 0
    ATTN_OUT = 1
    GATE_UP = 2
    DOWN = 3
    HEAD = 4
    EMBED = 5


LAYER_SEGMENTS = (Segment.QKV, Segment.ATTN_OUT, Segment.GATE_UP, Segment.DOWN)


@dataclasses.dataclass(frozen=True)
class SegmentPlan:
    """One mat-vec's part of the stream.

    Attributes:
        out: rows of the matrix.
        inner: inputs of the matrix.
        rows: rows of a tile.
        pieces: pieces of the span that a thread holds.
        groups: groups of rows, a tile each.
        splits: parts the inputs are cut into; program p works on part `p % splits`.
        width: inputs of a part.
        teams: programs, or teams of them, that groups are dealt out to in turn.
        run: neighbouring groups that are dealt out together.
        tiles: tiles of a program; its last ones may lie beyond the groups, and are then empty.
    """

    out: int
    inner: int
    rows: int
    pieces: int
    groups: int
    splits: int
    width: int
    teams: int
    run: int
    tiles: int

    @property
    def run_rows(self) -> int:
        """Rows of the groups that are dealt out together."""
        return self.rows * self.run


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """Everything about a streamed step that is decided before it is traced.

    Attributes:
        dims: the sizes.
        programs: P, the grid.
        resident: programs that can be on the device at once.
        num_warps: warps of a program.
        product_warps: of them those that multiply, from the first on.
        num_stages: for the compiler, by which it takes nearly all shared memory: see `ring`.
        slots: tiles that shared memory holds.
        in_flight: tiles that are asked for and have not come, at most.
        slot_bytes: bytes of a slot of the ring.
        room: bytes that there are for the slots.
        tail_bytes: bytes that reading a whole span goes beyond a slot's last row.
        flush: tiles whose products are summed up and made use of together, at most.
        padded_batch: Bp, 1, or 8 for several sequences.
        rows: rows of a tile, and of a group of the residual.
        segments: the mat-vecs, by `Segment`.
        attention: how attention is cut.
        owned: groups of the residual that one program owns at most.
        tuning: what was chosen freely.
    """

    dims: Dims
    programs: int
    resident: int
    num_warps: int
    product_warps: int
    num_stages: int
    slots: int
    in_flight: int
    slot_bytes: int
    room: int
    tail_bytes: int
    flush: int
    padded_batch: int
    rows: int
    segments: dict[Segment, SegmentPlan]
    attention: AttentionPlan
    owned: int
    tuning: Tuning

    def __hash__(self) -> int:
        return hash((self.dims, self.programs, self.tuning))

    @property
    def why_no_room(self) -> str | None:
        """Why two tiles do not fit in shared memory, as a sentence; None if they do."""
        if self.slots * (self.slot_bytes + 8) <= self.room:
            return None
        return (
            f"A stream has a tile in flight while another is used: two tiles of {self.slot_bytes} "
            f"bytes do not fit in the {max(self.room, 0)} bytes of shared memory that are left for "
            "them. Take a tuning with smaller tiles, or the phased kernel."
        )

    @property
    def chunked(self) -> bool:
        """Whether the columns of a product are chunks of one sequence."""
        return self.padded_batch == 1

    @property
    def threads(self) -> int:
        """Threads of a program."""
        return 32 * self.num_warps

    @property
    def line(self) -> int:
        """Inputs that a warp reads at once of a row."""
        return LINE * (COLUMNS if self.chunked else 1)

    def span(self, segment: Segment) -> int:
        """Inputs of a segment's tile, those that are padding included."""
        return self.segments[segment].pieces * self.product_warps * self.line

    def products_bytes(self, segment: Segment) -> int:
        """Bytes of a tile's products, not summed up yet: float32, `COLUMNS` a row and warp.

        With 16 bytes between them, the same rows of several tiles lie in different banks.
        """
        return 4 * COLUMNS * self.product_warps * self.segments[segment].rows + 16

    def flushed(self, segment: Segment) -> int:
        """Tiles of a segment, or groups of the residual, that are made use of together."""
        if segment in (Segment.ATTN_OUT, Segment.EMBED):
            return self.owned
        if segment == Segment.DOWN and self.segments[segment].splits == 1:
            return self.owned
        return min(self.flush, next_power_of_2(self.segments[segment].tiles))

    @property
    def ragged(self) -> bool:
        """Whether some tile's rows are shorter than its span."""
        return any(p.width != self.span(s) or p.inner % p.width for s, p in self.segments.items())

    @property
    def layer_tiles(self) -> int:
        """Tiles of a program in one layer."""
        return sum(self.segments[s].tiles for s in LAYER_SEGMENTS)

    def first_tile(self, segment: Segment, layer: int) -> int:
        """Number of a segment's first tile in the whole step; the head's layer is L."""
        if segment == Segment.EMBED:
            return 0
        before = (s for s in LAYER_SEGMENTS if s < segment and layer < self.dims.num_layers)
        return 1 + layer * self.layer_tiles + sum(self.segments[s].tiles for s in before)

    @property
    def total_tiles(self) -> int:
        """Tiles of a program in the whole step; the first is the embedding's, and empty."""
        return 1 + self.dims.num_layers * self.layer_tiles + self.segments[Segment.HEAD].tiles


class _Geometry:
    """Of tiles, whatever the device."""

    def __init__(self, dims: Dims, tuning: Tuning):
        self.batch = 1 if dims.batch == 1 else COLUMNS
        line = LINE * (COLUMNS if self.batch == 1 else 1)
        widest = max(dims.model_dim, dims.attn_dim)
        most = MAX_PIECES if self.batch == 1 else 2 * MAX_PIECES
        warps = 4
        while ceil_div(widest, warps * line) > most // 2 and self.batch > 1 and warps < 8:
            warps *= 2
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


def compiler_bytes(dims: Dims) -> int:
    """Shared memory that the compiler takes for itself, at most; attention takes the most.

    A tile of keys or values, 16 queries and their weights over the tile, each as two bfloat16.
    """
    block = max(16, ATTENTION_TILE // dims.head_dim)
    return 2 * ATTENTION_TILE + 2 * 2 * 16 * (dims.head_dim + block) + 1024


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
    products = (4 * COLUMNS * g.product_warps * g.rows + 16 * down.run) * flush
    slot_bytes = 2 * max(p.rows * p.width for p in segments.values())
    tail_bytes = 2 * max(p.pieces * g.unit - p.width for p in segments.values())
    taken = gpu.shared_memory // RESERVED_TILE
    free = taken * RESERVED_TILE - compiler_bytes(d) - tail_bytes - products - 256
    # The route, 8 words a tile, see `route`.
    free -= 32 * (1 + sum(p.tiles for p in segments.values()))
    slots = max(2, min(MAX_SLOTS, free // (slot_bytes + 8)))
    parts = max(1, min(MAX_SPLITS, programs // d.num_kv_heads))
    return StreamPlan(
        dims=dims,
        programs=programs,
        # A program's tiles in flight take most of a multiprocessor's shared memory.
        resident=programs,
        num_warps=g.num_warps,
        product_warps=g.product_warps,
        num_stages=taken + 1,
        slots=min(tuning.slots or slots, slots),
        in_flight=tuning.in_flight,
        slot_bytes=slot_bytes,
        room=free,
        tail_bytes=tail_bytes,
        flush=flush,
        padded_batch=g.batch,
        rows=g.rows,
        segments=segments,
        attention=AttentionPlan(
            block=max(16, ATTENTION_TILE // d.head_dim),
            min_span=256,
            max_splits=1 << (parts.bit_length() - 1),
        ),
        owned=owned,
        tuning=tuning,
    )
