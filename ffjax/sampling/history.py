"""Which tokens came before, for the stages that ask."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

__all__ = ["Fed", "History", "fed", "fed_side_by_side", "said", "with_fed"]


class History(NamedTuple):
    """What the sequences of a batch hold.

    Attributes:
        prompt: bool `[B, V]`, whether the prompt holds a token.
        counts: int32 `[B, V]`, how often the answer does.
    """

    prompt: Array
    counts: Array

    @classmethod
    def empty(cls, batch: int, vocab_size: int) -> History:
        """Of sequences that hold nothing yet."""
        shape = batch, vocab_size
        return cls(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32))


class Fed(NamedTuple):
    """A token of each answer that a history does not hold yet.

    Attributes:
        tokens: int32 `[B]`; one that is none is dropped.
        first: int32 `[B]`, those of the first choice with a board, for the kernel that draws: it
            knows itself which tokens it has drawn since.
        running: bool `[B]`, whose are to be held; None: all.
    """

    tokens: Array
    first: Array
    running: Array | None = None


def fed(history: History, rows: Array, tokens: Array) -> History:
    """With some more tokens in the prompts.

    Args:
        history: what they held.
        rows: int32 `[P]`, which sequence each token belongs to; B for padding.
        tokens: int32 `[P]`.
    """
    return history._replace(prompt=history.prompt.at[rows, tokens].set(True, mode="drop"))


def fed_side_by_side(history: History, tokens: Array, counts: Array) -> History:
    """The same of tokens that lie side by side, padded.

    Args:
        history: what the prompts held.
        tokens: int32 `[..., B, T]`.
        counts: int32 `[..., B]`, how many of each sequence's count, from the first on.
    """
    batch, size = tokens.shape[-2:]
    there = jnp.arange(size) < counts[..., None]
    owners = jnp.where(there, jnp.arange(batch)[:, None], batch)
    return fed(history, owners.reshape(-1), tokens.reshape(-1))


def said(history: History, tokens: Array) -> History:
    """With one more token in each answer, int32 `[B]`; one that is none is dropped.

    Each count is compared with the token, which XLA does beside what else it does with them; a
    scatter would be a launch of its own, or some.
    """
    vocab = history.counts.shape[-1]
    here = jnp.arange(vocab, dtype=jnp.int32) == tokens[:, None]
    return history._replace(counts=history.counts + here)


def with_fed(history: History, new: Fed) -> History:
    """With one more token in each answer, of those that run."""
    if new.running is None:
        return said(history, new.tokens)
    return said(history, jnp.where(new.running, new.tokens, history.counts.shape[-1]))
