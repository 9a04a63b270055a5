"""What a live batch has on the device."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.sampling.history import History
from ffjax.sampling.params import SamplingParams
from ffjax.sampling.rows import Rows, Stages, rows_of

__all__ = ["LiveState", "Newcomer", "empty_state", "entered"]


class LiveState(NamedTuple):
    """B sequences, each in the midst of its life, or none.

    Attributes:
        cache: keys and values.
        token: int32 `[B]`, chosen but not yet fed.
        length: int32 `[B]`, how many tokens the answer holds, `token` included.
        rows: how tokens are chosen, with the arrays of every stage.
        history: what the prompt and the answer hold, `token` not included.
        last: float32 `[B, D]`, what the last layer returned for the last token of each prompt, or
            what the final norm made of it.
    """

    cache: KVCache
    token: Array
    length: Array
    rows: Rows
    history: History
    last: Array


class Newcomer(NamedTuple):
    """A sequence that enters.

    Attributes:
        row: int32, where.
        kept: int32, how many positions of the row's cache are its own already.
        rows: its parameters, with no axis `[B]`.
        prompt: bool `[V]`, which tokens its prompt holds.
    """

    row: Any
    kept: Any
    rows: Rows
    prompt: Any

    @classmethod
    def of(cls, row: int, kept: int, rows: Rows, tokens: np.ndarray, vocab_size: int) -> Newcomer:
        """One with a prompt of these tokens."""
        prompt = np.zeros(vocab_size, bool)
        prompt[tokens] = True
        return cls(np.int32(row), np.int32(kept), rows, prompt)


def empty_state(
    config: ModelConfig, batch: int, capacity: int, dtype: Any, stages: Stages
) -> LiveState:
    """A batch without a sequence; `stages` are all that there may be."""
    nobody = [SamplingParams()] * batch
    rows = rows_of(nobody, [()] * batch, np.zeros((batch, 3), np.uint32), stages)
    return LiveState(
        cache=KVCache.create(config, batch, capacity, dtype),
        token=jnp.zeros((batch,), jnp.int32),
        length=jnp.zeros((batch,), jnp.int32),
        rows=jax.tree.map(jnp.asarray, rows),
        history=History.empty(batch, config.vocab_size),
        last=jnp.zeros((batch, config.model_dim), jnp.float32),
    )


def entered(state: LiveState, new: Newcomer) -> LiveState:
    """With one more sequence, whose prompt is still to be fed."""
    cache = state.cache
    lengths = cache.lengths.at[new.row].set(new.kept)
    history = state.history
    return state._replace(
        cache=dataclasses.replace(cache, lengths=lengths),
        rows=jax.tree.map(lambda all_, one: all_.at[new.row].set(one), state.rows, new.rows),
        history=History(
            history.prompt.at[new.row].set(new.prompt), history.counts.at[new.row].set(0)
        ),
    )
