"""Two activations in a word, as CUDA's `half2`: what programs exchange of several sequences.

Every program reads all activations of all sequences. So that this is half as much, two neighbours
of a row share a word: two float16, each with a bit of the word's tag in its lowest place.

    bit 31   30 to 26   25 to 17   16             15 to 0
    sign     exponent   fraction   tag's bit 1    the first number, with the tag's bit 0

The tag costs a float16 one of its 11 significant bits. A `Format` says what the halves hold:

- The residual, rounded once more when it has been normed, keeps all 10: halves hold x / 32.
- What is handed over ready for a product has a wider range. Halves hold the root of |x|, with x's
  sign: the root's exponent is half of x's, so that x has twice the range, and 9 bits.

Each number has an exponent of its own: a trained model has channels that are thousands of times the
others, and one exponent for both would leave the smaller one no bits.

Two bits are enough of a tag: see `exchange`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

__all__ = [
    "HALF2_TAG_BITS",
    "PLAIN",
    "RESIDUAL",
    "Format",
    "even_and_odd",
    "half2_tag",
    "pack_half2",
    "unpack_half2",
]

HALF2_TAG_BITS = 0x00010001
_NAN = 0x7FC00000
# Bits of a float32's fraction that a half with a tag has no room for.
_DROPPED = 14
# The least float16 that has all its bits.
_LEAST_NORMAL = 2.0**-14


@dataclasses.dataclass(frozen=True)
class Format:
    """What halves hold of an activation.

    Attributes:
        unit: activations are handed over, and come out of `unpack_half2`, in multiples of this.
        root: whether halves hold roots.
    """

    unit: float
    root: bool


# 10 bits of a number from 2^-9 to 2^21, and steps of 2^-18 below.
RESIDUAL = Format(32.0, root=False)
# 9 bits from 2^-28 to 2^32, one more than bfloat16, and roots in steps of 2^-23 below.
PLAIN = Format(1.0, root=True)


def half2_tag(tag: Array) -> Array:
    """A tag's two lowest bits at their places in a word, int32."""
    return ((tag & 3) * 0x8001) & HALF2_TAG_BITS


def pack_half2(first: Array, second: Array, tag: Array, form: Format) -> Array:
    """Two activations a word, with its tag.

    Args:
        first: float32, any shape.
        second: float32, the same shape.
        tag: int32 scalar.
        form: of the numbers.

    Returns:
        int32, the same shape. Infinities stay infinite, and what is no number stays none.
    """
    low, high = _half(first, form), _half(second, form)
    return lax.shift_left(high, 16) | low | half2_tag(tag)


def _half(x: Array, form: Format) -> Array:
    """The bits of a float16 whose lowest is 0, int32."""
    magnitude = lax.abs(x)
    magnitude = lax.sqrt(magnitude) if form.root else magnitude * (1 / form.unit)
    bits = lax.bitcast_convert_type(magnitude, jnp.int32)
    # Rounding up a NaN of all bits could make it a number.
    bits = (jnp.minimum(bits, _NAN) + (1 << (_DROPPED - 1))) & -(1 << _DROPPED)
    half = lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.float16)
    half = lax.bitcast_convert_type(half, jnp.int16).astype(jnp.int32) & 0x7FFE
    # Near 0 a float16 counts steps.
    steps = (magnitude * 2.0**23 + 0.5).astype(jnp.int32)
    half = jnp.where(magnitude < _LEAST_NORMAL, lax.shift_left(steps, 1), half)
    sign = lax.shift_right_logical(lax.bitcast_convert_type(x, jnp.int32), 16) & 0x8000
    return half | sign


def unpack_half2(word: Array, form: Format) -> tuple[Array, Array]:
    """The two activations of a word, float32, in multiples of the format's unit.

    Args:
        word: int32, any shape.
        form: of the numbers.
    """

    def number(half: Array) -> Array:
        half = lax.bitcast_convert_type(half.astype(jnp.int16), jnp.float16)
        x = half.astype(jnp.float32)
        return x * lax.abs(x) if form.root else x

    return number(word & 0xFFFE), number(lax.shift_right_logical(word, 16) & 0xFFFE)


def even_and_odd(x: Array) -> tuple[Array, Array]:
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
