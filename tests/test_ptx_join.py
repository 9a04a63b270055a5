"""The inline PTX that joins what a program's warps have made of attention, run on a CPU."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from ptx_inline import Edit, Inline, inline
from ptx_machine import Machine, PtxError

from pallas_kernels.stream import ptx

pytestmark = pytest.mark.once(
    "The machine and the text are ours; a sample shows that it is traced.",
    sample=["test_warps_are_joined"],
)

WARPS, SIZE = 8, 64


@functools.cache
def join_text(width: int, all_there: bool, threads: int, step: int, out_step: int) -> Inline:
    def body() -> None:
        zero = jnp.zeros((threads,), jnp.int32)
        count = None if all_there else jnp.int32(0)
        ptx.join_warps(zero, zero, count, width, WARPS, step, out_step)

    return inline(body)


def check_join(width: int, there: int | None, edit: Edit = None) -> None:
    """Joins `there` of 8 warps; what the others have is poison, and so is what lies between."""
    rows = 4
    threads, pitch = rows * SIZE // width, 4 * SIZE + 16
    step, out_step = 8 * 8, 8 * pitch
    machine = Machine(threads, WARPS * (step + out_step), 16)
    machine.shared[:] = 0xFF
    rng = np.random.default_rng(width)
    top = 30 * rng.normal(size=(WARPS, rows)) - 20
    # A warp without a position has the lowest maximum, and sums of no use.
    top[1, 2] = -1e30
    total = rng.uniform(1, 200, (WARPS, rows))
    out = rng.normal(size=(WARPS, rows, SIZE))
    number = WARPS if there is None else there
    words = machine.shared.view(np.float32)
    sums = words[: WARPS * 16].reshape(WARPS, 8, 2)
    values = words[WARPS * 16 :].reshape(WARPS, 8, pitch // 4)
    sums[:number, :rows, 0], sums[:number, :rows, 1] = top[:number], total[:number]
    values[:number, :rows, :SIZE] = out[:number]

    thread = np.arange(threads)
    row, element = thread * width // SIZE, thread * width % SIZE
    base = machine.shared_base
    places = base + 8 * row, base + WARPS * step + pitch * row + 4 * element
    text = join_text(width, there is None, threads, step, out_step).edited(edit)
    got_top, got_total, *got = text.run(machine, *places, number)

    largest = top[:number].max(axis=0)
    weight = np.exp2(top[:number] - largest)
    np.testing.assert_allclose(got_top, largest[row], rtol=1e-6)
    total = (weight * total[:number]).sum(axis=0)
    np.testing.assert_allclose(got_total, total[row], rtol=1e-5)
    out = (weight[..., None] * out[:number]).sum(axis=0)
    for i, values in enumerate(got):
        np.testing.assert_allclose(values, out[row, element + i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("there", [1, 2, 5, 8, None])
def test_warps_are_joined(width, there):
    check_join(width, there)


EDITS = [
    ("setp.gt.s32 is_there, $8, 3", "setp.ge.s32 is_there, $8, 3"),
    ("@is_there ld.shared.v4.f32", "ld.shared.v4.f32"),
    ("mov.b32 warp_top_5, *", "mov.b32 warp_top_5, 0f7149F2CA"),
    ("ld.shared.v2.f32 {warp_top_2, warp_total_2}", ""),
    ("ld.shared.v2.f32 {warp_top_2, warp_total_2}, [$6+64]", "ld.shared.v2.f32 *, [$6+128]"),
    ("ld.shared.v4.f32 *, [$7+*] #2", "ld.shared.v4.f32 *, [$7]"),
    ("max.f32 $0, $0, warp_top_3", ""),
    ("ex2.approx.ftz.f32 warp_top_2, warp_top_2", ""),
    ("sub.f32 warp_top_1, warp_top_1, $0", ""),
    ("fma.rn.f32 $1, warp_total_3, warp_top_3, $1", ""),
    ("fma.rn.f32 $5, *, warp_top_2, $5", ""),
]


@pytest.mark.parametrize(("old", "new"), EDITS)
def test_an_edit_is_noticed(old, new):
    with pytest.raises((AssertionError, PtxError)):
        check_join(4, 3, (old, new))
