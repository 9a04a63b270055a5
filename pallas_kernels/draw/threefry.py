"""JAX's random bits and Gumbel noise, within a kernel: the same numbers as `jax.random`'s.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): Threefry-2x32 with 20
rounds. As `jax.random` does where `jax_threefry_partitionable` is set, each number has its own
index as the counter, so that a program makes those of its own tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

__all__ = ["PARITY", "ROTATIONS", "TINY", "folded", "gumbel", "random_bits"]

ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
PARITY = np.uint32(0x1BD11BDA)
TINY = np.finfo(np.float32).tiny
_MANTISSA_BITS = 23
_ONE = np.uint32(0x3F800000)  # the bits of 1.0


def _rotated(x: Array, by: int) -> Array:
    left = lax.shift_left(x, jnp.full_like(x, by))
    return left | lax.shift_right_logical(x, jnp.full_like(x, 32 - by))


def _hashed(key: tuple[Array, Array], x: Array, y: Array) -> tuple[Array, Array]:
    """A counter's two words, hashed."""
    keys = *key, key[0] ^ key[1] ^ PARITY
    x = x + keys[0]
    y = y + keys[1]
    for group in range(5):
        for by in ROTATIONS[group % 2]:
            x = x + y
            y = _rotated(y, by) ^ x
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def random_bits(key: tuple[Array, Array], index: Array) -> Array:
    """32 random bits for each index.

    Args:
        key: a key's two words, uint32, that broadcast against the indices.
        index: uint32, below 2^32: the counter's low word.
    """
    x, y = _hashed(key, jnp.zeros_like(index), index)
    return x ^ y


def folded(key: tuple[Array, Array], data: Array) -> tuple[Array, Array]:
    """The words of `jax.random.fold_in(key, data)`.

    Args:
        key: a key's two words, uint32.
        data: uint32.
    """
    return _hashed(key, jnp.zeros_like(data), data)


def gumbel(key: tuple[Array, Array], index: Array) -> Array:
    """Standard Gumbel noise for each index, float32: `jax.random.gumbel(..., mode="low")`.

    Args:
        key: as in `random_bits`.
        index: likewise.
    """
    bits = random_bits(key, index)
    mantissa = lax.shift_right_logical(bits, jnp.full_like(bits, 32 - _MANTISSA_BITS))
    uniform = lax.bitcast_convert_type(mantissa | _ONE, jnp.float32) - 1.0
    uniform = jnp.maximum(uniform * (1.0 - TINY) + TINY, TINY)
    return -jnp.log(-jnp.log(uniform))
