"""Two activations in a word: what programs hand each other of several sequences.

Every program reads all activations of all sequences. So that this is half as much, two neighbours
of a row are *twins*: integers of 11 bits times a power of two that fits the larger one.

    bit 31   30 to 23   22        21 to 11       10 to 0
    tag      exponent   tag       first + 1024   second + 1024

Of the larger one that is a relative error of at most 2^-10, and of both an eighth to a quarter of
what bfloat16 would leave out of it. Two bits are enough of a tag: a word not yet written has that
of the hand-over before, which is one or two before this one.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

__all__ = ["TWIN_TAG_BITS", "joined", "neighbours", "parted", "twin_tag"]

# As int32: bits 31 and 22.
TWIN_TAG_BITS = ~0x7FBFFFFF
_STEPS = 1024
_FIELD = 2 * _STEPS - 1
_EXPONENT = 0x7F800000
# The float32 whose lowest bits show an integer that is added to it: 1.5 * 2^23, and the offset.
_MAGIC = float(3 * 2**22 + _STEPS)
# 2^23, whose lowest bits are free for an integer, as int32; and what to take off again.
_BARE, _OFFSET = 0x4B000000, float(2**23 + _STEPS)


def twin_tag(tag: Array) -> Array:
    """A tag's two lowest bits at their places in a word, int32."""
    return lax.shift_left(tag & 1, 22) | lax.shift_left(tag & 2, 30)


def joined(first: Array, second: Array, tag: Array) -> Array:
    """Words of twins.

    Args:
        first: float32, any shape.
        second: float32, the same shape.
        tag: int32 scalar.

    Returns:
        int32, the same shape. Twins of which one is no number, or infinite, are no numbers.
    """
    magnitudes = [lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF for x in (first, second)]
    exponent = lax.shift_right_logical(jnp.maximum(*magnitudes), 23)
    exponent = jnp.maximum(exponent, 10)  # below, a step would have none
    finite = exponent < 255
    # Below 2^(exponent - 126), so that a step of 2^(exponent - 136) leaves 1024 of them.
    inverse = lax.bitcast_convert_type(lax.shift_left(263 - exponent, 23), jnp.float32)
    fields = [
        lax.bitcast_convert_type(jnp.minimum(x * inverse, _STEPS - 1.0) + _MAGIC, jnp.int32)
        & _FIELD
        for x in (first, second)
    ]
    exponent = lax.shift_left(jnp.where(finite, exponent - 9, exponent), 23)
    return exponent | lax.shift_left(fields[0], 11) | fields[1] | twin_tag(tag)


def parted(word: Array) -> tuple[Array, Array]:
    """The twins of a word, float32. From 2^104 on they are no numbers."""
    step = lax.bitcast_convert_type(word & _EXPONENT, jnp.float32)
    # Exact, also where the multiplication is rounded before the addition.
    offset = step * -_OFFSET
    first, second = (
        lax.bitcast_convert_type((field & _FIELD) | _BARE, jnp.float32) * step + offset
        for field in (lax.shift_right_logical(word, 11), word)
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
