"""The inline PTX of sums of squares, and of words of two activations, run on a CPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx_inline import Edit, Inline, inline
from ptx_machine import Machine, PtxError

from pallas_kernels.stream import half2, ptx

pytestmark = pytest.mark.once(
    "The machine and the texts are ours; a sample shows that they are traced.",
    sample=[
        "test_squares_are_summed_over_a_sequence",
    ],
)

RNG = np.random.default_rng(0)
ROOM = 8 * 8 * 4


@functools.cache
def squares_text(count: int, warps: int) -> Inline:
    def body() -> None:
        values = [jnp.zeros((32 * warps,), jnp.float32)] * count
        ptx.sum_squares(jnp.int32(0), values, warps)

    return inline(body)


def check_squares(
    count: int,
    warps: int,
    edit: Edit = None,
    order: np.random.Generator | None = None,
) -> None:
    machine = Machine(32 * warps, ROOM + 32, 16, order=order)
    values = RNG.standard_normal((count, 32 * warps)).astype(np.float32)
    text, before = squares_text(count, warps).edited(edit), machine.shared.copy()
    [got] = text.run(machine, machine.shared_base + 16, *values)
    # [count, warps, sequences, threads]
    squares = (values.astype(np.float64) ** 2).reshape(count, warps, 8, 4)
    wanted = np.broadcast_to(squares.sum(axis=(0, 1, 3))[:, None], squares.shape[2:])
    np.testing.assert_allclose(got, np.tile(wanted.ravel(), warps), rtol=1e-6)
    # Nothing is written beside.
    beside = [slice(16), slice(16 + 4 * 8 * warps, None)]
    assert all((machine.shared[part] == before[part]).all() for part in beside)


@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("count", [8, 24, 128])
def test_squares_are_summed_over_a_sequence(count, warps):
    check_squares(count, warps)


@pytest.mark.parametrize("seed", range(3))
def test_warps_come_in_any_order(seed):
    check_squares(8, 8, order=np.random.default_rng(seed))


def test_no_number_stays_in_its_sequence():
    machine = Machine(128, ROOM, 16)
    values = np.ones((8, 128), np.float32)
    values[3, 37] = np.nan  # sequence 1
    [got] = squares_text(8, 4).run(machine, machine.shared_base, *values)
    assert np.isnan(got.reshape(4, 8, 4)).all(axis=(0, 2)).tolist() == [i == 1 for i in range(8)]
    assert np.isnan(got).sum() == 16


SQUARES_EDITS = [
    ("bar.sync 0", ""),
    ("fma.rn.f32 sum_2, $7, $7, sum_2", "fma.rn.f32 sum_2, $7, $6, sum_2"),
    ("add.f32 sum_1, sum_1, sum_3", ""),
    ("shfl.sync.bfly.b32 other, sum_1, 2", "shfl.sync.bfly.b32 other, sum_1, 4"),
    ("setp.eq.u32 is_first, in_quad, 0", "setp.eq.u32 is_first, in_quad, 1; mov.b32 sum_1, 0"),
    ("mad.lo.u32 row, row, 32", "mad.lo.u32 row, row, 16"),
    ("ld.shared.v4.f32 *, [row+16]", "ld.shared.v4.f32 *, [row]"),
    ("shr.u32 warp, warp, 5", "shr.u32 warp, warp, 6"),
]


@pytest.mark.parametrize(("old", "new"), SQUARES_EDITS)
def test_an_edit_of_the_squares_is_noticed(old, new):
    assert squares_text(8, 8).has((old, new))
    with pytest.raises((AssertionError, PtxError)):
        check_squares(8, 8, (old, new), np.random.default_rng(1))


# Two activations a word


FORMATS = {"plain": half2.PLAIN, "residual": half2.RESIDUAL}
every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


@functools.cache
def unpack_text(form: half2.Format) -> Inline:
    return inline(lambda: ptx.unpack_half2(jnp.zeros((64,), jnp.int32), form))


def check_unpack(words: np.ndarray, form: half2.Format, edit: Edit = None) -> None:
    machine = Machine(64, 16, 16)
    with np.errstate(invalid="ignore", over="ignore"):
        got = np.stack(unpack_text(form).edited(edit).run(machine, words.view(np.uint32)))
    wanted = np.stack(jax.jit(half2.unpack_half2, static_argnums=1)(jnp.asarray(words), form))
    np.testing.assert_array_equal(got, wanted)


def half2_words(form: half2.Format) -> np.ndarray:
    first, second = RNG.standard_normal((2, 64)).astype(np.float32)
    first *= np.float32(10.0) ** RNG.integers(-30, 30, 64).astype(np.float32)
    return np.asarray(half2.pack_half2(jnp.asarray(first), jnp.asarray(second), jnp.int32(2), form))


@every_format
def test_both_ways_to_unpack_half2_agree(form):
    check_unpack(half2_words(form), form)
    check_unpack(np.zeros(64, np.int32), form)
    nothing = jnp.full((64,), jnp.nan)
    check_unpack(np.asarray(half2.pack_half2(nothing, nothing, jnp.int32(2), form)), form)


EDITS = [
    ("and.b32 kept, $2, 0xfffefffe", "and.b32 kept, $2, 0xffffffff"),
    ("and.b32 kept, $2, 0xfffefffe", "and.b32 kept, $2, 0xfffe7ffe"),
    ("and.b32 kept, $2, 0xfffefffe", "and.b32 kept, $2, 0x7ffefffe"),
    ("mov.b32 {low, high}", "mov.b32 {high, low}"),
    ("cvt.f32.f16 $0, low", "cvt.f32.f16 $0, high"),
    ("cvt.f32.f16 $1, high", "cvt.f32.f16 $1, low"),
]
ROOT_EDITS = [
    ("abs.f32 magnitude, $0", "mov.b32 magnitude, $0"),
    ("abs.f32 magnitude, $1", "mov.b32 magnitude, $1"),
    ("abs.f32 magnitude, $1", "abs.f32 magnitude, $0"),
    ("mul.rn.f32 $0, $0, magnitude", ""),
    ("mul.rn.f32 $1, $1, magnitude", ""),
]


@pytest.mark.parametrize(
    ("form", "old", "new"),
    [
        *((form, *edit) for form in FORMATS.values() for edit in EDITS),
        *((half2.PLAIN, *edit) for edit in ROOT_EDITS),
    ],
)
def test_an_edit_of_parting_is_noticed(form, old, new):
    assert unpack_text(form).has((old, new))
    with pytest.raises((AssertionError, PtxError)):
        check_unpack(half2_words(form), form, (old, new))
