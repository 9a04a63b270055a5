"""Log-probabilities of the tokens that were chosen, and of the likeliest ones."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

__all__ = ["LogProbs", "TokenLogprobs", "likeliest_of", "log_probs"]

# XLA has a kernel for GPUs that finds up to 16 of rows of 1024 and more, a block of threads for
# each row; else it sorts.
_LEAST_GROUP = 1024
_MOST_FOUND = 16


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


def _groups(vocab: int) -> int:
    """Into how many groups of one size, of `_LEAST_GROUP` and more, V tokens fall at most."""
    return next((g for g in range(vocab // _LEAST_GROUP, 1, -1) if vocab % g == 0), 1)


def likeliest_of(logits: Array, best: int) -> tuple[Array, Array]:
    """`lax.top_k`, of rows that are long: the best of each group first, then the best of those.

    Of equal logits the lowest ids come first, as there: groups are of tokens side by side, and
    what is found of them stays in their order. Nothing is added to a row, so that NaN and -inf
    have their places, too.

    Args:
        logits: float32 `[B, V]`.
        best: n, how many.

    Returns:
        float32 `[B, n]`, falling; int32 `[B, n]`, their ids.
    """
    batch, vocab = logits.shape
    groups = _groups(vocab)
    if groups == 1 or not 0 < best <= vocab // groups:
        return lax.top_k(logits, best)
    # As many that the second row is long enough for the kernel, too.
    found = max(best, min(_MOST_FOUND, -(-_LEAST_GROUP // groups)))
    values, ids = lax.top_k(logits.reshape(batch * groups, vocab // groups), found)
    first = jnp.arange(batch * groups, dtype=jnp.int32) % groups * (vocab // groups)
    top, places = lax.top_k(values.reshape(batch, groups * found), best)
    ids = (ids + first[:, None]).reshape(batch, groups * found)
    return top, jnp.take_along_axis(ids, places, axis=-1)


def log_probs(logits: Array, tokens: Array, best: int) -> LogProbs:
    """Log-probabilities by the model's own logits.

    Args:
        logits: float32 `[B, V]`.
        tokens: int32 `[B]`, those chosen.
        best: how many alternatives.
    """
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1) - total
    top, ids = likeliest_of(logits, best)
    return LogProbs(chosen[:, 0], ids, top - total)
