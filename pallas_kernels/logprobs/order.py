"""Logits as integers that are ordered alike."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

__all__ = ["GREATEST", "LEAST", "ordered", "unordered"]

LEAST, GREATEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


def ordered(logits: Array) -> Array:
    """int32 that are ordered as `lax.top_k` orders float32: -0 is less than 0, NaN is most.

    None is `LEAST`, which is after every logit.
    """
    bits = lax.bitcast_convert_type(logits, jnp.int32)
    return jnp.where(logits != logits, GREATEST, jnp.where(bits < 0, bits ^ GREATEST, bits))


def unordered(numbers: Array) -> Array:
    """The float32 that `ordered` has made numbers of."""
    bits = jnp.where(numbers < 0, numbers ^ GREATEST, numbers)
    return lax.bitcast_convert_type(bits, jnp.float32)
