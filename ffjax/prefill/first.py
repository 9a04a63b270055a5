"""The first new token of each sequence."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from ffjax.sampling.draw import sample, sequence_keys, step_keys

__all__ = ["NOT_FINITE", "Sampling", "first_token", "marked"]

NOT_FINITE = -1
"""What stands for a token whose logit is NaN or infinite; it stops its sequence."""


class Sampling(NamedTuple):
    """How tokens are chosen; arrays of numpy or of JAX.

    Attributes:
        seeds: uint32 `[2]` or `[B, 2]`, from `ffjax.sampling.words_of`.
        temperature: float32.
    """

    seeds: Any
    temperature: Any


def marked(logits: Array, token: Array) -> Array:
    """The tokens int32 `[B]`, NOT_FINITE where the logit `[B, V]` of one is not finite.

    A NaN wins every choice of a token, as in `jnp.argmax`, so one among the logits is seen.
    """
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.isfinite(chosen), token, NOT_FINITE)


def first_token(logits: Array, sampling: Sampling, *, greedy: bool) -> Array:
    """Chooses from logits `[B, V]`: int32 `[B]`, or NOT_FINITE."""
    if greedy:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        token = sample(
            logits, step_keys(sequence_keys(sampling.seeds, len(logits)), 0), sampling.temperature
        )
    return marked(logits, token)
