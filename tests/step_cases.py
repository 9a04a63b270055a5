"""Shapes of decode steps, the reference's step, and what a step leaves in the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from decode_cases import QUICK_COMPILE, small_config
from flax import nnx

from ffjax.cache import KVCache
from ffjax.config import RopeScaling
from ffjax.decode import DecodeOutput, reference_step

__all__ = ["CASES", "bits", "in_float32", "newest", "reference", "untouched"]

_SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)

# Attention takes tiles of 128 positions of 64 elements, 64 of 128.
CASES = {
    "one head, tied, stretched rope": (
        small_config(num_heads=1, tied_embeddings=True, rope_scaling=_SCALING),
        150,
        [[129], [0]],
    ),
    "heads of 64, G=1": (small_config(num_kv_heads=2), 130, [[0, 64, 127], [128, 129, 1]]),
    "heads of 64, G=8": (
        small_config(num_heads=8, model_dim=48),
        200,
        [[0, 1, 63, 65, 127, 128, 129, 199]],
    ),
    "heads of 128, G=4": (small_config(num_heads=4, head_dim=128), 100, [[63, 64, 65]]),
    "heads of 128, G=8": (
        small_config(num_heads=16, num_kv_heads=2, head_dim=128, model_dim=112, vocab_size=97),
        70,
        [[64]],
    ),
    "heads of 256, G=3": (small_config(num_heads=3, head_dim=256, model_dim=80), 40, [[31, 33]]),
    "heads of 32, G=16": (small_config(num_heads=16, head_dim=32), 20, [[7]]),
    "inputs wider than a tile": (
        small_config(num_layers=1, model_dim=2192, ffw_dim=2320),
        8,
        [[5, 0]],
    ),
}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK_COMPILE)
def _reference(graph, params, cache: KVCache, tokens) -> DecodeOutput:
    return reference_step(nnx.merge(graph, params), cache, tokens)


def reference(model, cache, tokens) -> DecodeOutput:
    return _reference(*nnx.split(model), cache, tokens)


def bits(tree) -> list[bytes]:
    """Arrays as bytes: so NaNs equal themselves, and -0.0 does not equal 0.0."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def in_float32(tree):
    """Arrays of bfloat16 as float32, the rest as they are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def untouched(cache: KVCache) -> list[np.ndarray]:
    """Keys and values without each sequence's newest position, if it has a slot."""
    slots = np.arange(cache.capacity)[:, None]
    others = slots != np.asarray(cache.lengths)[:, None, None, None] - 1
    return [np.where(others, np.asarray(x), 0) for x in (cache.k, cache.v)]


def newest(cache: KVCache) -> jax.Array:
    """Keys and values of each sequence's newest position: `[2, B, L, K, H]`."""
    row, slot = jnp.arange(cache.batch), cache.lengths - 1
    return jnp.stack([x[:, row, :, slot] for x in (cache.k, cache.v)])
