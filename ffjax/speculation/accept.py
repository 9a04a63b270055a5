"""Which drafts were right."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

__all__ = ["kept_tokens"]


def kept_tokens(chosen: Array, drafts: Array, counts: Array, room: Array) -> Array:
    """How many of a step's tokens are a sequence's next ones, int32 `[B]`.

    Each position's token is chosen as if the drafts before it were right. So tokens count up to
    the first that is another than its draft, that one too. A draft is certain of itself, and the
    rule that keeps the distribution (Leviathan et al., arXiv 2211.17192) keeps it with the
    probability that the model gives it: that of drawing it.

    Args:
        chosen: int32 `[B, T]`, the model's tokens after the one that was certain and after each
            draft.
        drafts: int32 `[B, T - 1]`.
        counts: int32 `[B]`, how many drafts a sequence has.
        room: int32 `[B]`, how many tokens it takes at most; 0: it has ended.
    """
    alive, kept = jnp.ones(counts.shape, bool), jnp.ones(counts.shape, jnp.int32)
    for j in range(drafts.shape[1]):  # B numbers each: XLA makes one launch of it
        alive = alive & (chosen[:, j] == drafts[:, j]) & (counts > j)
        kept = kept + alive
    return jnp.minimum(kept, room)
