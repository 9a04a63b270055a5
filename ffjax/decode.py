"""One decode step, by the fused kernel or by the reference."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from ffjax.cache import KVCache
from ffjax.model import Transformer

__all__ = ["DecodeOutput", "Implementation", "decode_step"]

Implementation = Literal["pallas", "xla"]


class DecodeOutput(NamedTuple):
    """What a decode step returns.

    Attributes:
        logits: float32 `[B, V]`.
        token: int32 `[B]`, the greedy choice, the lowest id of equal logits.
        cache: the cache, one position longer.
    """

    logits: Array
    token: Array
    cache: KVCache


def decode_step(
    model: Transformer,
    cache: KVCache,
    tokens: Array,
    *,
    implementation: Implementation | None = None,
) -> DecodeOutput:
    """Feeds one token to each sequence and returns the logits of the next."""
    logits, cache = model(tokens[:, None], cache)
    return DecodeOutput(logits[:, 0], jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), cache)
