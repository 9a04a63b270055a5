"""Log-probabilities of the tokens that were chosen, and of the likeliest ones."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

__all__ = ["LogProbs", "TokenLogprobs", "log_probs"]


class TokenLogprobs(NamedTuple):
    """What is told of one token.

    Attributes:
        logprob: the token's log-probability, natural.
        top: the likeliest tokens' ids and log-probabilities, falling.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class LogProbs(NamedTuple):
    """What is told of one token of each sequence.

    Attributes:
        chosen: float32 `[B]`.
        top_ids: int32 `[B, n]`.
        top: float32 `[B, n]`, falling.
    """

    chosen: Array
    top_ids: Array
    top: Array

    def of(self, row: int, best: int) -> TokenLogprobs:
        """Of one sequence and so many alternatives; the arrays are numpy's."""
        pairs = zip(self.top_ids[row, :best].tolist(), self.top[row, :best].tolist(), strict=True)
        return TokenLogprobs(float(self.chosen[row]), tuple(pairs))


def log_probs(logits: Array, tokens: Array, best: int) -> LogProbs:
    """Log-probabilities by the model's own logits.

    Args:
        logits: float32 `[B, V]`.
        tokens: int32 `[B]`, those chosen.
        best: how many alternatives.
    """
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1) - total
    top, ids = lax.top_k(logits, best)
    return LogProbs(chosen[:, 0], ids, top - total)
