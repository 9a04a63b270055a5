"""How likely tokens are, as integers, so that sums are exact in whatever order they are made.

A row's tokens are cut among more programs in a small batch than in a large one. Sums of
floating-point numbers would differ in their last bits, and a token at the border of `top_p` with
them. The likeliest token has a mass of almost 2^(2 b), in units, and b bits of it are summed as one
number, the others as another.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

__all__ = ["halves", "mass_bits", "masses", "whole"]

# Of the golden ratio: its multiples' fractions are spread evenly.
_LOG2_E = math.log2(math.e)
_SPREAD = np.uint32(0x9E3779B1)


def mass_bits(vocab_size: int) -> int:
    """b: V numbers of so many bits sum up to less than 2^31, and V masses to less than 2^45.

    16 masses, as many as a thread may have, sum up to less than 2^32.
    """
    return min(14, 31 - (vocab_size - 1).bit_length())


def masses(logits: Array, most: Array, scale: Array, token: Array, bits: int) -> Array:
    """The masses, int32, of at most 2b bits, by which they are `exp((logits - most) / scale)`.

    What is less than a unit is rounded up for some tokens and down for others, in proportion, by
    their numbers: a hundred thousand tokens of a tenth of a unit sum up to what they should.

    Args:
        logits: float32.
        most: the row's largest, finite.
        scale: float32, more than 0.
        token: int32, the tokens' ids.
        bits: b.
    """
    hashed = token.astype(jnp.uint32) * _SPREAD
    low = lax.shift_right_logical(hashed, jnp.full_like(hashed, 8)).astype(jnp.int32)
    share = low.astype(jnp.float32) * 2.0**-24
    # Of powers of 2, that the likeliest's is exact and nothing is divided for each token.
    behind = (logits - most) * (_LOG2_E / scale)
    units = jnp.exp2(behind) * 2.0 ** (2 * bits)
    return jnp.minimum((units + share).astype(jnp.int32), 2 ** (2 * bits) - 1)


def halves(mass: Array, bits: int) -> tuple[Array, Array]:
    """The upper and the lower b bits of masses."""
    high = lax.shift_right_logical(mass, jnp.full_like(mass, bits))
    return high, mass & (2**bits - 1)


def whole(high: Array, low: Array, bits: int) -> Array:
    """A sum of masses, float32 in units of the likeliest's, by the sums of its halves."""
    units = high.astype(jnp.float32) + low.astype(jnp.float32) * 2.0**-bits
    return units * 2.0**-bits
