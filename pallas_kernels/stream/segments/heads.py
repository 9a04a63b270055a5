"""A part's queries, and the new positions' keys and values, as attention multiplies them.

They come from the exchange, ready for use unless the model norms queries and keys: then they come
as they were projected. A norm needs a whole head, or all heads, which no program of the
projection has; so whoever attends norms and rotates them, and whoever adds the new positions
stores their keys in the cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.dims import next_power_of_2
from pallas_kernels.stream import access
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.plan import LOT
from pallas_kernels.stream.segments.qkv import scaled, softmax_scale

__all__ = ["Heads", "collect_heads"]


class Heads(NamedTuple):
    """What a part of attention starts from, float32 `[rows, H]`.

    Key and value of row n < T are those of the n-th new position; of one token every row's.
    """

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
    lots: Array | int = 1,
) -> Heads:
    """Waits for a part's queries, and for the new keys and values where it adds them.

    Args:
        env: the program's view.
        layer: int32 scalar.
        sequence: int32 scalar, b.
        kv_head: int32 scalar, which of the K heads.
        first_query: int32 scalar, the first row's of its T * G queries, token by token; rows beyond
            repeat the last.
        position: int32 scalar, the first new position.
        has_new: bool scalar, whether this part adds them.
        rows: rows of queries.
        lots: how many times 8 of them are waited for, where there are more.
    """
    d, exchange, tag = env.dims, env.exchange, env.tag(layer)
    shape = (rows, d.head_dim)
    element = env.iota(shape, 1)
    start = exchange.layout.qkv + sequence * (d.tokens * d.qkv_dim)
    token: Array | int = 0
    new: Array | int = 0
    if d.tokens == 1:
        query = kv_head * d.q_per_kv + jnp.minimum(first_query + env.iota(shape, 0), d.q_per_kv - 1)
    else:
        row = env.iota(shape, 0)
        number = jnp.minimum(first_query + row, d.queries - 1)
        token = lax.div(number, jnp.int32(d.q_per_kv))
        new = jnp.minimum(row, d.tokens - 1)
        query = kv_head * d.q_per_kv + number - token * d.q_per_kv

    def start_of(token: Array | int) -> Array:
        """Where the exchange has a token's queries, keys and values."""
        return start if d.tokens == 1 else start + token * d.qkv_dim

    everywhere = element >= 0
    asked = everywhere if rows <= LOT else env.iota(shape, 0) < lots * LOT

    def words(head, element, mask, token=new):
        return start_of(token) + head * d.head_dim + element, mask

    new_there = (everywhere if d.tokens == 1 else env.iota(shape, 0) < d.tokens) & has_new
    key, value = d.num_heads + kv_head, d.num_heads + d.num_kv_heads + kv_head
    if env.features.qk_norm is None:
        queries, k, v = exchange.collect_all(
            [
                words(query, element, asked, token),
                words(key, element, new_there),
                words(value, element, new_there),
            ],
            tag,
        )
        return Heads(queries, k, v)
    half = d.head_dim // 2
    is_first = element < half
    partner = jnp.where(is_first, element + half, element - half)

    def rotation(token: Array | int) -> tuple[Array, Array]:
        cos, sin = _rotation(env, layer, position + token, element)
        return cos, jnp.where(is_first, -sin, sin)

    of_queries = rotation(token)
    of_keys = of_queries if d.tokens == 1 else rotation(new)
    q, q_other, k, k_other, v = exchange.collect_all(
        [
            words(query, element, everywhere, token),
            words(query, partner, everywhere, token),
            words(key, element, new_there),
            words(key, partner, new_there),
            words(value, element, new_there),
        ],
        tag,
    )

    def normed(
        name: str,
        x: Array,
        other: Array,
        within: Array,
        heads: int,
        first_head: int,
        mask: Array,
        token: Array | int,
        rotation: tuple[Array, Array],
    ):
        """Heads normed and rotated: `[rows, H]`."""
        if env.features.qk_norm == "head":
            squares = jnp.sum(x * x, axis=1)[:, None] / d.head_dim
            at, at_other = element, partner
        else:
            squares = _mean_square(env, start_of(0) + first_head * d.head_dim, heads, tag, mask)
            for t in range(1, d.tokens):
                at = start_of(t) + first_head * d.head_dim
                squares = jnp.where(token == t, _mean_square(env, at, heads, tag, mask), squares)
            at, at_other = (within * d.head_dim + e for e in (element, partner))
        scale = lax.rsqrt(squares + d.norm_eps)
        x = x * scale * env.norm_weight(name, layer, at)
        other = other * scale * env.norm_weight(name, layer, at_other)
        cos, sin = rotation
        return x * cos + other * sin

    queries = normed("q_norm", q, q_other, query, d.num_heads, 0, everywhere, token, of_queries)
    kv = jnp.broadcast_to(kv_head, shape)
    keys = normed(
        "k_norm", k, k_other, kv, d.num_kv_heads, d.num_heads, everywhere & has_new, new, of_keys
    )
    stored = keys.astype(jnp.bfloat16)
    _store_keys(env, layer, sequence, kv_head, position, has_new, keys)
    return Heads(queries * softmax_scale(env), stored.astype(jnp.float32), v)


def _store_keys(
    env: StreamEnv,
    layer: Array,
    sequence: Array,
    kv_head: Array,
    position: Array,
    has_new: Array,
    keys: Array,
) -> None:
    """Stores the new positions' keys, as `Heads` has them. A full cache has no room for them."""
    d = env.dims
    for token in range(d.tokens):
        mine = env.iota(keys.shape, 0) == token
        row = jnp.sum(jnp.where(mine, keys, 0.0), axis=0).astype(jnp.bfloat16)
        column, at = env.iota(row.shape, 0), position + token
        where = (layer, sequence, kv_head, jnp.minimum(at, d.capacity - 1), column)
        access.store(env["k"].at[where], row, mask=(column >= 0) & has_new & (at < d.capacity))


def _rotation(env: StreamEnv, layer: Array, position: Array, element: Array) -> tuple[Array, Array]:
    """Cosine and sine of each element's rotation, float32; position is a scalar or `[rows, H]`."""
    size = env.dims.head_dim
    column = env.iota((size,), 0)
    pair = lax.rem(column, jnp.int32(size // 2))
    frequency = access.load(env["inv_freq"].at[pair])
    if env.features.other_rope:
        other = access.load(env["inv_freq_other"].at[pair])
        frequency = jnp.where(env.rotates_otherwise(layer), other, frequency)
    if position.ndim:
        pair = jnp.broadcast_to(pair[None, :], element.shape)

    def here(x: Array) -> Array:
        made = scaled(env, x, pair, env.features.rope_scale)
        if made is x or not env.features.other_rope:
            return made
        return jnp.where(env.rotates_otherwise(layer), x, made)

    if position.ndim:
        angle = position.astype(jnp.float32) * frequency[None, :]
        return here(jnp.cos(angle)), here(jnp.sin(angle))
    angle = position.astype(jnp.float32) * frequency
    return (
        jnp.broadcast_to(here(jnp.cos(angle))[None, :], element.shape),
        jnp.broadcast_to(here(jnp.sin(angle))[None, :], element.shape),
    )


def _mean_square(env: StreamEnv, start: Any, heads: int, tag: Array, mask: Array) -> Array:
    """Of a projection to all heads at once; float32 scalar."""
    size = heads * env.dims.head_dim
    element = env.iota((next_power_of_2(size),), 0)
    # The mask is true everywhere or nowhere.
    there = (element < size) & (jnp.max(mask.astype(jnp.int32)) > 0)
    x = env.exchange.collect(start + element, tag, there)
    return jnp.sum(x * x) / size
