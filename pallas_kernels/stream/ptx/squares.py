"""Sums of squares of several sequences, for the norm that stands in the way of every product."""

from __future__ import annotations

from collections.abc import Sequence

from jax import Array

from pallas_kernels.asm import LANE, TID, Block, Register
from pallas_kernels.stream.plan import QUAD
from pallas_kernels.stream.ptx.operation import Operation

__all__ = ["sum_squares"]

# Sums that grow side by side: each addition waits for the one before it.
_CHAINS = 4


def _write_squares(
    b: Block, total: Register, address: Register, *values: Register, warps: int
) -> None:
    chains, count = min(_CHAINS, len(values)), len(values)
    sums = [b.f32("sum") for _ in range(max(chains, warps))]
    for i in range(count):
        to = sums[i % chains]
        if i < chains:
            b.mul_rn(to, values[i], values[i])
        else:
            b.fma(to, values[i], values[i], to)
    _add_up(b, sums[:chains])
    b.comment("The four threads of a sequence; then one puts the warp's sum beside the others'.")
    other = b.f32("other")
    for step in (1, 2):
        b.shfl_bfly(other, sums[0], step)
        b.add(sums[0], sums[0], other)
    lane, row, in_quad, is_first = b.u32("lane"), b.u32("row"), b.u32("in_quad"), b.pred("is_first")
    warp, place = b.u32("warp"), b.u32("place")
    b.mov(lane, LANE)
    b.shr(row, lane, 2)
    b.mad_lo(row, row, 4 * warps, address)
    b.and_(in_quad, lane, QUAD - 1)
    b.setp("eq", is_first, in_quad, 0)
    b.mov(warp, TID)
    b.shr(warp, warp, 5)
    b.mad_lo(place, warp, 4, row)
    with b.when(is_first):
        b.st_shared(place, sums[0])
    b.bar_program()
    for first in range(0, warps, 4):
        b.ld_shared(sums[first : first + 4], row + 4 * first)
    _add_up(b, sums[:warps])
    b.mov(total, sums[0])


def _add_up(b: Block, numbers: list[Register]) -> None:
    """Adds them up, two by two, into the first."""
    apart = 1
    while apart < len(numbers):
        for i in range(0, len(numbers) - apart, 2 * apart):
            b.add(numbers[i], numbers[i], numbers[i + apart])
        apart *= 2


_sum_squares = Operation("ffjax_sum_squares", _write_squares)


def sum_squares(address: Array, values: Sequence[Array], warps: int) -> Array:
    """The sum of the squares of each thread's sequence, always in the same order: float32
    `[threads]`.

    The barrier in it is not enough for a second call at once: another must stand between.

    Args:
        address: int32 scalar, a multiple of 16: 4 bytes a sequence and warp of shared memory.
        values: float32 `[threads]`. Each 4 neighbouring threads of every warp have the same
            sequence's.
        warps: of the program, 4 or 8.
    """
    return _sum_squares(address, *values, results=["float32"], warps=warps)[0]
