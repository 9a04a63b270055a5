"""The first new token of each sequence."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from ffjax.sampling.choose import Choice, choose
from ffjax.sampling.draw import sequence_keys, step_keys
from ffjax.sampling.history import History
from ffjax.sampling.rows import Rows, Stages

__all__ = ["first_token"]


def first_token(
    logits: Array,
    rows: Rows,
    history: History | None,
    stages: Stages,
    greedy: Array | None = None,
) -> Choice:
    """Chooses the first token of each answer.

    Args:
        logits: float32 `[B, V]`.
        rows: the parameters of the sequences.
        history: the prompts; None where no stage asks.
        stages: which stages there are.
        greedy: int32 `[B]`, the likeliest tokens, where a step has found them already.
    """
    keys = step_keys(sequence_keys(rows.seeds), 0) if stages.draws else None
    index = jnp.zeros((len(logits),), jnp.int32)
    return choose(logits, greedy, rows, keys, history, index, stages)
