"""The plan of a fused step: the tiles, the segments, and each program's share of them.

A *tile* is some rows of a weight matrix by a *span* of their inputs. Its products are those of
16 x 8 x 16 blocks on tensor cores. A single sequence has one column of activations: its span is
cut into 8 *chunks*, which become the block's 8 columns and 8 of its rows, and of the product
the entries where both mean the same chunk are summed. Several sequences are the columns
themselves. The span's inputs are shared out among the threads of a program, see `fragment_layout`.

Matrices may be stored in different formats: what a tile has of rows and inputs follows from the
bytes of a weight.

A *segment* is a mat-vec's part of the stream. Its rows are dealt out in groups, one tile
each. Where a mat-vec has more inputs than its span, they are split among teams of programs, and
the partial sums of a row are added up by the program that owns the row.
"""

from __future__ import annotations

import dataclasses
import enum

from pallas_kernels.backends import Backend, default_backend
from pallas_kernels.dims import Dims, Grouping, Stored, ceil_div, next_power_of_2
from pallas_kernels.stream.tuning import Tuning

__all__ = [
    "AttentionPlan",
    "Segment",
    "SegmentPlan",
    "StreamPlan",
    "grain_of",
    "is_paired",
    "is_residual",
    "line_of",
    "query_pitch",
]

# Columns of a tensor core's block: several sequences are padded to as many.
COLUMNS = 8
# So there are at most as many sequences, or tokens of all sequences together.
MAX_BATCH = COLUMNS
# Activations that a thread waits for at once.
PIECE = 8
# Inputs of one product of tensor cores, of integers.
PRODUCT = 32
# Bytes of weights that a thread reads at once.
READ = 16
# Bytes of an element of a box, and elements of one of its dimensions at most.
BOX_UNIT, MAX_BOX = 8, 256
# Threads that read one row's, or chunk's, inputs side by side.
QUAD = 4
# Pieces that a thread holds of the activations: half of its 255 registers, packed in pairs.
MAX_PIECES = 16
MAX_ROWS = 16
# Of integers that meet several sequences, where a program has many tiles.
MAX_INTEGER_ROWS = 32
MAX_SLOTS = 16
MIN_FLUSH = 8
# One on each of 320 multiprocessors: the exchange is made before the device is
# known, and has room for them.
MAX_PROGRAMS = 320
# KV splits of one head at most.
MAX_SPLITS = 64
# Positions of a KV split at least: shorter ones would cost more to combine than they save.
MIN_SPLIT = 256
# Query heads that share a key/value head and are multiplied together.
LOT = 8
# Shared memory that the compiler takes for itself where queries are not normed, at most.
COMPILER_BYTES = 2 * 1024
# The compiler's own tile of the ring's stand-in, bytes: see `ring`.
RESERVED_TILE = 32 * 1024


def line_of(chunked: bool, bits: int) -> int:
    """Reads of a row that a warp makes side by side: of all chunks, or of all sequences' inputs.

    A single sequence has as many chunks as columns. With integers each takes two, one a digit.
    """
    if not chunked:
        return QUAD
    return QUAD * (COLUMNS if bits == 16 else COLUMNS // 2)


def grain_of(chunked: bool, stored: Stored) -> int:
    """Neighbouring inputs of a row that a thread reads at once: 16 bytes of them.

    Of several sequences and groups that are fine, a fourth of a group, so that the products of the
    four threads of a column are those of one group.
    """
    if stored.fine and not chunked:
        assert stored.groups is not None
        return stored.groups.size // QUAD
    return 8 * READ // stored.bits


def query_pitch(head_dim: int) -> int:
    """Bytes from a query to the next: what 8 threads of two queries read at a time then lies in
    different banks.

    They read every other chunk of 16 bytes; of heads of 32, which have four, all.
    """
    row = 2 * head_dim
    return row + (16 if row >= 128 else 64)


class Segment(enum.IntEnum):
    """The segments. Those with weights have their array's number, in the order of the stream.

    The embedding, with which the stream begins, comes last: it has no weights to multiply.
    """

    QKV = 0
    ATTN_OUT = 1
    GATE_UP = 2
    DOWN = 3
    HEAD = 4
    EMBED = 5

    @property
    def matrix(self) -> str:
        """What its weights are called, as everywhere: a field of `DecodeWeights`."""
        return self.name.lower()


def is_paired(segment: Segment) -> bool:
    """Whether a tile's first and second half of rows lie apart in the matrix."""
    return segment in (Segment.QKV, Segment.GATE_UP)


def is_residual(segment: Segment) -> bool:
    """Whether its rows are elements of the residual."""
    return segment in (Segment.ATTN_OUT, Segment.DOWN, Segment.EMBED)


LAYER_SEGMENTS = (Segment.QKV, Segment.ATTN_OUT, Segment.GATE_UP, Segment.DOWN)


@dataclasses.dataclass(frozen=True)
class SegmentPlan:
    """One mat-vec's part of the stream.

    Attributes:
        out: rows of the matrix.
        inner: inputs of the matrix.
        stored: how it is stored.
        grain: neighbouring inputs that a thread reads at once.
        rows: rows of a tile.
        reads: of each row, by a thread.
        held: inputs of each read whose activations a thread waits for.
        groups: groups of rows, a tile each.
        splits: parts the inputs are cut into; program p works on part `p % splits`.
        width: inputs of a part.
        teams: programs, or teams of them, that groups are dealt out to in turn.
        run: neighbouring groups that are dealt out together.
        tiles: tiles of a program; its last ones may lie beyond the groups, and are then empty.
        scaled_rows: rows whose scales come with a tile: its own, or those of all of its run.
        gap: bytes in a slot between the two halves of a tile's rows.
        scale_gap: between the scales of these.
    """

    out: int
    inner: int
    stored: Stored
    grain: int
    rows: int
    reads: int
    held: int
    groups: int
    splits: int
    width: int
    teams: int
    run: int
    tiles: int
    scaled_rows: int
    gap: int
    scale_gap: int

    @property
    def run_rows(self) -> int:
        """Rows of the groups that are dealt out together."""
        return self.rows * self.run

    @property
    def bits(self) -> int:
        """Of a weight: 16, 8 or 4."""
        return self.stored.bits

    @property
    def grouping(self) -> Grouping | None:
        """Of its scales; None where it has none, or a scale a row."""
        return self.stored.groups

    @property
    def fine(self) -> bool:
        """Whether its groups are: see `Stored`."""
        return self.stored.fine

    @property
    def read_bytes(self) -> int:
        """Bytes that a thread reads at once."""
        return self.grain * self.bits // 8

    @property
    def copied(self) -> int:
        """Inputs of `READ` bytes, in which tiles are copied."""
        return 8 * READ // self.bits

    @property
    def fragment_kind(self) -> tuple[int, ...]:
        """What its activation fragments depend on, besides the width.

        With an offset they come with the sums of their groups, so that the groups' size counts.
        """
        grouping = self.grouping
        summed = grouping.size if grouping is not None and grouping.offset is not None else 0
        return self.bits, self.grain, self.held, self.fine, summed

    @property
    def pieces(self) -> int:
        """Pieces of the span that a thread holds."""
        return self.reads * self.held // PIECE

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a tile."""
        return self.width * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of a row of the matrix."""
        return self.stored.scale_bytes(self.inner)

    @property
    def weight_bytes(self) -> int:
        """Bytes of a tile's weights, and of what lies between them."""
        return self.rows * self.row_bytes + self.gap

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile, with the scales that come with it."""
        return self.weight_bytes + self.scaled_rows * self.scale_bytes + self.scale_gap


@dataclasses.dataclass(frozen=True)
class Box:
    """How tiles of a matrix whose inputs are split come by one copy each.

    To ask for such a tile row by row takes 25 ns a row, whoever asks. A copy of a *box* knows the
    matrix by its tensor map: elements of `BOX_UNIT` bytes, in pieces, in rows.

    Attributes:
        units: elements of a piece.
        pieces: of a tile's row, side by side.
    """

    units: int
    pieces: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """How attention over the cache is cut.

    A head's positions are cut into at most `max_splits` equal KV splits, a multiple of `block`
    each. The cut depends on the sequence's length alone, not on the batch.

    Attributes:
        block: positions of a tile of keys and values.
        min_split: positions of a KV split at least.
        max_splits: KV splits of a head at most.
        lots: parts, of at most `abreast * LOT`, of the queries that share a key/value head.
        abreast: of such a part's queries, how many times `LOT` different warps have.
        warps: of a program that attend; those with the same queries share a tile's positions.
        tiles: that shared memory holds.
    """

    block: int
    min_split: int
    max_splits: int
    lots: int
    abreast: int
    warps: int
    tiles: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """Everything about a fused step that is decided before it is traced.

    Attributes:
        dims: the sizes.
        programs: P, the grid.
        resident: programs that can be on the device at once.
        num_warps: warps of a program.
        product_warps: of them those that multiply, from the first on.
        num_stages: for the compiler, by which it takes nearly all shared memory: see `ring`.
        slots: tiles of weights that shared memory holds.
        in_flight: tiles that are asked for and have not come, at most.
        slot_bytes: bytes of a slot of the ring.
        room: bytes that there are for the slots.
        tail_bytes: bytes that reading a whole span goes beyond a slot's last row.
        flush: tiles whose products are summed up and made use of together, at most.
        padded_columns: 1, or 8 for several tokens, of all sequences together.
        rows: rows of a tile, and of a group of the residual.
        segments: the mat-vecs, by `Segment`.
        attention: how attention is cut.
        owned: groups of the residual that one program owns at most.
        bulk: whether bulk copies bring tiles, or asynchronous ones of 16 bytes a thread.
        scale_unit: bytes of whose multiples copies of scales are, and begin at.
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
    padded_columns: int
    rows: int
    segments: dict[Segment, SegmentPlan]
    attention: AttentionPlan
    owned: int
    bulk: bool
    scale_unit: int
    tuning: Tuning

    def __hash__(self) -> int:
        return hash((self.dims, self.programs, self.bulk, self.tuning))

    def compiled_by(self, backend: Backend) -> StreamPlan:
        """The same plan for another backend."""
        return dataclasses.replace(self, tuning=dataclasses.replace(self.tuning, backend=backend))

    @property
    def backend(self) -> Backend:
        """That of Pallas which compiles the kernel."""
        return self.tuning.backend or default_backend()

    @property
    def asks_by_lane(self) -> bool:
        """Whether a feeding thread is told by its lane, too: see `ptx.one_thread`."""
        return self.backend == "mosaic_gpu" and self.quantized and not self.chunked

    @property
    def indices_anew(self) -> bool:
        """Whether what follows from indices is computed each time: see `ptx.anew`.

        For compute capability 8, and for Mosaic GPU's steps that norm queries or have rows of 4096
        inputs or more for several sequences, so much would be kept from layer to layer that there
        are too few registers for it.
        """
        if not self.bulk or self.backend != "mosaic_gpu":
            return not self.bulk
        widest = max(part.pieces for part in self.segments.values())
        wide = widest > MAX_PIECES or (widest == MAX_PIECES and not self.chunked)
        return wide or self.dims.features.qk_norm is not None

    @property
    def spares_addresses(self) -> bool:
        """Whether a wait for words keeps no address of any: see `ptx.collect_each`.

        Where queries are normed, a thread waits for 20 to 40 words at once. Triton's steps have
        room for their addresses, and are left as they were measured.
        """
        return self.backend == "mosaic_gpu" and self.dims.features.qk_norm is not None

    @property
    def why_no_room(self) -> str | None:
        """Why two tiles do not fit in shared memory, as a sentence; None if they do."""
        if self.slots * (self.slot_bytes + 8) <= self.room:
            return None
        advice = "Take a tuning with smaller tiles, or implementation='xla'."
        if self.tuning.smallest:
            advice = "No tuning has smaller ones: use implementation='xla'."
        return (
            f"The ring has a tile in flight while another is used: two tiles of {self.slot_bytes} "
            f"bytes do not fit in the {max(self.room, 0)} bytes of shared memory that are left for "
            f"them. {advice}"
        )

    @property
    def chunked(self) -> bool:
        """Whether the columns of a product are chunks of one sequence."""
        return self.padded_columns == 1

    @property
    def paired(self) -> bool:
        """Whether attention has two rows a query, one of even positions and one of odd."""
        return self.dims.queries <= LOT // 2

    @property
    def compiler_bytes(self) -> int:
        """Shared memory that the compiler takes for itself, at most.

        It hands rows of queries from thread to thread where these are normed.
        """
        if self.dims.features.qk_norm is None:
            return COMPILER_BYTES
        return max(COMPILER_BYTES, 4 * self.attended_rows * self.dims.head_dim)

    @property
    def attended_rows(self) -> int:
        """Queries of which a warp puts aside what it has made."""
        return LOT // 2 if self.paired else LOT

    @property
    def box(self) -> Box | None:
        """The box of the down projection's tiles; None where rows are copied one by one.

        Of a single sequence a tile's rows are few, and of bfloat16 memory is what takes the time.
        """
        part = self.segments[Segment.DOWN]
        if part.splits == 1 or self.chunked or not self.quantized or not self.bulk:
            return None
        # All tiles are whole ones.
        if part.inner % part.width or part.out % part.rows or part.out > 1 << 16:
            return None
        for pieces in range(1, 1 + part.row_bytes // READ):
            size, rest = divmod(part.row_bytes, pieces)
            if not rest and size % READ == 0 and size <= MAX_BOX * BOX_UNIT:
                return Box(size // BOX_UNIT, pieces)
        return None

    @property
    def next_tiles(self) -> int:
        """Tiles beyond a segment that may have been asked for when its last one has been used."""
        usual = self.slots if self.quantized else 1
        return min(self.tuning.next_tiles or usual, self.slots)

    @property
    def half2(self) -> bool:
        """Whether activations are handed over two a word: where a tile has two hidden ones."""
        return not self.chunked and self.segments[Segment.GATE_UP].rows >= 4

    def holds_words(self, part: SegmentPlan) -> bool:
        """Whether threads hold a segment's activations as the words that they come in.

        Else they hold them as float32 until the fragments are made of them. Of more pieces than
        these two are more than 255 registers: 70B in int4 with 8 sequences spilled 5.2 KB a thread.
        To part words twice takes longer than once, where there is room.
        """
        return self.half2 and part.pieces > MAX_PIECES and self.product_warps == self.num_warps

    @property
    def wide(self) -> bool:
        """Whether rows are so wide that fragments take half of a thread's registers."""
        return any(map(self.holds_words, self.segments.values()))

    @property
    def threads(self) -> int:
        """Threads of a program."""
        return 32 * self.num_warps

    @property
    def feeders(self) -> int:
        """Warps that ask for tiles: one, by bulk copies, or those that multiply.

        All of these wait for words, and so feed the ring for as long.
        """
        return 1 if self.bulk else self.product_warps

    @property
    def sharing(self) -> int:
        """Threads that copy 16 bytes of a tile each; 0 where there are bulk copies."""
        return 0 if self.bulk else 32 * self.feeders

    def line(self, part: SegmentPlan) -> int:
        """Reads of a row that a warp makes side by side."""
        return line_of(self.chunked, part.bits)

    def columns(self, part: SegmentPlan) -> int:
        """Numbers that a warp makes of a row: one a chunk, or one a sequence."""
        return self.line(part) // QUAD if self.chunked else COLUMNS

    def span(self, segment: Segment) -> int:
        """Inputs of a segment's tile, those that are padding included."""
        return self.span_of(self.segments[segment])

    def span_of(self, part: SegmentPlan) -> int:
        """The same of a segment's plan."""
        return part.reads * part.grain * self.product_warps * self.line(part)

    @property
    def quantized(self) -> bool:
        """Whether some matrix is."""
        return self.dims.weight_bits.quantized

    @property
    def kinds(self) -> list[list[Segment]]:
        """The segments with weights, those together whose tiles are multiplied alike."""
        kinds: dict[tuple[bool, Stored, int, int, int, int], list[Segment]] = {}
        for segment, part in sorted(self.segments.items()):
            gaps = part.gap, part.scale_gap
            kind = segment == Segment.DOWN, part.stored, part.scale_bytes, part.rows, *gaps
            kinds.setdefault(kind, []).append(segment)
        return list(kinds.values())

    def offset_bytes(self, segment: Segment) -> int:
        """Bytes of a warp's sums of the activations of groups; 0 where weights have no offset.

        Float32: of a single sequence for each of its reads, or where groups are not fine for each
        group; of several ones for each group of each.
        """
        part = self.segments[segment]
        if part.grouping is None or part.grouping.offset is None:
            return 0
        if not self.chunked:
            return 4 * part.reads * COLUMNS
        return 4 * part.reads * (self.line(part) if part.fine else self.columns(part))

    def products_bytes(self, segment: Segment) -> int:
        """Bytes of a tile's products, not summed up yet: float32, `columns` a row and warp.

        With 16 bytes between them, the same rows of several tiles lie in different banks.
        """
        part = self.segments[segment]
        return 4 * self.columns(part) * self.product_warps * part.rows + 16

    def flushed(self, segment: Segment) -> int:
        """Tiles of a segment, or groups of the residual, that are made use of together."""
        if segment in (Segment.ATTN_OUT, Segment.EMBED):
            return self.owned
        if segment == Segment.DOWN and self.segments[segment].splits == 1:
            return self.owned
        return min(self.flush, next_power_of_2(self.segments[segment].tiles))

    @property
    def most_parts(self) -> int:
        """Parts of a layer's attention that one program has at most."""
        d, cut = self.dims, self.attention
        parts = d.batch * d.num_kv_heads * cut.lots * cut.max_splits
        return ceil_div(parts, self.programs)

    @property
    def ragged(self) -> bool:
        """Whether some tile's rows are shorter than its span."""
        return any(self.is_ragged(segment) for segment in self.segments)

    def is_ragged(self, segment: Segment) -> bool:
        """Whether some tile of the segment has rows shorter than its span."""
        part = self.segments[segment]
        return part.width != self.span(segment) or part.inner % part.width != 0

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
