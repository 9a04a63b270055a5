"""Queries, keys and values: projected, normed, rotated, scaled."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.dims import DecodeWeights
from pallas_kernels.spec.handed import as_bfloat16, as_word
from pallas_kernels.spec.weights import norm_weight
from pallas_kernels.stream.plan import StreamPlan

__all__ = ["Heads", "handed_heads", "new_positions", "ready_heads"]


class Heads(NamedTuple):
    """What attention starts from, float32.

    Attributes:
        queries: `[C, N, H]`, rotated and scaled: their products with keys are the scores, for
            powers of 2; of a model that caps scores, the argument of tanh.
        keys: `[C, K, H]`, of the new positions, as the cache will hold them.
        values: `[C, K, H]`, likewise.
    """

    queries: Array
    keys: Array
    values: Array


def new_positions(plan: StreamPlan, lengths: Array) -> Array:
    """The position of each column's token, int32 `[C]`."""
    tokens = plan.dims.tokens
    return jnp.repeat(lengths, tokens) + jnp.tile(jnp.arange(tokens), plan.dims.batch)


def handed_heads(
    plan: StreamPlan, weights: DecodeWeights, layer: Array, lengths: Array, projected: Array
) -> Array:
    """The buffer `qkv`, `[C, N + 2K, H]`, of the projection's rows, its bias added.

    Queries and keys are handed over rotated, queries scaled; but as they were projected where the
    model norms them, since no program of the projection has a whole head. Keys and values are the
    bfloat16 that the cache will hold.
    """
    d = plan.dims
    x = projected.reshape(d.columns, -1, d.head_dim)
    q, k, v = jnp.split(x, [d.num_heads, d.num_heads + d.num_kv_heads], axis=1)
    if d.features.qk_norm is None:
        angles = _rotation(plan, weights, layer, lengths)
        q = _rotated(q, *angles) * _softmax_scale(plan)
        k = as_bfloat16(_rotated(k, *angles))
    return as_word(jnp.concatenate([q, k, as_bfloat16(v)], axis=1))


def ready_heads(
    plan: StreamPlan, weights: DecodeWeights, layer: Array, lengths: Array, qkv: Array
) -> Heads:
    """What attention makes of the buffer `qkv`, `[C, N + 2K, H]`."""
    d, norm = plan.dims, plan.dims.features.qk_norm
    q, k, v = jnp.split(qkv, [d.num_heads, d.num_heads + d.num_kv_heads], axis=1)
    if norm is not None:
        angles = _rotation(plan, weights, layer, lengths)
        q, k = (
            _rotated(_normed(plan, x, norm_weight(plan, weights, name, layer)), *angles)
            for x, name in ((q, "q_norm"), (k, "k_norm"))
        )
        q, k = q * _softmax_scale(plan), as_bfloat16(k)
    return Heads(q, k, v)


def _normed(plan: StreamPlan, x: Array, weight: Array | None) -> Array:
    """RMSNorm of each head, or of all heads of a column together: `[C, heads, H]`."""
    assert weight is not None
    over = -1 if plan.dims.features.qk_norm == "head" else (-2, -1)
    squares = jnp.mean(x * x, axis=over, keepdims=True)
    return x * lax.rsqrt(squares + plan.dims.norm_eps) * weight.reshape(-1, x.shape[-1])


def _softmax_scale(plan: StreamPlan) -> float:
    features = plan.dims.features
    scale = features.attn_scale
    scale = 1 / math.sqrt(plan.dims.head_dim) if scale is None else scale
    if features.attn_softcap is not None:
        return scale / features.attn_softcap
    return scale * math.log2(math.e)


def _rotation(
    plan: StreamPlan, weights: DecodeWeights, layer: Array, lengths: Array
) -> tuple[Array, Array]:
    """Cosines and sines of RoPE (Su et al., arXiv 2104.09864), float32 `[C, 1, H/2]`."""
    features = plan.dims.features
    pairs = np.arange(plan.dims.head_dim // 2)
    grown = pairs < (len(pairs) if features.rotary_pairs is None else features.rotary_pairs)
    frequency, scale = weights.inv_freq, jnp.where(grown, features.rope_scale, 1.0)
    if features.other_rope:
        assert weights.inv_freq_other is not None
        other = jnp.array(features.other_rope)[layer]
        frequency = jnp.where(other, weights.inv_freq_other, frequency)
        scale = jnp.where(other, 1.0, scale)
    position = new_positions(plan, lengths).astype(jnp.float32)
    angle = (position[:, None] * frequency)[:, None]
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def _rotated(x: Array, cos: Array, sin: Array) -> Array:
    """Elements i and i + H/2 of a head are a pair, which turns."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
