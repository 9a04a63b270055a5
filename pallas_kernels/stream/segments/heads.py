"""A part's queries, and the new position's key and value, as attention multiplies them.

They come from the mail, ready for use unless the model norms queries and keys: then they come
as they were projected. A norm needs a whole head, or all heads, which no program of the
projection has; so whoever attends norms and rotates them, and whoever adds the new position
stores its key in the cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dims import next_power_of_2
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.segments.qkv import softmax_scale

__all__ = ["Heads", "collect_heads"]


class Heads(NamedTuple):
    """What a part of attention starts from, float32 `[rows, H]`; key and value in every row."""

    queries: Array
    key: Array
    value: Array


def collect_heads(
    env: StreamEnv,
    layer: Array,
    sequence: Array,
    kv_head: Array,
    first_query: Array,
    position: Array,
    has_new: Array,
    rows: int,
) -> Heads:
    """Waits for a part's queries, and for the new key and value where it adds them.

    Args:
        env: the program's view.
        layer: int32 scalar.
        sequence: int32 scalar, b.
        kv_head: int32 scalar, which of the K heads.
        first_query: int32 scalar, the first row's of its G queries; rows beyond repeat the last.
        position: int32 scalar, the new position.
        has_new: bool scalar, whether this part adds it.
        rows: rows of queries.
    """
    d, mail, tag = env.dims, env.mail, env.tag(layer)
    shape = (rows, d.head_dim)
    element = env.iota(shape, 1)
    start = mail.layout.qkv + sequence * d.qkv_dim
    query = kv_head * d.q_per_kv + jnp.minimum(first_query + env.iota(shape, 0), d.q_per_kv - 1)
    everywhere = element >= 0

    def words(head, element, mask):
        return start + head * d.head_dim + element, mask

    # Key and value are the same in every row.
    new_there = everywhere & has_new
    key, value = d.num_heads + kv_head, d.num_heads + d.num_kv_heads + kv_head
    if env.features.qk_norm is None:
        queries, k, v = mail.collect_all(
            [
                words(query, element, everywhere),
                words(key, element, new_there),
                words(value, element, new_there),
            ],
            tag,
        )
        return Heads(queries, k, v)
    half = d.head_dim // 2
    is_first = element < half
    partner = jnp.where(is_first, element + half, element - half)
    cos, sin = _rotation(env, layer, position, element)
    sin = jnp.where(is_first, -sin, sin)
    q, q_other, k, k_other, v = mail.collect_all(
        [
            words(query, element, everywhere),
            words(query, partner, everywhere),
            words(key, element, new_there),
            words(key, partner, new_there),
            words(value, element, new_there),
        ],
        tag,
    )

    def normed(
        name: str, x: Array, other: Array, within: Array, heads: int, first_head: int, mask: Array
    ):
        """Heads normed and rotated: `[rows, H]`."""
        if env.features.qk_norm == "head":
            squares = jnp.sum(x * x, axis=1)[:, None] / d.head_dim
            at, at_other = element, partner
        else:
            squares = _mean_square(env, start + first_head * d.head_dim, heads, tag, mask)
            at, at_other = (within * d.head_dim + e for e in (element, partner))
        scale = lax.rsqrt(squares + d.norm_eps)
        x = x * scale * env.norm_weight(name, layer, at)
        other = other * scale * env.norm_weight(name, layer, at_other)
        return x * cos + other * sin

    queries = normed("q_norm", q, q_other, query, d.num_heads, 0, everywhere)
    kv = jnp.broadcast_to(kv_head, shape)
    new = normed("k_norm", k, k_other, kv, d.num_kv_heads, d.num_heads, everywhere & has_new)
    stored = new.astype(jnp.bfloat16)
    # Every row is the same: the first is stored. A full cache has no slot.
    row = jnp.sum(jnp.where(env.iota(shape, 0) == 0, new, 0.0), axis=0).astype(jnp.bfloat16)
    column = env.iota(row.shape, 0)
    where = (layer, sequence, kv_head, jnp.minimum(position, d.capacity - 1), column)
    plgpu.store(env["k"].at[where], row, mask=(column >= 0) & has_new & (position < d.capacity))
    return Heads(queries * softmax_scale(env), stored.astype(jnp.float32), v)


def _rotation(env: StreamEnv, layer: Array, position: Array, element: Array) -> tuple[Array, Array]:
    """Cosine and sine of the rotation of each element, float32."""
    size = env.dims.head_dim
    column = env.iota((size,), 0)
    pair = lax.rem(column, jnp.int32(size // 2))
    frequency = plgpu.load(env["inv_freq"].at[pair])
    if env.features.local_rope:
        local = plgpu.load(env["inv_freq_local"].at[pair])
        frequency = jnp.where(env.is_local(layer), local, frequency)
    angle = position.astype(jnp.float32) * frequency
    return (
        jnp.broadcast_to(jnp.cos(angle)[None, :], element.shape),
        jnp.broadcast_to(jnp.sin(angle)[None, :], element.shape),
    )


def _mean_square(env: StreamEnv, start: Any, heads: int, tag: Array, mask: Array) -> Array:
    """Of a projection to all heads at once; float32 scalar."""
    size = heads * env.dims.head_dim
    element = env.iota((next_power_of_2(size),), 0)
    # The mask is true everywhere or nowhere.
    there = (element < size) & (jnp.max(mask.astype(jnp.int32)) > 0)
    x = env.mail.collect(start + element, tag, there)
    return jnp.sum(x * x) / size
