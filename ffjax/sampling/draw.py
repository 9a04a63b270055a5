"""Choosing the next token: greedy, or drawn at a temperature."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ffjax.seeds import keys_of, seed_words

__all__ = ["sample", "sequence_keys", "step_keys", "words_of"]


def words_of(seed: int | Sequence[int]) -> np.ndarray:
    """The bits of the seeds of a call: uint32 `[2]` of one, `[B, 2]` of one a sequence."""
    return seed_words(seed) if isinstance(seed, int) else np.stack([*map(seed_words, seed)])


def sequence_keys(words: Array | np.ndarray, batch: int) -> Array:
    """One random key a sequence, typed key array `[B]`.

    Args:
        words: of one seed for the call, uint32 `[2]`, from which sequence b gets the b-th key; or
            of one a sequence, `[B, 2]`. A sequence with a seed of its own draws the same
            tokens in whatever batch it is. From `words_of`.
        batch: B.
    """
    if words.ndim == 1:
        return jax.vmap(jax.random.fold_in, (None, 0))(keys_of(words), jnp.arange(batch))
    return jax.vmap(jax.random.fold_in, (0, None))(keys_of(words), 0)


def step_keys(keys: Array, index: Array | int) -> Array:
    """The keys `[B]` for the index-th new token (from 0) of each sequence.

    Derived from the index alone: how the steps are cut into blocks does not matter.
    """
    return jax.vmap(jax.random.fold_in, (0, None))(keys, index)


def sample(logits: Array, keys: Array, temperature: Array | float) -> Array:
    """Draws a token of each sequence from `softmax(logits / temperature)`.

    By the Gumbel-max trick: `argmax(logits + temperature * g)`, with g standard
    Gumbel noise, is distributed so (Maddison et al., arXiv 1411.0030). Written this
    way nothing is divided by the temperature, and 0 is greedy: the lowest id of the
    greatest logits.

    Args:
        logits: float32 `[B, V]`.
        keys: typed keys `[B]`; row b depends on key b and logits b alone.
        temperature: 0 or more.

    Returns:
        int32 `[B]`.
    """

    def noise(key: Array) -> Array:
        # The mode is named, that JAX's configuration does not choose it.
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32, mode="low")

    noisy = logits + temperature * jax.vmap(noise)(keys)
    return jnp.argmax(noisy, axis=-1).astype(jnp.int32)
