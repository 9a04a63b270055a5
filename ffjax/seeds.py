"""Seeds, and the random keys they stand for whatever JAX's configuration is."""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

__all__ = ["MAX_SEED", "checked_seed", "key_of", "keys_of", "seed_words"]

MAX_SEED = 2**64 - 1
"""The largest seed: a key has 64 bits, and every seed is another key."""

_GENERATOR = "threefry2x32"


def checked_seed(seed: Any) -> int:
    """A seed as a Python integer.

    Raises:
        TypeError: it is no integer.
        ValueError: it is not from 0 to 2^64 - 1.
    """
    rule = "A seed is an integer from 0 to 2^64 - 1"
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"{rule}, got {seed!r}.")
    number = int(seed)
    if not 0 <= number <= MAX_SEED:
        raise ValueError(f"{rule}, got {number}.")
    return number


def seed_words(seed: int) -> np.ndarray:
    """A seed's 64 bits, uint32 `[2]`, the high ones first.

    Args:
        seed: from 0 to `MAX_SEED`.
    """
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


def keys_of(words: Array | np.ndarray) -> Array:
    """The typed keys of seeds.

    Up to 2^32 - 1 a seed's is what `jax.random.key(seed)` gives where JAX is not configured
    otherwise; beyond, what it gives with 64-bit types. The generator is Threefry, whatever
    `jax_default_prng_impl` says: with another one, what a sequence draws may depend on those
    beside it.

    Args:
        words: uint32 `[..., 2]`, from `seed_words`.

    Returns:
        Typed keys `[...]`.
    """
    return jax.random.wrap_key_data(jnp.asarray(words), impl=_GENERATOR)


def key_of(seed: int) -> Array:
    """The typed key of one seed, from 0 to `MAX_SEED`: see `keys_of`."""
    return keys_of(seed_words(seed))
