"""The forms in which numbers are handed over, as what a reader gets for a number.

Letters as in every shape of ffjax; C = B * T are the columns of a step: token t of sequence b is
column b * T + t. `docs/kernel.md` has the bits; here is what is left of a number.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.stream.plan import StreamPlan

__all__ = ["as_bfloat16", "as_plain", "as_residual", "as_word", "sixteen_bits"]

# What the residual is divided by before two of its elements share a word.
RESIDUAL_UNIT = 32.0
# The largest float16, and the least that has all its bits.
_LARGEST, _LEAST_NORMAL = 65504.0, 2.0**-14


def as_word(x: Array) -> Array:
    """A number alone in its word: 16 significant bits, half a step is rounded up. Float32."""
    return _significant(x, 16)


def as_residual(plan: StreamPlan, x: Array) -> Array:
    """An element of the residual, or of a block's output that is normed. Float32.

    Where two share a word, 10 significant bits of x / 32, from 2^-14 to 2^16 of it.
    """
    if not plan.half2:
        return as_word(x)
    return jnp.sign(x) * _half(jnp.abs(x) / RESIDUAL_UNIT) * RESIDUAL_UNIT


def as_plain(plan: StreamPlan, x: Array) -> Array:
    """Attention's output, or a hidden activation. Float32.

    Where two share a word, it is the root of |x| that has 10 bits.
    """
    if not plan.half2:
        return as_word(x)
    root = _half(jnp.sqrt(jnp.abs(x)))
    return jnp.sign(x) * root * root


def as_bfloat16(x: Array) -> Array:
    """Rounded to bfloat16, half a step to even. Float32.

    XLA leaves out a conversion there and back on a GPU, and with it the rounding.
    """
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def sixteen_bits(x: Array) -> Array:
    """The sum of two bfloat16: queries and softmax weights, as tensor cores get them. Float32."""
    high = as_bfloat16(x)
    return high + as_bfloat16(x - high)


def _half(x: Array) -> Array:
    """A float16 that has given its lowest bit to the tag; x is not negative."""
    rounded = _significant(x, 10)
    rounded = jnp.where(rounded > _LARGEST, jnp.inf, rounded)
    # Below its least normal number a float16 counts steps.
    steps = jnp.floor(x * 2.0**23 + 0.5) / 2.0**23
    return jnp.where(jnp.isnan(x), x, jnp.where(x < _LEAST_NORMAL, steps, rounded))


def _significant(x: Array, bits: int) -> Array:
    """So many significant bits of a float32's 24; half a step is rounded away from 0."""
    dropped = 24 - bits
    whole = lax.bitcast_convert_type(x, jnp.int32) + (1 << (dropped - 1))
    rounded = lax.bitcast_convert_type(whole & -(1 << dropped), jnp.float32)
    return jnp.where(jnp.isnan(x), x, rounded)
