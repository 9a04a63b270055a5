"""Choosing the next token: greedy, or drawn at a temperature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ffjax.seeds import keys_of, seed_words

__all__ = [
    "KeysFrom",
    "noisy_logits",
    "sample",
    "sequence_keys",
    "sequence_words",
    "step_keys",
    "words_of",
]


def words_of(seed: int | Sequence[int], batch: int) -> np.ndarray:
    """What the sequences of a call draw by: uint32 `[B, 3]`, a seed's bits and a number each.

    Args:
        seed: one for the call, by which sequence b gets the b-th key; or one for each sequence,
            which then draws the same tokens in whatever batch it is.
        batch: B.
    """
    if isinstance(seed, int):
        return np.stack([sequence_words(seed, b) for b in range(batch)])
    return np.stack([sequence_words(one) for one in seed])


def sequence_words(seed: int, number: int = 0) -> np.ndarray:
    """What one sequence draws by, uint32 `[3]`: the `number`-th of a seed."""
    return np.append(seed_words(seed), np.uint32(number))


def sequence_keys(words: Array | np.ndarray) -> Array:
    """One random key a sequence, typed key array `[B]`.

    Args:
        words: uint32 `[B, 3]`, from `words_of`.
    """
    return jax.vmap(jax.random.fold_in)(keys_of(words[:, :2]), jnp.asarray(words[:, 2]))


def step_keys(keys: Array, index: Array | int) -> Array:
    """The keys `[B]` for the index-th new token (from 0) of each sequence.

    Derived from the index alone: how the steps are cut into blocks does not matter.

    Args:
        keys: of the sequences, from `sequence_keys`.
        index: one for all, or int32 `[B]`.
    """
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(index, keys.shape))


class KeysFrom(NamedTuple):
    """What the kernel that draws makes the keys of token after token of: see `step_keys`.

    Attributes:
        own: of the sequences, typed key array `[B]`, from `sequence_keys`.
        first: int32 `[B]`, which new token, from 0, is drawn when the kernel's board is new. Each
            draw with that board is of the next one.
    """

    own: Array
    first: Array


def sample(logits: Array, keys: Array, temperature: Array | float) -> Array:
    """Draws a token of each sequence from `softmax(logits / temperature)`.

    By the Gumbel-max trick: `argmax(logits + temperature * g)`, with g standard
    Gumbel noise, is distributed so (Maddison et al., arXiv 1411.0030). Written this
    way nothing is divided by the temperature, and 0 is greedy: the lowest id of the
    greatest logits.

    Args:
        logits: float32 `[B, V]`.
        keys: typed keys `[B]`; row b depends on key b and logits b alone.
        temperature: 0 or more; one number, or float32 `[B]`.

    Returns:
        int32 `[B]`.
    """
    return jnp.argmax(noisy_logits(logits, keys, temperature), axis=-1).astype(jnp.int32)


def noisy_logits(logits: Array, keys: Array, temperature: Array | float) -> Array:
    """What `sample` takes the largest of: float32 `[B, V]`, of the same arguments."""

    def noise(key: Array) -> Array:
        # The mode is named, that JAX's configuration does not choose it.
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32, mode="low")

    scale = jnp.asarray(temperature, jnp.float32).reshape(-1, 1)
    return logits + scale * jax.vmap(noise)(keys)
