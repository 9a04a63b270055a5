"""The inline PTX of wide rows' activations, run on a CPU: fragments of words of two."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx_inline import Edit, Inline, inlines, shape
from ptx_machine import Machine, PtxError

from pallas_kernels.stream import half2, ptx

pytestmark = pytest.mark.once(
    "The machine and the texts are ours; a sample shows that they are traced.",
    sample=[
        "test_fragments_of_words_are_those_of_their_numbers[normed, 4]",
    ],
)

WARPS, TAG = 4, 0x00010000
THREADS = 32 * WARPS
ROOM = 8 * 4 * WARPS


@dataclasses.dataclass(frozen=True)
class Case:
    """A segment's activations.

    Attributes:
        bits: of the weights.
        pieces: of a thread.
        held: inputs of a read.
        normed: whether they are the residual.
        more: what is added to the norm's weights; None: nothing.
        whole: whether all pieces have weights.
    """

    bits: int
    pieces: int
    held: int
    normed: bool
    more: float | None = None
    whole: bool = False

    @property
    def form(self) -> half2.Format:
        return half2.RESIDUAL if self.normed else half2.PLAIN

    @property
    def places(self) -> list[int]:
        """Elements from a thread's first weight of a norm to each of its pieces."""
        return [8 * q + 64 * (q // 2) for q in range(self.pieces)]


# A read of int4 is of four pieces, one of int8 of two, and one of groups of 32 of one.
CASES = {
    "plain, 8": Case(8, 6, 16, False),
    "plain, 4": Case(4, 20, 32, False),
    "plain, 4 in groups": Case(4, 3, 8, False),
    "plain, 16": Case(16, 5, 8, False),
    "normed, 8": Case(8, 18, 16, True),
    "normed, 4": Case(4, 8, 32, True),
    "normed, 4, with ones added": Case(4, 4, 32, True, 1.0),
    "normed, 4, whole": Case(4, 4, 32, True, whole=True),
    "normed, 4, whole, with ones added": Case(4, 4, 32, True, 1.0, whole=True),
    "normed, 16": Case(16, 3, 8, True),
    "normed, 16, with ones added": Case(16, 2, 8, True, 1.0),
}


def norm_of(case: Case, weights: Any, each: Any) -> ptx.NormRow | None:
    if not case.normed:
        return None
    more = None if case.more is None else jnp.full((THREADS,), case.more)
    row = ptx.Choice([weights], [], each)
    there = None if case.whole else each
    return ptx.NormRow(row, there, case.places, more, jnp.int32(0), WARPS)


@functools.cache
def packed_text(case: Case) -> Inline:
    """Words, tags, the norm's weights, how many pieces have such, what is added, and more."""

    def body(weights: Any) -> None:
        each = jnp.zeros((THREADS,), jnp.int32)
        words, norm = [each] * (4 * case.pieces), norm_of(case, weights, each)
        if case.bits == 16:
            scale = jnp.zeros((THREADS,)) if case.normed else None
            made = ptx.pack_held(words, each, case.form, norm, scale)
        else:
            made, *_ = ptx.pack_held_digits(words, each, case.bits, case.form, norm, held=case.held)
        # Of no use, it would be dropped.
        ptx.write_row(each, [made[0]] * 8, each == 0)

    return inlines(body, shape(16, jnp.bfloat16))[0]


@functools.cache
def separate_texts(case: Case) -> list[Inline]:
    """Digits of float32; and sums of squares of such, for comparison."""

    def body() -> None:
        values = [jnp.zeros((THREADS,))] * (8 * case.pieces)
        ptx.pack_digits(values, case.bits, halved=False, interpret=False, held=case.held)
        ptx.sum_squares(jnp.int32(0), values, WARPS)

    return inlines(body)


def activations(case: Case, seed: int) -> np.ndarray:
    """Float32 `[8 * pieces, T]`: columns of any size, one of zeros, and one with an outlier."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.uniform(-4, 4, 8)).astype(np.float32)
    size[3] = 0
    values = rng.standard_normal((8 * case.pieces, WARPS, 8, 4)).astype(np.float32)
    values *= size[:, None]
    values[5, 1, 2, 3] = 4096 * size[2]
    return values.reshape(8 * case.pieces, THREADS)


def words_of(case: Case, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Their words, uint32 `[4 * pieces, T]`, and the numbers that these stand for."""
    first, second = jnp.asarray(values[::2]), jnp.asarray(values[1::2])
    # Bit 1 of the tag is set.
    words = jax.jit(half2.pack_half2, static_argnums=3)(first, second, jnp.int32(2), case.form)
    kept = jax.jit(half2.unpack_half2, static_argnums=1)(words, case.form)
    assert (np.asarray(words) & half2.HALF2_TAG_BITS == TAG).all()
    numbers = np.stack([np.asarray(x) for x in kept], axis=1).reshape(values.shape)
    return np.asarray(words).view(np.uint32), numbers


def as_bfloat16(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16)).astype(np.float32)


def check_packed(
    case: Case,
    edit: Edit = None,
    seed: int = 0,
    order: np.random.Generator | None = None,
    values: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What the text makes is what those of float32 make, bit by bit; returns it."""
    rng = np.random.default_rng(seed)
    words, numbers = words_of(case, activations(case, seed) if values is None else values)
    text = packed_text(case).edited(edit)
    # Weights as far as the last thread's: those of pieces that are not there may lie beyond.
    size = 8 * THREADS + case.places[-1] + 8
    machine = Machine(THREADS, ROOM + 32, 2 * size, order=order)
    weights = as_bfloat16(rng.uniform(-2, 2, size).astype(np.float32))
    memory = machine.view(machine.memory_base, size // 2, np.uint32)
    memory[:] = (weights.view(np.uint32)[1::2] & 0xFFFF0000) | (weights.view(np.uint32)[::2] >> 16)
    thread = np.arange(THREADS)
    there = np.where((thread % 5 != 0) | case.whole, case.pieces, thread % case.pieces)
    more: list[Any] = [TAG]
    scale = rng.uniform(0.5, 2, THREADS).astype(np.float32)
    before = machine.shared.copy()
    if case.normed:
        more += [machine.memory_base + 16 * thread, *([] if case.whole else [there])]
        more += [] if case.more is None else [np.full(THREADS, case.more, np.float32)]
        more += [scale] if case.bits == 16 else [machine.shared_base + 16]
    with np.errstate(all="ignore"):
        made = [np.asarray(x) for x in text.run(machine, *words, *more)]
    by = np.ones_like(numbers)
    if case.normed:
        for q, place in enumerate(case.places):
            at = 8 * thread + place + np.arange(8)[:, None]
            some = np.where(q < there, weights[np.minimum(at, size - 1)], 1)
            by[8 * q : 8 * (q + 1)] = some + np.float32(case.more or 0)
    wanted: list[np.ndarray]
    with np.errstate(all="ignore"):
        if case.bits == 16:
            products = numbers * (scale if case.normed else np.float32(1)) * by
            bits = as_bfloat16(products).view(np.uint32)
            bits = np.where(np.isnan(products), 0x7FFF0000, bits)  # the hardware's
            wanted = [(bits[1::2] & 0xFFFF0000) | (bits[::2] >> 16)]
            got, scales = np.stack(made), np.zeros(THREADS, np.uint32)
        else:
            other, digits, squares = Machine(THREADS, ROOM + 32, 16), *separate_texts(case)
            of_numbers = digits.run(other, *(numbers * by).view(np.uint32))
            wanted = [np.stack(of_numbers[:-1]), np.asarray(of_numbers[-1])]
            count = 4 * case.pieces
            got, scales = np.stack(made[:count]), made[count]
            if case.normed:
                address = other.shared_base + 16
                [total] = squares.run(other, address, *numbers.view(np.uint32))
                np.testing.assert_array_equal(made[-1].view(np.uint32), total.view(np.uint32))
                np.testing.assert_array_equal(machine.shared, other.shared)
    np.testing.assert_array_equal(got.view(np.uint32), wanted[0].view(np.uint32))
    for one in wanted[1:]:
        np.testing.assert_array_equal(scales.view(np.uint32), one.view(np.uint32))
    beside = [slice(16), slice(16 + ROOM, None)]
    assert all((machine.shared[part] == before[part]).all() for part in beside)
    return got, scales


@pytest.mark.parametrize("name", CASES)
def test_fragments_of_words_are_those_of_their_numbers(name):
    check_packed(CASES[name])


@pytest.mark.parametrize("name", ["normed, 8", "normed, 4"])
def test_warps_make_them_in_any_order(name):
    check_packed(CASES[name], order=np.random.default_rng(1))


@pytest.mark.parametrize("name", ["plain, 8", "plain, 16", "normed, 4", "normed, 16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_number_stays_none(name, bad):
    case = CASES[name]
    values = activations(case, 1)
    values[11, 41] = bad
    words, scale = check_packed(case, values=values)
    if case.bits == 16:
        number = (words[5:6, 41] & np.uint32(0xFFFF0000)).view(np.float32)[0]
        assert np.isnan(number) if np.isnan(bad) else np.isinf(number)
    else:
        assert not np.isfinite(scale.view(np.float32)[40:44]).any()


EDITS: list[tuple[str, tuple[str, str]]] = [
    # The first time words are parted, and the second.
    ("normed, 4", ("and.b32 kept, *, 0xfffefffe #5", "and.b32 kept, *, 0xfffeff00")),
    ("normed, 4", ("xor.b32 kept, *, * #3", "and.b32 kept, *, 0xffffffff")),
    ("plain, 8", ("xor.b32 kept, *, * #3", "and.b32 kept, *, 0x7ffe7ffe")),
    # The largest.
    ("plain, 8", ("max.NaN.f16x2 most, most, magnitudes", "")),
    ("plain, 8", ("and.b32 most, *, 0x7ffe7ffe", "and.b32 most, *, 0xffffffff")),
    ("plain, 8", ("max.NaN.f32 largest, first, second", "mov.b32 largest, first")),
    ("plain, 8", ("max.NaN.f32 largest, first, second", "mov.b32 largest, second")),
    ("normed, 8", ("max.NaN.f32 largest, largest, other", "")),
    # The norm.
    ("normed, 4", ("setp.gt.s32 is_there, *, 3", "setp.ge.s32 is_there, *, 3")),
    ("normed, 4", ("ld.global.nc.v4.b32 *, [*+16]", "ld.global.nc.v4.b32 *, [*+32]")),
    ("normed, 4", ("mov.b32 weights, 0x3f803f80", "mov.b32 weights, 0")),
    ("normed, 16", ("mul.rn.f32 value, value, weight #7", "")),
    ("normed, 16", ("shl.b32 weight, weights, 16 #2", "shl.b32 weight, weights, 15")),
    ("normed, 16", ("and.b32 weight, weights, 0xffff0000", "mov.b32 weight, weights")),
    ("normed, 16", ("mul.rn.f32 value, value, $27 #4", "")),
    ("normed, 4, with ones added", ("add.rn.f32 weight, weight, * #9", "")),
    # Sums of squares.
    ("normed, 8", ("fma.rn.f32 sum_2, value, value, sum_2 #3", "")),
    ("normed, 8", ("bar.sync 0", "")),
    # What comes where.
    (
        "plain, 16",
        ("cvt.rn.bf16x2.f32 *, value_2, value_1", "cvt.rn.bf16x2.f32 *, value_1, value_2"),
    ),
    ("plain, 4", ("prmt.b32 *, digits, digits, 0x7632 #9", "prmt.b32 *, digits, digits, 0x7633")),
    ("plain, 4", ("fma.rn.f32 rounded, value_5, *, *", "fma.rn.f32 rounded, value_6, *, *")),
]


@pytest.mark.parametrize(("name", "edit"), EDITS, ids=str)
def test_an_edit_is_noticed(name, edit):
    assert packed_text(CASES[name]).has(edit)
    with pytest.raises((AssertionError, PtxError)), np.errstate(all="ignore"):
        check_packed(CASES[name], edit, order=np.random.default_rng(1))


def test_the_largest_of_words_is_that_of_both_halves():
    """Each half has the largest of some column."""
    case = CASES["plain, 8"]
    values = activations(case, 2)
    values[8, 16:20], values[13, 24:28] = 1e3, -1e3
    check_packed(case, values=values)
