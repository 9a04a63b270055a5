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
from ffjax.speculation.block import Bounds
from ffjax.speculation.drafting import FIRST_TOKENS

__all__ = ["DraftState", "LiveState", "Newcomer", "empty_state", "entered"]


class DraftState(NamedTuple):
    """What a draft model has of the same B sequences.

    Attributes:
        cache: keys and values of all tokens but the last of those that the model's cache holds.
            What lies at the last one, or after it, is of no use: it may be of a wrong draft.
        last: float32 `[B, D]`, room for what the prefill leaves of a prompt's end; nobody asks.
    """

    cache: KVCache
    last: Array

    def behind(self, lengths: Array) -> DraftState:
        """The same, set to the lengths of the model's cache, int32 `[B]`."""
        cache = dataclasses.replace(self.cache, lengths=jnp.maximum(lengths - 1, 0))
        return self._replace(cache=cache)


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
        known: int32 `[B, S]`, the tokens of prompt and answer, `token` not included; None without
            speculation.
        bounds: between which lengths of its cache a sequence gets its tokens; None likewise.
        draft: of the draft model; None without one.
    """

    cache: KVCache
    token: Array
    length: Array
    rows: Rows
    history: History
    last: Array
    known: Array | None = None
    bounds: Bounds | None = None
    draft: DraftState | None = None


class Newcomer(NamedTuple):
    """A sequence that enters.

    Attributes:
        row: int32, where.
        kept: int32, how many positions of the row's cache are its own already.
        rows: its parameters, with no axis `[B]`.
        prompt: bool `[V]`, which tokens its prompt holds.
        known: int32 `[S]`, the tokens of its prompt; None without speculation.
        bounds: its own, without the axis `[B]`; None likewise.
    """

    row: Any
    kept: Any
    rows: Rows
    prompt: Any
    known: Any = None
    bounds: Bounds | None = None

    @classmethod
    def of(cls, row: int, kept: int, rows: Rows, tokens: np.ndarray, vocab_size: int) -> Newcomer:
        """One with a prompt of these tokens."""
        prompt = np.zeros(vocab_size, bool)
        prompt[tokens] = True
        return cls(np.int32(row), np.int32(kept), rows, prompt)

    def with_text(self, tokens: np.ndarray, slots: int, limit: int) -> Newcomer:
        """The same for a batch that speculates: with its prompt, and room for so many tokens."""
        known = np.zeros(slots, np.int32)
        known[: len(tokens)] = tokens
        # The cache holds the prompt when the answer has its first token.
        begins = len(tokens) - 1
        return self._replace(known=known, bounds=Bounds(np.int32(begins), np.int32(begins + limit)))


def empty_state(
    config: ModelConfig,
    batch: int,
    capacity: int,
    dtype: Any,
    stages: Stages,
    tokens: int,
    draft: tuple[ModelConfig, Any] | None = None,
) -> LiveState:
    """A batch without a sequence.

    Args:
        config: the model's.
        batch: B.
        capacity: S.
        dtype: of the cache.
        stages: all that there may be.
        tokens: T; 1 without speculation.
        draft: config and dtype of a draft model.
    """
    nobody = [SamplingParams()] * batch
    rows = rows_of(nobody, [()] * batch, np.zeros((batch, 3), np.uint32), stages)
    return LiveState(
        cache=KVCache.create(config, batch, capacity, dtype, tokens=tokens),
        token=jnp.zeros((batch,), jnp.int32),
        length=jnp.zeros((batch,), jnp.int32),
        rows=jax.tree.map(jnp.asarray, rows),
        history=History.empty(batch, config.vocab_size),
        last=jnp.zeros((batch, config.model_dim), jnp.float32),
        known=jnp.zeros((batch, capacity), jnp.int32) if tokens > 1 else None,
        bounds=Bounds(*jnp.zeros((2, batch), jnp.int32)) if tokens > 1 else None,
        draft=None if draft is None else _empty_draft(*draft, batch, capacity),
    )


def _empty_draft(config: ModelConfig, dtype: Any, batch: int, capacity: int) -> DraftState:
    return DraftState(
        KVCache.create(config, batch, capacity, dtype, tokens=FIRST_TOKENS),
        jnp.zeros((batch, config.model_dim), jnp.float32),
    )


def entered(state: LiveState, new: Newcomer) -> LiveState:
    """With one more sequence, whose prompt is still to be fed."""
    cache = state.cache
    lengths = cache.lengths.at[new.row].set(new.kept)
    history = state.history

    def with_own(all_: Any, one: Any) -> Any:
        return jax.tree.map(lambda a, own: a.at[new.row].set(own), all_, one)

    return state._replace(
        known=with_own(state.known, new.known),
        bounds=with_own(state.bounds, new.bounds),
        cache=dataclasses.replace(cache, lengths=lengths),
        draft=None if state.draft is None else state.draft.behind(lengths),
        rows=with_own(state.rows, new.rows),
        history=History(
            history.prompt.at[new.row].set(new.prompt), history.counts.at[new.row].set(0)
        ),
    )
