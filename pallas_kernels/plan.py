"""The plan of a decode step: who computes what, in tiles of what shape.

A plan is data, free of any backend. The kernel's phases read it when they are
traced; diagnosis and benchmarks read the bytes off it.

How a mat-vec is cut. P programs share the rows of a weight matrix `[out, in]`
in groups, of 8 say. One tile then covers 8 rows and up to 2048 inputs. Seen as a
row-major `[64, 256]` matrix it holds, for each row, 8 chunks of 256 inputs; its
product with a `[256, 8 * B]` operand, whose column (c, b) is chunk c of sequence
b's activations, contains every chunk's dot product with its own activations on a
diagonal (and 7 products nobody wants: tensor cores pad a width of 1 to 8 anyway).
Summing that diagonal gives 8 finished rows, so that no program ever needs
another's partial sums, and rows are shared out evenly among many programs.
"""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.dims import Dims, ceil_div, next_power_of_2
from pallas_kernels.gpu import Gpu

__all__ = ["AttentionPlan", "Phase", "Plan", "Tile", "make_plan"]

# Tensor cores multiply in steps of 16 along the inner dimension.
MIN_DEPTH = 16
MAX_DEPTH = 256
# A tile is multiplied as a matrix of so many rows, and by default holds so many outputs.
MATRIX_ROWS = 64
TILE_ROWS = 8
# Columns of the operand: tensor cores have at least 8; beyond 64 the product fills registers.
MIN_COLUMNS = 8
MAX_COLUMNS = 64
# Left for what the compiler keeps in shared memory besides the tiles in flight:
# operands and products on their way from one register layout to another.
RESERVED_SHARED_MEMORY = 32 * 1024
# On an H200, a Llama-3.2-1B step took 907, 932 and 942 microseconds with 3, 4 and 5.
MAX_STAGES = 3
# Words of a tile of keys or values: 64 registers of 128 threads.
ATTENTION_TILE = 8192


@dataclasses.dataclass(frozen=True)
class Tile:
    """The shape of a weight tile: `rows` rows of `chunks` times `depth` inputs.

    Attributes:
        inner: inputs of the mat-vec, K of the matrix product.
        rows: output rows of a tile.
        chunks: pieces a row's inputs are cut into.
        depth: inputs of a piece.
    """

    inner: int
    rows: int = 8
    chunks: int = 8
    depth: int = MAX_DEPTH

    @property
    def span(self) -> int:
        """Inputs a tile covers."""
        return self.chunks * self.depth

    @property
    def blocks(self) -> int:
        """Tiles along the inputs."""
        return ceil_div(self.inner, self.span)

    @property
    def ragged(self) -> bool:
        """Whether the last tile along the inputs reaches beyond them."""
        return self.inner % self.span != 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of a tile of bfloat16 weights."""
        return 2 * self.rows * self.span

    def operand_bytes(self, padded_batch: int) -> int:
        """Bytes of the operand that streams beside each tile; one block's stays in place."""
        return 0 if self.blocks == 1 else 2 * self.span * padded_batch

    @classmethod
    def choose(cls, inner: int, out: int, programs: int, padded_batch: int) -> Tile:
        """The tile that moves the fewest bytes through the busiest program.

        Args:
            inner: inputs of the mat-vec.
            out: its output rows.
            programs: P, which share the rows.
            padded_batch: B, rounded up to a power of two.
        """
        depth = _depth(inner)

        def cost(tile: Tile) -> tuple[int, int]:
            tiles = ceil_div(ceil_div(out, tile.rows), programs) * tile.blocks
            moved = tile.weight_bytes + tile.operand_bytes(padded_batch)
            return tiles * moved, abs(tile.rows - TILE_ROWS)

        tiles = [cls(inner, rows, MATRIX_ROWS // rows, depth) for rows in (4, 8, 16, 32)]
        fitting = [
            tile
            for tile in tiles
            if MIN_COLUMNS <= tile.chunks * padded_batch <= MAX_COLUMNS and out % tile.rows == 0
        ]
        return min(fitting or [cls(inner, depth=depth)], key=cost)


def _depth(inner: int) -> int:
    """The deepest piece with which at most an eighth of a default tile's work is padding."""
    depth = MAX_DEPTH
    while depth > MIN_DEPTH:
        tile = Tile(inner, depth=depth)
        if tile.blocks * tile.span * 8 <= inner * 9:
            break
        depth //= 2
    return depth


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """How attention over the cache is cut.

    A sequence's positions are split into at most `max_splits` equal spans, a
    multiple of `block` each, and every (sequence, key/value head, span) is one
    program's work. The cut depends on the length alone, not on the batch.

    Attributes:
        block: positions of one tile of keys or values.
        min_span: positions of a span at least, a multiple of `block`: shorter ones would
            cost more to combine than they save.
        max_splits: spans at most.
    """

    block: int
    min_span: int
    max_splits: int


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of the step, for reports.

    Attributes:
        name: the file in `phases/` it stands in.
        per_layer: whether every layer has it.
        weight_bytes: bytes of weights it reads, once a step or layer.
        reads: buffers it reads.
        writes: buffers it writes.
    """

    name: str
    per_layer: bool
    weight_bytes: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything about a step that is decided before it is traced.

    Attributes:
        dims: the sizes.
        programs: P, the grid.
        resident: programs that can be on the device at once; P is at most that.
        num_warps: warps of a program.
        num_stages: tiles in flight in a streaming loop, plus one.
        padded_batch: B, rounded up to a power of two.
        qkv: tile of the fused query, key and value projection.
        attn_out: tile of the attention's output projection.
        gate_up: tile of the gate and up projections.
        down: tile of the down projection.
        head: tile of the head.
        attention: how attention is cut.
        phases: the phases in order.
    """

    dims: Dims
    programs: int
    resident: int
    num_warps: int
    num_stages: int
    padded_batch: int
    qkv: Tile
    attn_out: Tile
    gate_up: Tile
    down: Tile
    head: Tile
    attention: AttentionPlan
    phases: tuple[Phase, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights a step reads: each once, one embedding row a sequence."""
        return sum(
            p.weight_bytes * (self.dims.num_layers if p.per_layer else 1) for p in self.phases
        )


def _stages(plan: Plan, shared_memory: int) -> int:
    """As many stages as the widest streaming loop has shared memory for, `MAX_STAGES` at most.

    A stage holds a weight tile and, where a mat-vec has several blocks of inputs, the
    block's operand. Of n stages n - 1 lie in shared memory, or all n where products 16 or
    more columns wide let tensor cores read their operands there while the loop goes on.
    """
    tiles = (plan.qkv, plan.attn_out, plan.gate_up, plan.down, plan.head)
    widest = max(tile.weight_bytes + tile.operand_bytes(plan.padded_batch) for tile in tiles)
    wide_product = plan.padded_batch * max(t.chunks for t in tiles) >= 16
    kept = max([2 * t.span * plan.padded_batch for t in tiles if t.blocks == 1], default=0)
    free = shared_memory - RESERVED_SHARED_MEMORY - (kept if wide_product else 0)
    return max(2, min(MAX_STAGES, free // widest + (0 if wide_product else 1)))


@functools.lru_cache
def make_plan(dims: Dims, gpu: Gpu, *, num_warps: int = 4, num_stages: int | None = None) -> Plan:
    """The plan for a step of these sizes on a GPU: one program a multiprocessor.

    Args:
        dims: the sizes.
        gpu: the device.
        num_warps: warps of a program.
        num_stages: overrides the number that fits shared memory.
    """
    d, programs = dims, gpu.cores
    two = 2  # bytes of a bfloat16

    def matrix(out: int, inner: int) -> int:
        return two * out * inner

    norm = two * d.model_dim
    phases = (
        Phase(
            "embed", False, two * d.batch * d.model_dim, ("embed",), ("x", "x_operand", "x_squares")
        ),
        Phase(
            "qkv",
            True,
            norm + matrix(d.qkv_dim, d.model_dim),
            ("x_operand", "x_squares"),
            ("q", "k", "v"),
        ),
        Phase("attention", True, 0, ("q", "k", "v"), ("attn_operand",)),
        Phase(
            "attn_out",
            True,
            norm + matrix(d.model_dim, d.attn_dim),
            ("attn_operand", "x"),
            ("x", "x_operand", "x_squares"),
        ),
        Phase(
            "gate_up",
            True,
            matrix(2 * d.ffw_dim, d.model_dim),
            ("x_operand", "x_squares"),
            ("ffw_operand",),
        ),
        Phase(
            "down",
            True,
            matrix(d.model_dim, d.ffw_dim),
            ("ffw_operand", "x"),
            ("x", "x_operand", "x_squares"),
        ),
        Phase(
            "head",
            False,
            norm + matrix(d.vocab_size, d.model_dim),
            ("x_operand", "x_squares"),
            ("logits", "token", "lengths"),
        ),
    )
    bp = next_power_of_2(d.batch)
    splits = max(1, min(64, programs // d.num_kv_heads))
    down = Tile.choose(d.ffw_dim, d.model_dim, programs, bp)
    plan = Plan(
        dims=dims,
        programs=programs,
        # A program's tiles in flight take most of a multiprocessor's shared memory.
        resident=gpu.cores,
        num_warps=num_warps,
        num_stages=num_stages or 0,
        padded_batch=bp,
        qkv=Tile.choose(d.model_dim, d.qkv_dim, programs, bp),
        # Both write the residual: a program owns the same elements in both.
        attn_out=dataclasses.replace(down, inner=d.attn_dim, depth=_depth(d.attn_dim)),
        gate_up=Tile.choose(d.model_dim, 2 * d.ffw_dim, programs, bp),
        down=down,
        head=Tile.choose(d.model_dim, d.vocab_size, programs, bp),
        attention=AttentionPlan(
            block=ATTENTION_TILE // d.head_dim,
            min_span=256,
            max_splits=1 << (splits.bit_length() - 1),
        ),
        phases=phases,
    )
    if num_stages is None:
        plan = dataclasses.replace(plan, num_stages=_stages(plan, gpu.shared_memory))
    return plan
