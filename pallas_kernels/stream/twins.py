"""Two activations in a word: what programs hand each other of several sequences.

Every program reads all activations of all sequences. So that this is half as much, two neighbours
of a row are *twins*: two floating-point numbers of 15 bits beside a tag of 2.

    bit 31   30, 29   28 to 15             14     13 to 0
    sign     tag      exponent, fraction   sign   exponent, fraction

Each has an exponent of its own: a trained model has channels that are thousands of times the
others, and one exponent for both would leave the smaller one no bits. How the 14 bits are shared
out is a `Format`: the residual, which is rounded once more when it has been normed, keeps more bits
and has less of a range than what is handed over ready for a product.

The magnitude that is handed over is a little more than the number's, `Format.least`, so that 0 is a
word of nothing but its tag. Numbers below that share one step, and the largest become infinite.

Two bits are enough of a tag: see `mail`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

__all__ = [
    "PLAIN",
    "RESIDUAL",
    "TWIN_TAG_BITS",
    "Format",
    "joined",
    "neighbours",
    "parted",
    "twin_tag",
]

TWIN_TAG_BITS = 0x60000000
_TAG_SHIFT = 29
_SIGN, _FIELD = -0x80000000, 0x3FFF  # as int32
_HIGH = 15  # where the first field begins
_NAN = 0x7FC00000


@dataclasses.dataclass(frozen=True)
class Format:
    """How the 14 bits of a magnitude are shared out.

    Attributes:
        exponent: bits of the exponent; of the fraction, 14 less so many.
        lowest: the least exponent of two.
    """

    exponent: int
    lowest: int

    @property
    def least(self) -> float:
        """The least number that a word can hold; what is handed over is so much more."""
        return 2.0**self.lowest

    @property
    def shift(self) -> int:
        """Bits of a float32's fraction that are left out."""
        return 9 + self.exponent

    @property
    def upper(self) -> int:
        """The exponent's upper bits, which are always set, as bits of a float32.

        Times `scale`, the exponents are the uppermost ones that a float32 has: infinity and NaN
        stay what they are.
        """
        return 0x7F800000 & -(1 << (23 + self.exponent))

    @property
    def scale(self) -> float:
        """What makes `least` the number whose bits are `upper`."""
        return 2.0 ** ((self.upper >> 23) - 127 - self.lowest)


# 10 bits of a number, from 2^-10 to 2^21.
RESIDUAL = Format(5, -10)
# 9 bits, from 2^-31 to 2^32: one more than bfloat16.
PLAIN = Format(6, -31)


def twin_tag(tag: Array) -> Array:
    """A tag's two lowest bits at their places in a word, int32."""
    return lax.shift_left(tag & 3, _TAG_SHIFT)


def joined(first: Array, second: Array, tag: Array, form: Format) -> Array:
    """Words of twins.

    Args:
        first: float32, any shape.
        second: float32, the same shape.
        tag: int32 scalar.
        form: of the numbers.

    Returns:
        int32, the same shape. Infinities stay infinite, and what is no number stays none.
    """
    first, second = (_rounded(x, form) for x in (first, second))
    high = lax.shift_left(_field(first, form), _HIGH) | (first & _SIGN)
    low = _field(second, form) | lax.shift_right_logical(second & _SIGN, 17)
    return high | low | twin_tag(tag)


def _rounded(x: Array, form: Format) -> Array:
    """The bits of x's sign, and of (|x| + least) * scale and half a step more."""
    magnitude = jnp.abs(x) * form.scale + form.least * form.scale
    # Rounding up a NaN of all bits could make it a number.
    bits = jnp.minimum(lax.bitcast_convert_type(magnitude, jnp.int32) & ~_SIGN, _NAN)
    return (lax.bitcast_convert_type(x, jnp.int32) & _SIGN) | (bits + (1 << (form.shift - 1)))


def _field(bits: Array, form: Format) -> Array:
    return lax.shift_right_logical(bits, form.shift) & _FIELD


def parted(word: Array, form: Format) -> tuple[Array, Array]:
    """The twins of a word, float32.

    Args:
        word: int32, any shape.
        form: of the numbers.
    """
    # The sign stays at the top, with copies of it where bits are set anyway.
    kept = _SIGN | (_FIELD << form.shift)
    first = lax.shift_right_arithmetic(word, _HIGH - form.shift) & kept
    second = lax.shift_right_arithmetic(lax.shift_left(word, 17), 17 - form.shift)

    def number(x: Array) -> Array:
        more = jnp.where(x < 0, -form.least, form.least)
        return lax.bitcast_convert_type(x | form.upper, jnp.float32) * (1 / form.scale) - more

    return number(first), number(second)


def neighbours(x: Array) -> tuple[Array, Array]:
    """Elements of an array, taken as flat, that are neighbours: the even ones, and the odd ones.

    Args:
        x: float32 or int32.

    Returns:
        Half as many each, flat.
    """
    x = x.reshape(x.size // 2, 2)
    which = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    first, second = (jnp.sum(jnp.where(which == n, x, 0), axis=1) for n in range(2))
    return first, second
