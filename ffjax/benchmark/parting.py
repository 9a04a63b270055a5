"""Where two generations part: how nearly equal the reference finds their two tokens."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from ffjax.model import Transformer
from ffjax.sampling.draw import noisy_logits, sequence_keys, step_keys, words_of

__all__ = ["apart", "first_difference"]


def first_difference(mine: Sequence[int], other: Sequence[int]) -> int | None:
    """The number of the first token that is another; None where all are the same."""
    if list(mine) == list(other):
        return None
    pairs = enumerate(zip(mine, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(mine), len(other)))


def apart(
    model: Transformer,
    prompt: Sequence[int],
    mine: Sequence[int],
    other: Sequence[int],
    temperature: float,
    seed: int,
) -> float | None:
    """By how much the reference prefers the other token where two answers part.

    Args:
        model: the reference, which is fed the prompt and what both answers have.
        prompt: token ids.
        mine: an answer.
        other: the one that it is compared with.
        temperature: of the choice.
        seed: of the draws.

    Returns:
        The difference of their logits, noise included where tokens are drawn: a near tie is close
        to 0, and less than 0 says that the reference prefers `mine`. None where the answers are the
        same, or one ends where the other goes on.
    """
    at = first_difference(mine, other)
    if at is None or at == min(len(mine), len(other)):
        return None
    tokens = jnp.asarray([[*prompt, *mine[:at]]], jnp.int32)
    hidden = model.last_hidden_state(tokens, last_only=True)
    assert not isinstance(hidden, tuple)  # there is no cache
    logits = model.logits(hidden)
    keys = step_keys(sequence_keys(words_of(seed, 1)), at)
    [noisy] = noisy_logits(logits, keys, temperature)
    return float(noisy[other[at]] - noisy[mine[at]])
