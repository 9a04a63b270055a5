"""The inline PTX of weights in groups, run on a CPU: 16-bit scales, offsets, and sums of groups."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from ptx_inline import Edit, Inline, inline
from ptx_machine import Machine, PtxError
from ptx_plans import Planned

from ffjax.packing import pack
from pallas_kernels.dims import Grouping, Stored
from pallas_kernels.stream import ptx
from pallas_kernels.stream.fragment_layout import (
    distances,
    first_input,
    first_read,
    offset_of_use,
    place_aside,
    place_of_offset,
)
from pallas_kernels.stream.layout import SPARE_BYTES
from pallas_kernels.stream.plan import COLUMNS, PIECE, PRODUCT, grain_of
from pallas_kernels.stream.product import integer_tile

pytestmark = pytest.mark.once(
    "The machine and the texts are ours; a sample shows that they are traced.",
    sample=[
        "test_scales_are_loaded_as_many_at_once_as_lie_side_by_side",
        "test_of_one_sequence_weights_are_read_without_conflicts_of_banks",
    ],
)


@dataclasses.dataclass(frozen=True)
class Tile(Planned):
    """What a product is made of: a plan as far as products look at it."""

    bits: int
    size: int  # of a group
    rows: int
    reads: int
    chunked: bool
    scales: str = "float16"
    offset: str | None = None
    product_warps: int = 4
    warps: int = 4
    short: int = 0  # inputs that a row lacks of the span

    @property
    def scale_gap(self) -> int:
        """As the planner has it."""
        apart = self.chunked and self.stored.fine and self.rows == 16 and self.offset is None
        return 16 if apart else 0

    @property
    def gap(self) -> int:
        """As the planner has it."""
        return 16 if self.chunked and self.stored.fine and self.bits == 4 else 0

    @property
    def stored(self) -> Stored:
        return Stored(self.bits, Grouping(size=self.size, scales=self.scales, offset=self.offset))

    @property
    def part(self) -> Any:
        grain = grain_of(self.chunked, self.stored)
        return SimpleNamespace(
            reads=self.reads,
            grain=grain,
            held=grain // 2 if self.chunked else grain,
            rows=self.rows,
            bits=self.bits,
            fine=self.stored.fine,
            grouping=self.stored.groups,
            read_bytes=grain * self.bits // 8,
            row_bytes=self.inner * self.bits // 8,
            scale_bytes=self.stored.scale_bytes(self.inner),
            splits=1,
            gap=self.gap,
            scale_gap=self.scale_gap,
            weight_bytes=self.rows * self.inner * self.bits // 8 + self.gap,
        )

    @property
    def span(self) -> int:
        grain = grain_of(self.chunked, self.stored)
        return self.product_warps * self.reads * self.line * grain

    @property
    def inner(self) -> int:
        return self.span - self.short

    @property
    def ptx(self) -> ptx.IntegerTile:
        return integer_tile(self.plan, self.part, ragged=self.short > 0)

    @property
    def sums(self) -> ptx.GroupSums:
        return ptx.GroupSums(
            reads=self.reads,
            by_sixteen=self.bits == 4,
            chunked=self.chunked,
            fine=self.stored.fine,
            threads=32 * self.product_warps,
            products=self.size // PRODUCT,
        )


@functools.cache
def product_text(tile: Tile) -> Inline:
    plan = tile.plan

    def body() -> None:
        none = jnp.zeros((plan.threads,), jnp.int32)
        words = [none] * (tile.reads * tile.part.held // 2)
        scale = jnp.zeros((plan.threads,), jnp.float32)
        more = none if tile.offset else None
        ptx.multiply_integers(none, none, none, none, scale, none, words, tile.ptx, more)

    return inline(body)


@functools.cache
def sums_text(tile: Tile) -> Inline:
    def body() -> None:
        none = jnp.zeros((tile.plan.threads,), jnp.int32)
        ptx.sum_groups(none, [none] * (tile.reads * tile.part.held // 2), tile.sums)

    return inline(body)


def weights_of(tile: Tile, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random weights: what they are, float64, their rows as bytes, and those of their scales."""
    shape, groups = (tile.rows, tile.inner), (tile.rows, tile.inner // tile.size)
    scales = jnp.asarray(rng.standard_normal(groups), tile.scales)
    exact = np.asarray(scales).astype(np.float64).repeat(tile.size, axis=1)
    if tile.bits == 8:
        integers = rng.integers(-128, 128, shape, np.int8)
        return integers * exact, integers.view(np.uint8), np.asarray(scales).view(np.uint8)
    integers = rng.integers(0, 16, shape)
    data = np.asarray(pack(jnp.asarray(integers))).view(np.uint8).reshape(tile.rows, -1)
    if tile.offset is None:
        return (integers - 8) * exact, data, np.asarray(scales).view(np.uint8)
    if tile.offset == "zero":  # 16 is what some files have
        second = jnp.asarray(rng.integers(0, 17, groups), tile.scales)
    else:
        second = jnp.asarray(3 * rng.standard_normal(groups), tile.scales)
    beside = np.asarray(second).astype(np.float64).repeat(tile.size, axis=1)
    weights = (integers - beside) * exact if tile.offset == "zero" else integers * exact + beside
    pairs = np.stack([np.asarray(scales), np.asarray(second)], axis=-1)
    return weights, data, pairs.reshape(tile.rows, -1).view(np.uint8)


def check_product(
    tile: Tile,
    edit: Edit = None,
    order: np.random.Generator | None = None,
    sums_edit: Edit = None,
) -> Machine:
    """A tile in shared memory times activations in registers, against float64."""
    rng, plan, part = np.random.default_rng(0), tile.plan, tile.part
    weights, data, scales = weights_of(tile, rng)
    floats = tile.columns * tile.product_warps * tile.rows
    beyond = -(-2 * tile.span // 16) * 16  # that a whole span of the last row reaches
    beyond += -(data.size + scales.size) % 16
    half = data.size // 2
    behind = data.size + tile.gap  # where scales begin
    beyond += tile.gap + tile.scale_gap
    half_scales = scales.size // 2
    pitch = tile.sums.pitch * tile.reads
    sizes = [data.size + scales.size + beyond, 4 * floats + 256]
    sizes += [tile.product_warps * pitch, SPARE_BYTES * tile.warps]
    machine = Machine(plan.threads, sum(sizes), 16, order=order)
    ring = machine.shared_base
    products, offsets, spare = (ring + x for x in np.cumsum(sizes)[:3].tolist())
    # Beyond rows lies anything, of which many are no numbers.
    machine.view(ring, half, np.uint8)[:] = data.ravel()[:half]
    machine.view(ring + half + tile.gap, half, np.uint8)[:] = data.ravel()[half:]
    machine.view(ring + behind, half_scales, np.uint8)[:] = scales.ravel()[:half_scales]
    at = ring + behind + half_scales + tile.scale_gap
    machine.view(at, half_scales, np.uint8)[:] = scales.ravel()[half_scales:]
    sequences = 1 if tile.chunked else COLUMNS
    inputs = rng.standard_normal((sequences, tile.inner)).astype(np.float32)
    padded = np.pad(inputs, ((0, 0), (0, tile.short)))
    thread = np.arange(plan.threads)
    column, mine = thread % 32 // 4, thread < 32 * tile.product_warps
    first = np.asarray(first_input(plan, part))
    at = np.stack([first + x + j for x in distances(plan, part) for j in range(PIECE)])
    assert sorted(at[:, mine].ravel()) == sorted([*range(tile.span)] * sequences)
    held = np.where(mine, padded[0 if tile.chunked else column, at], 0).astype(np.float32)
    given, halved = [jnp.asarray(x) for x in held], tile.chunked
    how: dict[str, Any] = {"halved": halved, "held": part.held}
    words, scale = ptx.pack_digits(given, tile.bits, interpret=True, **how)
    bits = [np.asarray(word).view(np.uint32) for word in words]
    machine.spare = range(spare, spare + sizes[3])
    if tile.offset:
        place = np.asarray(place_of_offset(plan, part, offsets, pitch))
        sums_text(tile).edited(sums_edit).run(machine, place, *bits)
    read = np.asarray(first_read(plan, part))
    own = read & ~3 if part.fine else read
    more = [np.asarray(offset_of_use(plan, part, offsets, pitch))] if tile.offset else []
    product_text(tile).edited(edit).run(
        machine,
        ring + part.read_bytes * read,
        data.shape[1],
        np.asarray(place_aside(plan, part, products, spare)),
        ring + behind,
        np.asarray(scale).view(np.uint32),
        own * part.grain // tile.size,
        *bits,
        *more,
    )
    after = machine.view(products + 4 * floats, 256, np.uint8)
    assert (after == 0xFF).all(), "More is stored than the products."
    stored = machine.view(products, floats, np.float32).astype(np.float64)
    if tile.chunked:
        got = stored.reshape(-1, tile.rows).sum(axis=0)[:, None]
    else:
        got = stored.reshape(tile.product_warps, tile.rows, COLUMNS).sum(axis=0)
    # What the digits stand for, and no other rounding than of some sums.
    digits = np.stack(ptx.unpack_digits(words, scale, tile.bits, **how), dtype=np.float64)
    exact = np.zeros((sequences, tile.span))
    for i in range(len(at)):
        exact[0 if tile.chunked else column[mine], at[i, mine]] = digits[i, mine]
    wanted = weights @ exact[:, : tile.inner].T
    bound = np.abs(weights) @ np.abs(exact[:, : tile.inner]).T
    # s * (n - 8) and what is beside it may be larger than what they add up to.
    tolerance = 1e-6 if tile.offset is None else 8e-6
    assert (np.abs(got - wanted) <= tolerance * bound).all()
    close = weights @ inputs.T.astype(np.float64)
    assert np.linalg.norm(got - close) <= 4e-4 * np.linalg.norm(bound) / tile.inner**0.5
    return machine


CHUNKED = [
    Tile(4, 128, 16, 1, True),
    Tile(4, 128, 4, 2, True, "bfloat16", "zero", short=3 * 128),
    Tile(4, 128, 2, 2, True, "float16", "minimum"),
    Tile(4, 32, 16, 1, True),
    Tile(4, 32, 8, 2, True, "bfloat16", short=3 * 32),
    Tile(4, 64, 16, 2, True, "float16", "zero", short=7 * 64),
    Tile(4, 32, 2, 1, True, "float16", "minimum", warps=8),
    Tile(4, 32, 4, 7, True, "bfloat16", "zero", short=9 * 32),
    Tile(4, 64, 8, 1, True, "bfloat16", "minimum"),
    Tile(4, 64, 4, 3, True, "float16", "zero"),
    Tile(4, 64, 2, 1, True),
    Tile(8, 32, 16, 2, True, short=32),
    Tile(8, 32, 8, 3, True, "bfloat16"),
    Tile(8, 32, 4, 2, True, warps=8),
    Tile(8, 32, 2, 1, True, "bfloat16"),
]
BATCHED = [
    Tile(4, 128, 32, 2, False, "float16", "zero"),
    Tile(4, 128, 8, 3, False, "float16", short=128),
    Tile(4, 128, 4, 1, False, "bfloat16", "minimum", short=128),
    Tile(4, 32, 16, 16, False),
    Tile(4, 32, 32, 11, False, "float16", "minimum", 8, 8),
    Tile(4, 32, 8, 7, False, "bfloat16", "zero", short=5 * 32),
    Tile(4, 64, 4, 6, False, "float16", "zero", short=64),
    Tile(4, 64, 16, 4, False, "bfloat16"),
    Tile(8, 32, 32, 5, False, short=96),
    Tile(8, 32, 2, 4, False, "bfloat16", None, 4, 8),
]


@pytest.mark.parametrize("tile", [*CHUNKED, *BATCHED], ids=str)
def test_a_tiles_products_are_its_rows_times_the_digits(tile):
    check_product(tile)


@pytest.mark.parametrize(
    "tile",
    [Tile(4, 32, 16, 1, True, "float16", "zero"), Tile(4, 32, 8, 4, False, "float16", "minimum")],
    ids=str,
)
def test_warps_make_their_products_in_any_order(tile):
    check_product(tile, order=np.random.default_rng(3))


_ONE = Tile(4, 32, 16, 1, True, "float16", "minimum")
_FEW = Tile(4, 32, 4, 2, True, "float16", "zero")
_WIDER = Tile(4, 64, 4, 1, True, "float16", "zero")
_BYTES = Tile(8, 32, 8, 1, True)
_MANY = Tile(4, 32, 16, 8, False, "float16", "zero")
MMA = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
SCALES = "ld.shared.v4.b32 {x_scale, x_scale, x_scale, x_scale}"
PRODUCT_EDITS = [
    (_ONE, "xor.b32 scratch_1, scratch_1, scratch_2", "xor.b32 scratch_1, scratch_1, 0"),
    (_ONE, "xor.b32 which, group, quad", "xor.b32 which, group, 0"),
    (_ONE, "selp.b32 sum_10, sum_14, sum_10, one", "selp.b32 sum_10, sum_14, sum_10, two"),
    (_ONE, f"{MMA} *, *, {{$9, $10}}", f"{MMA} *, *, {{$11, $12}}"),
    (_ONE, f"{LDMATRIX} *, [other_row+16]", f"{LDMATRIX} *, [other_row+32]"),
    (
        _ONE,
        "ld.shared.v2.b32 {x_scale_3, x_scale_4}, [scale_place+32]",
        "ld.shared.v2.b32 {x_scale_3, x_scale_4}, [scale_place+8]",
    ),
    (_ONE, "fma.rn.f32 value_2, total_2, offset", "fma.rn.f32 value_2, total_1, offset"),
    (
        _ONE,
        "fma.rn.f32 offset, scale, 0f41000000, offset",
        "fma.rn.f32 offset, scale, 0f00000000, offset",
    ),
    (_ONE, "mov.b32 {half_1, half_2}, x_scale_1", "mov.b32 {half_2, half_1}, x_scale_1"),
    (_FEW, "shfl.sync.bfly.b32 number, value_1, 8", "shfl.sync.bfly.b32 number, value_1, 4"),
    (_FEW, "mad.lo.u32 scratch_1, scratch_2, 3", "mad.lo.u32 scratch_1, scratch_2, 2"),
    (_FEW, "mad.lo.u32 sums_place, scratch_2, 4", "mad.lo.u32 sums_place, scratch_2, 0"),
    (_WIDER, "shl.b32 scratch_1, scratch_1, 4", "shl.b32 scratch_1, scratch_1, 5"),
    (
        _WIDER,
        f"{MMA} *, *, *, {{sum_5, sum_6, sum_7, sum_8}}",
        f"{MMA} *, *, *, {{zero_1, zero_1, zero_1, zero_1}}",
    ),
    (_BYTES, "add.u32 x_place_3, x_place_3, 128", "add.u32 x_place_3, x_place_3, 64"),
    (_BYTES, "xor.b32 scratch_2, scratch_1, 96", "xor.b32 scratch_2, scratch_1, 32"),
    (_MANY, "mov.b32 magic, 0x4b400000", "mov.b32 magic, 0x4b000000"),
    (_MANY, "fma.rn.f32 number, number, 0f43800000", "fma.rn.f32 number, number, 0f43000000"),
    (_MANY, "sub.rn.f32 offset, 0f41000000, offset", "sub.rn.f32 offset, 0f40E00000, offset"),
    (_MANY, "and.b32 scratch_1, group, 4", "and.b32 scratch_1, group, 2"),
    (_MANY, "shl.b32 place_4, scratch_1, 4", "shl.b32 place_4, scratch_1, 3"),
    (_MANY, f"{SCALES}, [scale_place+16]", f"{SCALES}, [scale_place]"),
    (_MANY, "fma.rn.f32 value_2, total_2, offset", "fma.rn.f32 value_2, total_1, offset"),
    (
        Tile(4, 32, 8, 7, False, "float16", short=96),
        "@is_some fma.rn.f32",
        "fma.rn.f32",
    ),
    (Tile(4, 32, 4, 2, True, short=96), "@is_some fma.rn.f32", "fma.rn.f32"),
]


@pytest.mark.parametrize(("tile", "old", "new"), PRODUCT_EDITS)
def test_an_edit_of_the_products_is_noticed(tile, old, new):
    assert product_text(tile).has((old, new))
    with pytest.raises((AssertionError, PtxError)), np.errstate(all="ignore"):
        check_product(tile, (old, new))


_WHOLE = Tile(4, 128, 4, 1, True, "float16", "zero")
SUMS_EDITS = [
    (_ONE, "mov.b32 one, 0x10101010", "mov.b32 one, 0x01010101"),
    (_ONE, "mad.lo.s32 total, sum_1, 256", "mad.lo.s32 total, sum_1, 128"),
    (
        _ONE,
        "st.shared.v4.f32 *, {number_1, number_2, number_3, number_4}",
        "st.shared.v4.f32 *, {number_1, number_3, number_2, number_4}",
    ),
    (_FEW, "st.shared.v4.f32 [$1+64]", "st.shared.v4.f32 [$1]"),
    (_WIDER, f"{MMA} *, *, {{$4, $5}}", f"{MMA} *, *, {{$2, $3}}"),
    (_MANY, "shfl.sync.bfly.b32 more, total, 2", "shfl.sync.bfly.b32 more, total, 4"),
    (_MANY, "dp4a.s32.s32 total, $5", "dp4a.s32.s32 total, $4"),
    (_MANY, "st.shared.f32 [$1+32]", "st.shared.f32 [$1+64]"),
    (_WHOLE, "shl.b32 more, total, 8", "shl.b32 more, total, 7"),
    (_WHOLE, "shfl.sync.bfly.b32 more, total, 1", "shfl.sync.bfly.b32 more, total, 2"),
    (_WHOLE, "shl.b32 total, total, 4", "shl.b32 total, total, 3"),
    (_WHOLE, "selp.b32 total, total, more, odd", "selp.b32 total, more, total, odd"),
]


@pytest.mark.parametrize(("tile", "old", "new"), SUMS_EDITS)
def test_an_edit_of_the_sums_of_groups_is_noticed(tile, old, new):
    assert sums_text(tile).has((old, new))
    with pytest.raises((AssertionError, PtxError)), np.errstate(all="ignore"):
        check_product(tile, sums_edit=(old, new))


def test_scales_are_loaded_as_many_at_once_as_lie_side_by_side():
    assert Tile(4, 32, 16, 16, False).ptx.scales_at_once == 16
    assert Tile(4, 32, 16, 4, False).ptx.scales_at_once == 8
    assert Tile(4, 32, 16, 7, False).ptx.scales_at_once == 2
    assert Tile(4, 32, 16, 7, False, offset="zero").ptx.scales_at_once == 4


@pytest.mark.parametrize("rows", [2, 4, 8, 16])
@pytest.mark.parametrize("size", [32, 64])
def test_of_one_sequence_weights_are_read_without_conflicts_of_banks(rows, size):
    assert check_product(Tile(4, size, rows, 2, True)).conflicts == 0
