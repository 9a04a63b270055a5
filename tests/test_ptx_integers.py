"""The inline PTX of quantized weights, run on a CPU: digits of activations, and products."""

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
from pallas_kernels.dims import GROUP
from pallas_kernels.stream import ptx
from pallas_kernels.stream.fragment_layout import first_input, first_read, place_aside
from pallas_kernels.stream.layout import SPARE_BYTES
from pallas_kernels.stream.plan import COLUMNS, READ

pytestmark = pytest.mark.once(
    "The machine and the texts are ours; a sample shows that they are traced.",
    sample=[
        "test_no_number_stays_none",
        "test_warps_make_their_products_in_any_order",
    ],
)

# Digits


@functools.cache
def digits_text(count: int, bits: int, halved: bool) -> Inline:
    def body() -> None:
        values = [jnp.zeros((64,), jnp.float32)] * count
        ptx.pack_digits(values, bits, halved=halved, interpret=False)

    return inline(body)


def run_digits(
    values: np.ndarray, bits: int, machine: Machine, edit: Edit = None, *, halved: bool = False
) -> tuple[list[np.ndarray], np.ndarray]:
    """Digits of `[inputs, T]` values, and their scale."""
    text = digits_text(len(values), bits, halved).edited(edit)
    *words, scale = text.run(machine, *(x.view(np.uint32) for x in values))
    return words, np.asarray(scale).view(np.float32)


def check_digits(bits: int, reads: int, halved: bool, edit: Edit = None) -> None:
    rng = np.random.default_rng(bits + reads)
    sharing = 8 if halved else 4
    count, threads = reads * 128 // bits // (1 + halved), 64
    spread = np.exp(rng.uniform(-20, 20, threads // sharing)).repeat(sharing)
    values = (rng.standard_normal((count, threads)) * spread).astype(np.float32)
    values[:, 8:16] = 0  # of a sequence that there is not
    values[0, 16:20] = [1, -1, 1, 0.25]  # ends of the range
    values[1:, 16:20] /= 1e12
    values[:, 20:24] /= 1e12
    words, scale = run_digits(values, bits, Machine(threads, 16, 16), edit, halved=halved)
    words = [jnp.asarray(w, jnp.int32) for w in words]
    back = np.stack(ptx.unpack_digits(words, jnp.asarray(scale), bits, halved=halved))
    largest = np.abs(values).max(axis=0).reshape(-1, sharing).max(axis=1).repeat(sharing)
    np.testing.assert_allclose(scale, np.maximum(largest, 1e-30) / (127 * 128), rtol=1e-6)
    # Rounded to the scale; and what multiplies is not far from it.
    assert (np.abs(back - values) <= 0.5001 * scale + 3e-7 * np.abs(values)).all()
    given = [jnp.asarray(x) for x in values]
    plain, its_scale = ptx.pack_digits(given, bits, halved=halved, interpret=True)
    same = np.stack(ptx.unpack_digits(plain, its_scale, bits, halved=halved))
    assert (np.abs(same - back) <= 1.01 * scale).all()
    # Most words are the same: what is rounded up here may be rounded down there.
    assert np.mean(np.stack(words) == np.stack(plain)) > 0.9


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("reads", [1, 3])
@pytest.mark.parametrize("bits", [8, 4])
def test_digits_are_the_activations_rounded_to_a_scale(bits, reads, halved):
    check_digits(bits, reads, halved)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_number_stays_none(bad):
    values = np.ones((16, 64), np.float32)
    values[3, 5] = bad
    words, scale = run_digits(values, 8, Machine(64, 16, 16))
    with np.errstate(invalid="ignore"):
        words = [jnp.asarray(w, jnp.int32) for w in words]
        back = np.stack(ptx.unpack_digits(words, jnp.asarray(scale), 8, halved=False))
    whole = np.isfinite(back).all(axis=0)
    # Whoever shares the scale shares the fault.
    assert not whole[4:8].any() or not np.isfinite(scale[4:8]).any()
    assert whole[8:].all()


PRMT = "prmt.b32 digits, digits, digits"
DIGIT_EDITS = [
    ("mul.rn.f32 inverse, inverse, 0f467E0000", "mul.rn.f32 inverse, inverse, 0f467C0000"),
    ("mul.rn.f32 *, largest, 0f38810204", "mul.rn.f32 *, largest, 0f38800000"),
    ("fma.rn.f32 rounded, *, inverse, 0f4B400080", "fma.rn.f32 rounded, *, inverse, 0f4B400000"),
    (f"{PRMT}, 0x5140 #1", f"{PRMT}, 0x5150"),
    ("prmt.b32 *, digits, digits, 0x7632", "prmt.b32 *, digits, digits, 0x7633"),
    ("xor.b32 *, digits, 0x80808080", "xor.b32 *, digits, 0x80808000"),
    ("shfl.sync.bfly.b32 other, largest, 2", "shfl.sync.bfly.b32 other, largest, 1"),
    ("abs.f32 other, $8", "abs.f32 other, $9"),
    (f"{PRMT}, 0x5410", f"{PRMT}, 0x5401"),
    ("max.NaN.f32 largest, largest, 0f0DA24260", "max.NaN.f32 largest, largest, 0f00000000"),
    ("shfl.sync.bfly.b32 digits_2, digits_1, 4", "shfl.sync.bfly.b32 digits_2, digits_1, 1"),
    ("selp.b32 digits_1, $0, $2, odd", "selp.b32 digits_1, $2, $0, odd"),
]


@pytest.mark.parametrize(("old", "new"), DIGIT_EDITS)
def test_an_edit_of_the_digits_is_noticed(old, new):
    assert digits_text(8, 8, True).has((old, new))
    with pytest.raises((AssertionError, PtxError)), np.errstate(all="ignore"):
        check_digits(8, 1, True, (old, new))


# A tile's products


@dataclasses.dataclass(frozen=True)
class Tile(Planned):
    """What a product is made of."""

    bits: int
    rows: int
    reads: int
    chunked: bool
    product_warps: int = 4
    warps: int = 4
    short: int = 0  # inputs that a row lacks of the span
    run: int = 1

    @property
    def grain(self) -> int:
        return 8 * READ // self.bits

    @property
    def part(self) -> Any:
        held = self.grain // 2 if self.chunked else self.grain
        sizes = {"reads": self.reads, "grain": self.grain, "held": held, "rows": self.rows}
        return SimpleNamespace(**sizes, bits=self.bits, fine=False)

    @property
    def span(self) -> int:
        return self.product_warps * self.reads * self.line * self.grain

    @property
    def inner(self) -> int:
        return self.span - self.short

    @property
    def scale_bytes(self) -> int:
        return 4 if self.bits == 8 else 2 * (self.inner // GROUP)


@functools.cache
def product_text(tile: Tile) -> Inline:
    plan = tile.plan

    def body() -> None:
        none = jnp.zeros((plan.threads,), jnp.int32)
        words = [none] * (tile.reads * tile.part.held // 2)
        ptx.multiply_integers(
            none,
            none,
            none,
            none,
            jnp.zeros((plan.threads,), jnp.float32),
            none,
            words,
            ptx.IntegerTile(
                bits=tile.bits,
                rows=tile.rows,
                reads=tile.reads,
                step=READ * tile.line,
                scale_bytes=tile.scale_bytes,
                ragged=tile.short > 0,
                chunked=tile.chunked,
                threads=32 * tile.product_warps,
            ),
        )

    return inline(body)


def weights_of(tile: Tile, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random weights: what they are, their rows as bytes, and those of their scales."""
    if tile.bits == 8:
        integers = rng.integers(-127, 128, (tile.rows, tile.inner), np.int8)
        scales = np.exp(rng.uniform(-2, 2, (tile.rows, 1))).astype(np.float32)
        data = integers.view(np.uint8)
        return integers * scales.astype(np.float64), data, scales.view(np.uint8)
    integers = rng.integers(0, 16, (tile.rows, tile.inner))
    scales = jnp.asarray(rng.standard_normal((tile.rows, tile.inner // GROUP)), jnp.bfloat16)
    data = np.asarray(pack(jnp.asarray(integers))).view(np.uint8).reshape(tile.rows, -1)
    values = np.asarray(scales).astype(np.float64).repeat(GROUP, axis=1)
    return (integers - 8) * values, data, np.asarray(scales).view(np.uint8)


def check_product(tile: Tile, edit: Edit = None, order: np.random.Generator | None = None) -> None:
    """A tile in shared memory times activations in registers, against float64."""
    rng, plan = np.random.default_rng(0), tile.plan
    weights, data, scales = weights_of(tile, rng)
    floats = tile.columns * tile.product_warps * tile.rows
    beyond = 2 * tile.span  # that a whole span of the last row reaches
    size = data.size + scales.size + beyond + 4 * floats + 512
    size += SPARE_BYTES * plan.threads // 32
    machine = Machine(plan.threads, -(-size // 16) * 16, 16, order=order)
    ring = machine.shared_base
    # Beyond rows lies anything, of which many are no numbers.
    machine.view(ring, data.size + scales.size + beyond, np.uint8)[:] = 0xFF
    machine.view(ring, data.size, np.uint8)[:] = data.ravel()
    machine.view(ring + data.size, scales.size, np.uint8)[:] = scales.ravel()
    sequences = 1 if tile.chunked else COLUMNS
    inputs = rng.standard_normal((sequences, tile.inner)).astype(np.float32)
    padded = np.pad(inputs, ((0, 0), (0, tile.short)))
    thread = np.arange(plan.threads)
    column = thread % 32 // 4
    first = np.asarray(first_input(plan, tile.part))
    step, part = tile.line * tile.grain, tile.part
    at = np.stack([first + q * step + j for q in range(tile.reads) for j in range(part.held)])
    held = padded[0 if tile.chunked else column, at]
    held = np.where(thread < 32 * tile.product_warps, held, 0).astype(np.float32)
    given, halved = [jnp.asarray(x) for x in held], tile.chunked
    words, scale = ptx.pack_digits(given, tile.bits, halved=halved, interpret=True)
    products = ring + -(-(data.size + scales.size + beyond) // 16) * 16
    spare = products + 4 * floats + 256
    machine.spare = range(spare, ring + size)
    where = np.asarray(place_aside(plan, part, products, spare))
    read = np.asarray(first_read(plan, part))
    product_text(tile).edited(edit).run(
        machine,
        ring + READ * read,
        data.shape[1],
        where,
        ring + data.size,
        np.asarray(scale).view(np.uint32),
        read * tile.grain // GROUP,
        *(np.asarray(word).view(np.uint32) for word in words),
    )
    after = machine.view(products + 4 * floats, 256, np.uint8)
    assert (after == 0xFF).all(), "More is stored than the products."
    stored = machine.view(products, floats, np.float32).astype(np.float64)
    if tile.chunked:
        got = stored.reshape(-1, tile.rows).sum(axis=0)[:, None]
    else:
        got = stored.reshape(tile.product_warps, tile.rows, COLUMNS).sum(axis=0)
    # What the digits stand for, and no other rounding than of some sums.
    digits = np.stack(ptx.unpack_digits(words, scale, tile.bits, halved=halved), dtype=np.float64)
    exact = np.zeros((sequences, tile.span))
    for i in range(len(at)):
        mine = thread < 32 * tile.product_warps
        exact[0 if tile.chunked else column[mine], at[i, mine]] = digits[i, mine]
    wanted = weights @ exact[:, : tile.inner].T
    bound = np.abs(weights) @ np.abs(exact[:, : tile.inner]).T
    assert (np.abs(got - wanted) <= 1e-6 * bound).all()
    close = weights @ inputs.T.astype(np.float64)
    assert np.linalg.norm(got - close) <= 4e-4 * np.linalg.norm(bound) / tile.inner**0.5


CHUNKED = [
    Tile(8, 2, 2, True),
    Tile(8, 4, 1, True),
    Tile(8, 16, 1, True, short=48),
    Tile(8, 8, 3, True, 4, 8),
    Tile(8, 2, 5, True),
    Tile(8, 8, 4, True),
    Tile(4, 16, 1, True),
    Tile(4, 4, 2, True, short=3 * GROUP),
    Tile(4, 2, 2, True),
]
BATCHED = [
    Tile(8, 8, 3, False),
    Tile(8, 16, 2, False, 8, 8),
    Tile(8, 4, 4, False, short=16),
    Tile(4, 16, 3, False),
    Tile(4, 32, 2, False, 8, 8),
    Tile(8, 32, 1, False, short=16),
    Tile(4, 8, 2, False, short=GROUP),
    Tile(4, 2, 1, False, 8, 8),
    # Of wide rows, some reads are loaded at once.
    Tile(8, 8, 9, False),
    Tile(8, 16, 10, False, 8, 8, short=16),
    Tile(4, 16, 5, False),
    Tile(4, 8, 8, False, short=GROUP),
]


@pytest.mark.parametrize("tile", [*CHUNKED, *BATCHED], ids=str)
def test_a_tiles_products_are_its_rows_times_the_digits(tile):
    check_product(tile)


def test_warps_make_their_products_in_any_order():
    check_product(Tile(8, 8, 2, True, 4, 8), order=np.random.default_rng(3))


SHFL = "shfl.sync.idx.b32 own_scale, $5"
PRODUCT_EDITS = [
    (Tile(4, 4, 2, True), "lop3.b32 *, *, *, *, 0x28", "lop3.b32 *, *, *, *, 0x48"),
    (Tile(4, 4, 2, True), "shl.b32 x_1, x_raw_1, 4", "shl.b32 x_1, x_raw_1, 0"),
    (
        Tile(4, 4, 2, True),
        "mul.rn.f32 own_scale, own_scale, 0f3D800000",
        "mul.rn.f32 own_scale, own_scale, 0f3D000000",
    ),
    (Tile(4, 4, 2, True), "mad.lo.u32 scale_place, $6, 2", "mad.lo.u32 scale_place, $6, 0"),
    (
        Tile(4, 4, 2, True),
        "mad.lo.s32 scratch, high_sum_1, 256, high_sum_2",
        "mad.lo.s32 scratch, high_sum_2, 256, high_sum_1",
    ),
    (Tile(8, 4, 1, True), "mad.lo.s32 scratch, *, 256", "mad.lo.s32 scratch, *, 255"),
    (Tile(8, 4, 1, True), "ld.shared.f32 *, [scale_place+4]", "ld.shared.f32 *, [scale_place+8]"),
    (Tile(8, 4, 1, True), "st.shared.v2.f32 [$3]", "st.shared.v2.f32 [$3+16]"),
    (
        Tile(8, 2, 5, True),
        "add.s32 high_sum_1, high_sum_1, high_sum_9",
        "add.s32 high_sum_1, high_sum_1, high_sum_5",
    ),
    (Tile(8, 8, 3, False), f"{SHFL}, lane", f"{SHFL}, quad"),
    (Tile(8, 16, 2, False), "st.shared.v2.f32 [$3+256]", "st.shared.v2.f32 [$3+128]"),
    (Tile(8, 16, 2, False), "shl.b32 other_row, $2, 3", "shl.b32 other_row, $2, 2"),
    (Tile(8, 32, 1, False), "shl.b32 other_row, $2, 4", "shl.b32 other_row, $2, 3"),
    (
        Tile(4, 32, 1, False),
        "add.u32 scale_place, scale_place",
        "sub.u32 scale_place, scale_place",
    ),
    (Tile(4, 32, 1, False), "st.shared.v2.f32 [$3+512]", "st.shared.v2.f32 [$3+128]"),
    (Tile(8, 8, 9, False), "ld.shared.v4.b32 *, [row+512]", "ld.shared.v4.b32 *, [row+448]"),
    (Tile(4, 16, 5, False), "ld.shared.v4.b32 *, [other_row+256]", "ld.shared.v4.b32 *, [row+256]"),
    (Tile(4, 4, 2, True, short=3 * GROUP), "@is_some fma.rn.f32", "fma.rn.f32"),
]


@pytest.mark.parametrize(("tile", "old", "new"), PRODUCT_EDITS)
def test_an_edit_of_the_products_is_noticed(tile, old, new):
    assert product_text(tile).has((old, new))
    with pytest.raises((AssertionError, PtxError)), np.errstate(all="ignore"):
        check_product(tile, (old, new))
