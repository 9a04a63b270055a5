"""Stages that change logits: biases, forbidden tokens, penalties."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from ffjax.sampling.history import History

__all__ = ["biased", "penalized", "without_stops"]


def _rows(ids: Array) -> Array:
    """`[B, 1]`: the row of each id `[B, n]`."""
    return jnp.arange(len(ids))[:, None]


def biased(logits: Array, ids: Array, values: Array) -> Array:
    """With numbers added to some logits; -inf forbids a token.

    Args:
        logits: float32 `[B, V]`.
        ids: int32 `[B, n]`; those of V and more are nobody's.
        values: float32 `[B, n]`.
    """
    return logits.at[_rows(ids), ids].add(values, mode="drop")


def without_stops(logits: Array, ids: Array, early: Array) -> Array:
    """With tokens forbidden in some sequences.

    Args:
        logits: float32 `[B, V]`.
        ids: int32 `[B, n]`; those of V and more are nobody's.
        early: bool `[B]`, in which.
    """
    limit = jnp.where(early[:, None], -jnp.inf, jnp.inf)
    return logits.at[_rows(ids), ids].min(limit, mode="drop")


def penalized(logits: Array, history: History, penalties: Array) -> Array:
    """With penalties for tokens that came before.

    As Hugging Face and vLLM write them: Keskar et al., arXiv 1909.05858, for repetition; the
    OpenAI API for presence and frequency.

    Args:
        logits: float32 `[B, V]`.
        history: which those are.
        penalties: float32 `[B, 3]`: of repetition, presence and frequency.
    """
    repetition, presence, frequency = (penalties[:, i, None] for i in range(3))
    held = history.prompt | (history.counts > 0)
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(held, scaled, logits)
    counts = history.counts
    # Both are nothing where the answer does not hold a token: 0 times an infinity is not asked.
    return jnp.where(counts > 0, logits - (presence + frequency * counts), logits)
