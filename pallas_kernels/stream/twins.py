"""Two activations in a word: what programs hand each other of several sequences.

Every program reads all activations of all sequences. So that this is half as much, two neighbours
of a row are *twins*: two numbers of 15 bits, each with a sign, an exponent and 8 bits behind the
leading one, beside a tag of 2 bits.

    bit 31       30, 29   28 to 23          22 to 15          14            13 to 8    7 to 0
    first sign   tag      first exponent    first fraction    second sign   second exponent, fraction

A number keeps 9 significant bits, one more than bfloat16, whatever its neighbour is: a trained
model has channels that are thousands of times the others, and one exponent for both would leave
the smaller one no bits. Six bits of exponent reach up to 2^32, beyond which numbers become infinite. What is handed over is 2^-31 more
than the number, so that 0 is a word of nothing but its tag; numbers are exact to 2^-30 at best.

Two bits are enough of a tag: see `mail`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

__all__ = ["TWIN_TAG_BITS", "joined", "neighbours", "parted", "twin_tag"]

TWIN_TAG_BITS = 0x60000000
_TAG_SHIFT = 29
# Times 2^96, exponents of 6 bits are the uppermost 64 of float32: infinity and NaN stay what they
# are, and the two bits above are always set.
_UP, _DOWN = 2.0**96, 2.0**-96
_UPPER = 0x60000000
_MORE = 2.0**-31
_SIGN, _FIELD = -0x80000000, 0x1FFF8000  # as int32
_FIELD_SHIFT = 15
_NAN = 0x7FC00000
_HALF = 1 << (_FIELD_SHIFT - 1)


def twin_tag(tag: Array) -> Array:
    """A tag's two lowest bits at their places in a word, int32."""
    return lax.shift_left(tag & 3, _TAG_SHIFT)


def joined(first: Array, second: Array, tag: Array) -> Array:
    """Words of twins.

    Args:
        first: float32, any shape.
        second: float32, the same shape.
        tag: int32 scalar.

    Returns:
        int32, the same shape. Infinities stay infinite, and what is no number stays none.
    """
    first, second = (_rounded(x) for x in (first, second))
    low = lax.shift_right_logical(second & _FIELD, _FIELD_SHIFT)
    low |= lax.shift_right_logical(second & _SIGN, 17)
    return (first & (_SIGN | _FIELD)) | low | twin_tag(tag)


def _rounded(x: Array) -> Array:
    """The bits of 2^96 * (x + 2^-31), its magnitude within bounds and half a step more."""
    bits = lax.bitcast_convert_type(x * _UP + _MORE * _UP, jnp.int32)
    # Rounding up a NaN of all bits could make it a number.
    magnitude = jnp.clip(bits & ~_SIGN, _UPPER, _NAN) + _HALF
    return (bits & _SIGN) | magnitude


def parted(word: Array) -> tuple[Array, Array]:
    """The twins of a word, float32."""
    first = (word & (_SIGN | _FIELD)) | _UPPER
    # The sign comes to the top, and two copies of it where bits are set anyway.
    second = lax.shift_right_arithmetic(lax.shift_left(word, 17), 2) | _UPPER
    first, second = (
        lax.bitcast_convert_type(x, jnp.float32) * _DOWN - _MORE for x in (first, second)
    )
    return first, second


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
