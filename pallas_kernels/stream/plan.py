"""The plan of a streamed step: the tile, the segments, and each program's share of them.

A *tile* is `rows` rows of a weight matrix by `chunks` pieces of `depth` inputs, multiplied as
a `[rows * chunks, depth]` matrix with the operand's `chunks * B` columns; of the product, the
entries where both sides mean the same chunk are summed (see `pallas_kernels.plan`). All
tiles of a step have one shape, so that one loop streams them all.

A *segment* is a mat-vec's part of the stream. Its rows are dealt out in groups, one tile
each. Where a mat-vec has more inputs than a tile spans, its inputs are split among teams of
programs, and the partial sums of a row are added up by the program that owns the row.
"""

from __future__ import annotations

import dataclasses
import enum
import functools

from pallas_kernels.dims import Dims, ceil_div, next_power_of_2
from pallas_kernels.gpu import Gpu
from pallas_kernels.plan import AttentionPlan
from pallas_kernels.stream.tuning import Tuning

__all__ = [
    "Segment",
    "SegmentPlan",
    "StreamPlan",
    "make_stream_plan",
    "splits_of",
    "why_not",
]

DEFAULT = Tuning()
# Tensor cores multiply in steps of 16 along the inner dimension.
MIN_DEPTH = 16
# Every group holds whole pairs: of RoPE, and of gate and up.
MIN_ROWS = 2
# Columns of the operand: tensor cores have at least 8. Beyond 128 it leaves the tiles no room.
MIN_COLUMNS = 8
MAX_COLUMNS = 128
# Left beside tiles, operand and attention's tiles for small conversions.
RESERVED_SHARED_MEMORY = 3 * 1024
MAX_STAGES = 7
# Two on each of 160 multiprocessors: the mail, made before the device is known, has room for them.
MAX_PROGRAMS = 320
# Spans that attention over one head is cut into at most.
MAX_SPLITS = 64
# A multiprocessor has registers for so many warps of threads that use 255 each.
MAX_WARPS = 8
# Elements of one tile of keys or values, of the programs of a multiprocessor together.
ATTENTION_TILE = 8192


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
        groups: groups of rows, a tile each.
        splits: parts the inputs are cut into; program p works on part `p % splits`.
        width: inputs of a part.
        teams: groups that are worked on at the same time.
        tiles: tiles of a program; its last one may lie beyond the groups, and is then empty.
    """

    out: int
    inner: int
    groups: int
    splits: int
    width: int
    teams: int
    tiles: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """Everything about a streamed step that is decided before it is traced.

    Attributes:
        dims: the sizes.
        programs: P, the grid.
        resident: programs that can be on the device at once.
        num_warps: warps of a program.
        num_stages: tiles in flight, plus one.
        padded_batch: Bp, B rounded up to a power of two.
        rows: rows of a tile.
        chunks: pieces of inputs of a tile.
        depth: inputs of a piece.
        columns: columns of the operand, `chunks * Bp` or the fewest that tensor cores have.
        segments: the mat-vecs, by `Segment`.
        attention: how attention is cut.
        owned: groups of the residual that one program owns at most.
        tuning: what was chosen freely.
    """

    dims: Dims
    programs: int
    resident: int
    num_warps: int
    num_stages: int
    padded_batch: int
    rows: int
    chunks: int
    depth: int
    columns: int
    segments: dict[Segment, SegmentPlan]
    attention: AttentionPlan
    owned: int
    tuning: Tuning

    def __hash__(self) -> int:
        return hash((self.dims, self.programs, self.tuning))

    @property
    def layer_tiles(self) -> int:
        """Tiles of a program in one layer."""
        return sum(self.segments[s].tiles for s in LAYER_SEGMENTS)

    @property
    def total_tiles(self) -> int:
        """Tiles of a program in the whole step; the first is the embedding's, and empty."""
        return 1 + self.dims.num_layers * self.layer_tiles + self.segments[Segment.HEAD].tiles


def _geometry(dims: Dims, programs: int, tuning: Tuning = DEFAULT) -> tuple[int, int, int]:
    """Rows, chunks and depth of the tile."""
    widest = max(dims.model_dim, dims.attn_dim)
    depth = tuning.depth
    while depth > MIN_DEPTH and 8 * depth > next_power_of_2(widest):
        depth //= 2
    chunks = next_power_of_2(ceil_div(widest, depth))
    # A row's inputs are split among different programs.
    while ceil_div(dims.ffw_dim, chunks * depth) > programs:
        chunks *= 2
    return tuning.matrix_rows // chunks, chunks, depth


def splits_of(dims: Dims, programs: int) -> int:
    """Parts that the down projection's inputs are cut into."""
    _, chunks, depth = _geometry(dims, programs)
    return ceil_div(dims.ffw_dim, chunks * depth)


def why_not(dims: Dims, programs: int, tuning: Tuning = DEFAULT) -> str | None:
    """Why these sizes cannot be streamed, as a sentence; None if they can."""
    rows, chunks, depth = _geometry(dims, programs, tuning)
    bp = next_power_of_2(dims.batch)
    if rows < MIN_ROWS or chunks * bp > MAX_COLUMNS:
        limit = min(tuning.matrix_rows // MIN_ROWS, MAX_COLUMNS // bp) * depth
        return (
            f"The streamed kernel holds at most {limit} activations of each of {dims.batch} "
            f"sequences in place; this model has {max(dims.model_dim, dims.attn_dim)}. Take "
            "fewer sequences, or the phased kernel."
        )
    return None


def _stages(gpu: Gpu, tuning: Tuning, columns: int, depth: int) -> int:
    """As many stages as shared memory holds tiles of."""
    tile = 2 * tuning.matrix_rows * depth
    # From 16 columns on, tensor cores read the operand, and the tile, in shared memory.
    wide = columns >= 16
    # Keys and values pass through it too, though not while the operand is there.
    attention = 2 * 2 * ATTENTION_TILE // tuning.programs_per_core
    operand = 2 * columns * depth if wide else 0
    free = gpu.shared_memory // tuning.programs_per_core
    free -= max(attention, operand) + RESERVED_SHARED_MEMORY
    return max(2, min(MAX_STAGES, free // tile + (0 if wide else 1)))


@functools.lru_cache
def make_stream_plan(dims: Dims, gpu: Gpu, tuning: Tuning = DEFAULT) -> StreamPlan:
    """The plan for a streamed step of these sizes on a GPU.

    Args:
        dims: the sizes.
        gpu: the device.
        tuning: what may be chosen freely.

    Raises:
        ValueError: the sizes cannot be streamed; see `why_not`.
    """
    d, programs = dims, gpu.cores * tuning.programs_per_core
    if programs > MAX_PROGRAMS:
        raise ValueError(
            f"The programs of a streamed step hand over what is theirs in at most {MAX_PROGRAMS} "
            f"places; this plan has {programs} programs. Take fewer programs a multiprocessor."
        )
    if tuning.l2_tiles and float(gpu.capability) < 9:
        raise ValueError(
            "Tiles are asked for ahead by an instruction of compute capability 9.0 and newer; "
            f"this GPU has {gpu.capability}. Take a tuning with l2_tiles=0."
        )
    if (reason := why_not(dims, programs, tuning)) is not None:
        raise ValueError(reason)
    rows, chunks, depth = _geometry(dims, programs, tuning)
    bp = next_power_of_2(d.batch)
    columns = max(MIN_COLUMNS, chunks * bp)

    def segment(out: int, inner: int, rows_of_group: int = rows) -> SegmentPlan:
        splits = ceil_div(inner, chunks * depth)
        teams = programs // splits
        groups = ceil_div(out, rows_of_group)
        return SegmentPlan(
            out=out,
            inner=inner,
            groups=groups,
            splits=splits,
            width=ceil_div(ceil_div(inner, splits), depth) * depth,
            teams=teams,
            tiles=ceil_div(groups, teams),
        )

    segments = {
        Segment.QKV: segment(d.qkv_dim, d.model_dim),
        Segment.ATTN_OUT: segment(d.model_dim, d.attn_dim),
        # A group holds half its rows of the gate and the same rows of the up projection.
        Segment.GATE_UP: segment(d.ffw_dim, d.model_dim, rows // 2),
        Segment.DOWN: segment(d.model_dim, d.ffw_dim),
        Segment.HEAD: segment(d.vocab_size, d.model_dim),
    }
    num_warps = tuning.num_warps or (4 if columns <= 16 or tuning.programs_per_core > 1 else 8)
    if num_warps * tuning.programs_per_core > MAX_WARPS and tuning.programs_per_core > 1:
        raise ValueError(
            "Programs that share a multiprocessor must fit its registers together: "
            f"{tuning.programs_per_core} programs have at most "
            f"{MAX_WARPS // tuning.programs_per_core} warps each, got {num_warps}."
        )
    parts = max(1, min(MAX_SPLITS, programs // d.num_kv_heads))
    return StreamPlan(
        dims=dims,
        programs=programs,
        # A program's tiles in flight take most of its share of shared memory.
        resident=programs,
        num_warps=num_warps,
        num_stages=tuning.num_stages or _stages(gpu, tuning, columns, depth),
        padded_batch=bp,
        rows=rows,
        chunks=chunks,
        depth=depth,
        columns=columns,
        segments=segments,
        attention=AttentionPlan(
            block=max(16, ATTENTION_TILE // tuning.programs_per_core // d.head_dim),
            min_span=256,
            max_splits=1 << (parts.bit_length() - 1),
        ),
        owned=next_power_of_2(ceil_div(ceil_div(d.model_dim, rows), programs)),
        tuning=tuning,
    )
