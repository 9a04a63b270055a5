"""Sums of squares of several sequences, for the norm that stands in the way of every product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jax import Array

from pallas_kernels.asm import LANE, TID, Block, Register
from pallas_kernels.inline_ptx.operation import Operation
from pallas_kernels.stream.half2 import Format
from pallas_kernels.stream.plan import QUAD
from pallas_kernels.stream.ptx.half2 import Parting

__all__ = ["Squares", "sum_squares"]

# Sums that grow side by side: each addition waits for the one before it.
_CHAINS = 4


def _write_squares(
    b: Block,
    total: Register,
    address: Register,
    *values: Register,
    warps: int,
    form: Format | None,
) -> None:
    """Operands: where the warps' sums lie, and numbers; with a format, words of two."""
    squares = Squares(b, len(values) * (1 if form is None else 2), warps)
    for value in values if form is None else _parted(b, values, form):
        squares.add(value)
    squares.write_total(total, address)


class Squares:
    """The text that sums up squares: registers for it."""

    def __init__(self, b: Block, count: int, warps: int):
        """Declares registers.

        Args:
            b: the text.
            count: numbers of a thread.
            warps: of the program.
        """
        self._b, self._warps, self._chains, self._added = b, warps, min(_CHAINS, count), 0
        self._sums = [b.f32("sum") for _ in range(max(self._chains, warps))]

    def add(self, value: Register) -> None:
        """Adds a number's square."""
        to = self._sums[self._added % self._chains]
        if self._added < self._chains:
            self._b.mul_rn(to, value, value)
        else:
            self._b.fma(to, value, value, to)
        self._added += 1

    def write_total(self, total: Register, address: Register) -> None:
        """Makes the sum of all of a sequence's, when all numbers have been added."""
        _write_total(self._b, total, address, self._sums, self._chains, self._warps)


def _write_total(
    b: Block, total: Register, address: Register, sums: list[Register], chains: int, warps: int
) -> None:
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


def _parted(b: Block, words: Sequence[Register], form: Format) -> Iterator[Register]:
    """The activations of words, one by one; the next word's lie in the same registers."""
    parting = Parting(b, form)
    first, second = b.f32s("first", "second")
    for word in words:
        parting.write(first, second, word)
        yield first
        yield second


def _add_up(b: Block, numbers: list[Register]) -> None:
    """Adds them up, two by two, into the first."""
    apart = 1
    while apart < len(numbers):
        for i in range(0, len(numbers) - apart, 2 * apart):
            b.add(numbers[i], numbers[i], numbers[i + apart])
        apart *= 2


_sum_squares = Operation("ffjax_sum_squares", _write_squares)


def sum_squares(
    address: Array, values: Sequence[Array], warps: int, form: Format | None = None
) -> Array:
    """The sum of the squares of each thread's sequence, always in the same order: float32
    `[threads]`.

    The barrier in it is not enough for a second call at once: another must stand between.

    Args:
        address: int32 scalar, a multiple of 16: 4 bytes a sequence and warp of shared memory.
        values: float32 `[threads]`; or int32, words of two. Each 4 neighbouring threads of every
            warp have the same sequence's.
        warps: of the program, 4 or 8.
        form: of the words' activations, whose squares are summed in multiples of its unit; None
            where the values are no words.
    """
    return _sum_squares(address, *values, results=["float32"], warps=warps, form=form)[0]
