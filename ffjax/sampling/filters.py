"""Which tokens are too unlikely to be drawn: top-k, top-p, min-p."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

__all__ = ["filtered", "least_kept"]

# No temperature is smaller: what is divided by it stays finite, or is -inf.
_LEAST_TEMPERATURE = 1e-30


def least_kept(logits: Array, temperature: Array, top_k: Array, nucleus: Array) -> Array:
    """The smallest logit that may be drawn, of each sequence.

    Each filter keeps the tokens above some logit, and those equal to it, so that which of two
    equal tokens is kept does not hang on the order in which they were sorted.

    Args:
        logits: float32 `[B, V]`.
        temperature: float32 `[B]`.
        top_k: int32 `[B]`, at least 1; V and more keep all.
        nucleus: float32 `[B, 2]`: `top_p`, by the probabilities of what `top_k` keeps; `min_p`.

    Returns:
        float32 `[B, 1]`; NaN where a logit is.
    """
    vocab = logits.shape[-1]
    top_p, min_p = nucleus[:, :1], nucleus[:, 1:]
    scale = jnp.maximum(temperature, _LEAST_TEMPERATURE)[:, None]
    falling = -jnp.sort(-logits, axis=-1)
    most = falling[:, :1]
    last = jnp.minimum(top_k, vocab)[:, None] - 1
    by_count = jnp.take_along_axis(falling, last, axis=-1)
    # Probabilities times a constant: those of the likeliest are 1.
    likely = jnp.where(falling >= by_count, jnp.exp((falling - most) / scale), 0)
    above = jnp.cumsum(likely, axis=-1) - likely  # of the tokens before, in falling order
    wanted = top_p * jnp.sum(likely, axis=-1, keepdims=True)
    # The likeliest has nothing above it; with top_p of 1 none is left out for a rounding.
    kept = jnp.sum((above < wanted) | (top_p >= 1), axis=-1, keepdims=True)
    by_mass = jnp.take_along_axis(falling, jnp.maximum(kept, 1) - 1, axis=-1)
    by_ratio = most + scale * jnp.log(min_p)
    return jnp.maximum(jnp.maximum(by_count, by_mass), by_ratio)


def filtered(logits: Array, temperature: Array, top_k: Array, nucleus: Array) -> Array:
    """Logits `[B, V]`, -inf where a token may not be drawn; arguments as `least_kept`.

    NaN stays: it is for `ffjax.sampling.choose.marked` to find.
    """
    least = least_kept(logits, temperature, top_k, nucleus)
    return jnp.where(logits < least, -jnp.inf, logits)
