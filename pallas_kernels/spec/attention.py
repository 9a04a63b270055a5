"""Attention over the live cache and the new positions, by KV splits.

As in flash decoding, the cached positions that a sequence's first new token sees are cut into equal
splits; how many depends on the sequence's length alone. The new positions are the last split's. Of
each split there are the weighted values, the sum of the weights and the largest score; where a head
has one split, its output is their quotient, and nothing of it is handed over.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.spec.handed import sixteen_bits
from pallas_kernels.spec.heads import Heads
from pallas_kernels.stream.plan import StreamPlan

__all__ = ["Splits", "attend_splits", "combine_splits", "splits_of"]

# The largest score of a split of which a query sees nothing.
LOWEST = -1e30


class Splits(NamedTuple):
    """The KV splits of each sequence in a layer, int32 `[B]`.

    Attributes:
        first: position that the first new token sees first.
        stop: cached positions.
        size: positions of a split.
        number: splits.
    """

    first: Array
    stop: Array
    size: Array
    number: Array


def splits_of(plan: StreamPlan, layer: Array, lengths: Array) -> Splits:
    """The KV splits of a layer; a local layer's window leaves it fewer positions."""
    cut, stop = plan.attention, jnp.minimum(lengths, plan.dims.capacity)
    first = jnp.maximum(stop + 1 - _window(plan, layer), 0)
    seen = stop - first + 1  # with the new one
    equal = -(-seen // cut.max_splits)
    size = jnp.maximum(-(-equal // cut.block) * cut.block, cut.min_split)
    return Splits(first, stop, size, -(-seen // size))


def attend_splits(
    plan: StreamPlan, layer: Array, lengths: Array, heads: Heads, k: Array, v: Array
) -> Array:
    """The buffer `parts`, float32 `[C, N, max_splits, H + 2]`.

    Args:
        plan: the step's.
        layer: int32 scalar.
        lengths: int32 `[B]`, before the step.
        heads: what is new.
        k: the layer's cached keys, `[B, K, S, H]`; beyond the live ones they may hold anything.
        v: likewise its values.

    Returns:
        Of each split the H weighted values, the sum of the weights, and the largest score in base
        2. A split that there is not, or of which a query sees nothing, has 0, 0 and `LOWEST`.
    """
    d, splits = plan.dims, splits_of(plan, layer, lengths)
    b, t, s = d.batch, d.tokens, d.capacity
    # Cached positions, then new ones: of each its position, and whose split it is.
    cached, new = jnp.arange(s), jnp.arange(t)
    position = jnp.concatenate(
        [jnp.broadcast_to(cached, (b, s)), splits.stop[:, None] + new], axis=1
    )
    live = jnp.concatenate([cached < splits.stop[:, None], jnp.ones((b, t), bool)], axis=1)
    split = jnp.concatenate(
        [
            (cached - splits.first[:, None]) // splits.size[:, None],
            jnp.broadcast_to(splits.number[:, None] - 1, (b, t)),
        ],
        axis=1,
    )
    own = splits.stop[:, None] + new  # [B, T]
    visible = live[:, None] & (position[:, None] <= own[..., None])
    visible &= position[:, None] > own[..., None] - _window(plan, layer)  # [B, T, S + T]

    def joined(cache: Array, some: Array) -> Array:
        # What nobody sees may be NaN, and 0 * NaN is NaN.
        cache = jnp.where(live[:, None, :s, None], cache.astype(jnp.float32), 0.0)
        return jnp.concatenate([cache, some.reshape(b, t, -1, d.head_dim).swapaxes(1, 2)], axis=2)

    keys, values = joined(k, heads.keys), joined(v, heads.values)
    queries = heads.queries.reshape(b, t, d.num_kv_heads, d.q_per_kv, d.head_dim)
    scores = jnp.einsum("btkgh,bksh->btkgs", sixteen_bits(queries), keys, precision="highest")
    if (cap := d.features.attn_softcap) is not None:
        scores = cap * math.log2(math.e) * jnp.tanh(scores)

    def of_split(number: Array) -> Array:
        seen = (visible & (split == number)[:, None])[:, :, None, None]
        top = jnp.max(jnp.where(seen, scores, LOWEST), axis=-1, keepdims=True)
        weight = jnp.where(seen, jnp.exp2(scores - top), 0.0)
        total = jnp.sum(weight, axis=-1, keepdims=True)
        out = jnp.einsum("btkgs,bksh->btkgh", sixteen_bits(weight), values, precision="highest")
        return jnp.concatenate([out, total, top], axis=-1)

    parts = jax.lax.map(of_split, jnp.arange(plan.attention.max_splits))
    return jnp.moveaxis(parts, 0, -2).reshape(d.columns, d.num_heads, -1, d.head_dim + 2)


def combine_splits(plan: StreamPlan, there: Array, parts: Array) -> Array:
    """Attention's output `[C, N * H]` of the buffer `parts`.

    Args:
        plan: the step's.
        there: bool `[C, max_splits]`, which splits each column's sequence has.
        parts: float32 `[C, N, max_splits, H + 2]`.
    """
    size, there = plan.dims.head_dim, there[:, None, :, None]
    out, total, top = jnp.split(parts, [size, size + 1], axis=-1)
    top = jnp.where(there, top, LOWEST)
    weight = jnp.where(there, jnp.exp2(top - jnp.max(top, axis=-2, keepdims=True)), 0.0)
    out, total = (jnp.sum(jnp.where(there, weight * x, 0.0), axis=-2) for x in (out, total))
    return (out / total).reshape(plan.dims.columns, -1)


def _window(plan: StreamPlan, layer: Array) -> Array | int:
    """Positions that a query sees, its own included; more than there are where no window is."""
    features, all_of_them = plan.dims.features, plan.dims.capacity + plan.dims.tokens + 1
    if features.window is None:
        return all_of_them
    return jnp.where(jnp.array(features.local_layers)[layer], features.window, all_of_them)
