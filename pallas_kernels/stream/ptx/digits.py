"""Activations as integers: two digits of 8 bits each, for products with integer weights.

The threads that hold a column's inputs share a scale s, a 16256th of the largest magnitude
among them, and every x becomes s * (256 * high + low), with high of -64 to 64 and low of -128 to
127: rounded to s, where bfloat16 rounds to x / 256. Of a few hundred inputs that is closer, unless
the largest is thousands of times the others; then its own rounding to bfloat16 would be worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.asm import LANE, Block, Register
from pallas_kernels.inline_ptx.operation import Operation
from pallas_kernels.program import iota

__all__ = ["Digits", "held_order", "pack_digits", "packing_order", "unpack_digits"]

# Of 1024 products by weights of 8 bits, the sum is below 2^31.
LARGEST = 127 * 128
# So that nothing is divided by zero.
_SMALLEST = 1e-30
# A float32 to which an integer is added shows it in its lowest bits: here 128 more, so that the
# second byte is the high digit, and the first one is 128 more than the low one.
_MAGIC = 12583040.0


def packing_order(bits: int) -> list[int]:
    """Which of a read's inputs each byte of its digits belongs to, the lowest byte first.

    Weights of 8 bits lie in order. Of words of eight weights of 4 bits (`ffjax.packing`), the low
    nibbles of the bytes become one word of bytes and the high ones another.
    """
    if bits == 8:
        return list(range(16))
    return [8 * word + i for word in range(4) for i in (0, 4, 1, 5, 2, 6, 3, 7)]


def _write_digits(b: Block, *registers: Register, order: tuple[int, ...], halved: bool) -> None:
    """Results: the words, then the scale. Operands: twice as many values as words."""
    count = 2 * ((len(registers) - 1) // 3)
    words, scale, values = registers[: count // 2], registers[count // 2], registers[-count:]
    digits = Digits(b, scale, order, halved)
    digits.largest_is_first(values[0])
    for value in values[1:]:
        digits.look_at(value)
    digits.write_scale()
    held = len(order)
    for word in range(0, count // 4):
        read, within = divmod(word, held // 4)
        four = [values[read * held + order[4 * within + i]] for i in range(4)]
        high, low = digits.places(words, word)
        digits.write_word(high, low, four)


class Digits:
    """The text that makes digits: of the largest magnitude, once that is known, by words."""

    def __init__(self, b: Block, scale: Register, order: Sequence[int], halved: bool):
        """Declares registers.

        Args:
            b: the text.
            scale: is set to the digits' scale.
            order: of a read's inputs that the thread has, as `packing_order`.
            halved: as in `pack_digits`.
        """
        self._b, self._scale, self._order, self._halved = b, scale, order, halved
        self.largest, self._other, self._inverse = b.f32s("largest", "other", "inverse")
        self._digits, self._rounded = b.u32s(*["digits"] * 4), b.f32("rounded")
        self._odd = b.pred("odd")

    def largest_is_first(self, value: Register) -> None:
        """Begins with an input."""
        self._b.abs(self.largest, value)

    def look_at(self, value: Register) -> None:
        """Goes on with another one."""
        self._b.abs(self._other, value)
        self._b.max_nan(self.largest, self.largest, self._other)

    def write_scale(self) -> None:
        """Makes the scale, when all inputs have been looked at."""
        b, largest, other = self._b, self.largest, self._other
        # In a register that is used later.
        lane = self._digits[0]
        b.mov(lane, LANE)
        b.and_(lane, lane, 4)
        b.setp("ne", self._odd, lane, 0)
        for step in (1, 2, 4) if self._halved else (1, 2):
            b.shfl_bfly(other, largest, step)
            b.max_nan(largest, largest, other)
        b.max_nan(largest, largest, _SMALLEST)
        b.rcp(self._inverse, largest)
        b.mul_rn(self._inverse, self._inverse, float(LARGEST))
        b.mul_rn(self._scale, largest, 1 / LARGEST)

    def places(self, words: Sequence[Register], word: int) -> tuple[Register, Register]:
        """Of all results, those of the word-th four inputs: their high digits, and the low ones."""
        held = len(self._order)
        read, within = divmod(word, held // 4)
        first = read * (held // 2) + within
        return words[first], words[first + held // 4]

    def write_word(self, high: Register, low: Register, inputs: Sequence[Register]) -> None:
        """Makes the digits of four inputs, in the order of their bytes."""
        b, odd = self._b, self._odd
        one, two, three, four = self._digits
        for bits, value in zip(self._digits, inputs, strict=True):
            b.fma(self._rounded, value, self._inverse, _MAGIC)
            b.mov(bits, self._rounded)
        b.comment("The second byte of each is its high digit, the first one its low digit + 128.")
        b.prmt(one, one, two, 0x5140)
        b.prmt(three, three, four, 0x5140)
        b.prmt(high, one, three, 0x7632)
        b.prmt(one, one, three, 0x5410)
        b.xor(low, one, 0x80808080)
        if self._halved:
            b.comment("Each of a pair gives the other what that wants.")
            b.selp(one, high, low, odd)
            b.shfl_bfly(two, one, 4)
            b.selp(high, two, high, odd)
            b.selp(low, low, two, odd)


_pack_digits = Operation("ffjax_pack_digits", _write_digits)


def pack_digits(
    values: Sequence[Array],
    bits: int,
    *,
    halved: bool,
    interpret: bool,
    held: int | None = None,
) -> tuple[list[Array], Array]:
    """A column's inputs as digits.

    Args:
        values: float32 `[threads]`, a thread's inputs in order, whole reads or halves of them.
        bits: of the weights they will be multiplied by.
        halved: whether pairs of columns share their reads: the first's threads hold the first
            half of each, and get the high digits of all of it; the second's get the low ones.
        interpret: whether the kernel is interpreted.
        held: inputs of a read that a thread holds; None: of 16 bytes of weights, or halves of them.

    Returns:
        Words, int32 `[threads]`: of every read the high digits, then the low ones, four a word in
        `packing_order`; halved, one of the two. And the scale, float32 `[threads]`, NaN where some
        value is.
    """
    order = held_order(bits, halved, held)
    if not interpret:
        results = ["int32"] * (len(values) // 2) + ["float32"]
        options = {"order": tuple(order), "halved": halved}
        *words, scale = _pack_digits(*values, results=results, **options)
        return words, scale
    stacked, sharing = jnp.stack(values), 8 if halved else 4
    largest = jnp.abs(stacked).max(axis=0).reshape(-1, sharing).max(axis=1)
    largest = jnp.maximum(jnp.repeat(largest, sharing), _SMALLEST)
    whole = jnp.round(stacked / largest * LARGEST).astype(jnp.int32)
    high = lax.shift_right_arithmetic(whole + 128, 8)
    digits = [high & 0xFF, whole & 0xFF]
    words = []
    for read in range(0, len(values), len(order)):
        fours = [order[i : i + 4] for i in range(0, len(order), 4)]
        both = [[_word([digit[read + i] for i in four]) for four in fours] for digit in digits]
        words += _exchanged(*both) if halved else [*both[0], *both[1]]
    return words, largest / LARGEST


def held_order(bits: int, halved: bool, held: int | None) -> list[int]:
    """The part of `packing_order` that a thread's inputs of a read have."""
    order = packing_order(bits)
    return order[: held or len(order) // (1 + halved)]


def _word(four: list[Array]) -> Array:
    """Four bytes, the lowest first."""
    a, b, c, d = (lax.shift_left(x, 8 * i) for i, x in enumerate(four))
    return a | b | c | d


def _exchanged(high: list[Any], low: list[Any]) -> list[Array]:
    """What both columns of a pair hold of a read, when each has given the other what it wants.

    It is its own inverse, but for the order of what is given and what is got.
    """
    odd = iota(high[0].shape, 0) & 4 != 0
    got = [_of_partner(jnp.where(odd, x, y)) for x, y in zip(high, low, strict=True)]
    first = [jnp.where(odd, x, y) for x, y in zip(got, high, strict=True)]
    return [*first, *(jnp.where(odd, x, y) for x, y in zip(low, got, strict=True))]


def _of_partner(word: Array) -> Array:
    """The word of the thread whose lane differs in the bit 4."""
    return jnp.flip(word.reshape(-1, 2, 4), axis=1).reshape(word.shape)


def unpack_digits(
    words: Sequence[Array], scale: Array, bits: int, *, halved: bool, held: int | None = None
) -> list[Array]:
    """The inverse of `pack_digits`, for interpret mode: float32 `[threads]`, inputs in order."""
    order = held_order(bits, halved, held)
    held, values = len(order), []
    for first in range(0, len(words), held // 2):
        some = list(words[first : first + held // 2])
        high, low = some[: held // 4], some[held // 4 :]
        if halved:
            some = _exchanged(high, low)
            high, low = some[: held // 4], some[held // 4 :]
        read: list[Array] = [scale] * held
        for byte, place in enumerate(order):
            shift = 24 - 8 * (byte % 4)
            digits = [
                lax.shift_right_arithmetic(lax.shift_left(x[byte // 4], shift), 24)
                for x in (high, low)
            ]
            read[place] = (256 * digits[0] + digits[1]).astype(jnp.float32) * scale
        values += read
    return values
