"""A part's queries, and the new positions' keys and values, as attention multiplies them.

They come from the exchange, ready for use unless the model norms queries and keys: then they come
as they were projected. A norm needs a whole head, or all heads, which no program of the
projection has; so whoever attends norms and rotates them, and whoever adds the new positions
stores their keys in the cache.
"""

from __future__ import annotations

import dataclasses
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


class _Which(NamedTuple):
    """What each number `[rows, H]` of a part is of: int32."""

    start: Array  # word of the exchange with which the sequence's `[T, N + 2K, H]` begin, a scalar
    element: Array  # of a head
    query: Array  # which of the N query heads
    token: Array | int  # whose query it is, of the sequence's T new tokens
    new: Array | int  # whose key and value


def _which(
    env: StreamEnv, sequence: Array, kv_head: Array, first_query: Array, rows: int
) -> _Which:
    """Rows are the queries that share a key/value head: G of each token, token by token."""
    d, shape = env.dims, (rows, env.dims.head_dim)
    element = env.iota(shape, 1)
    start = env.exchange.layout.qkv + sequence * (d.tokens * d.qkv_dim)
    if d.tokens == 1:
        query = kv_head * d.q_per_kv + jnp.minimum(first_query + env.iota(shape, 0), d.q_per_kv - 1)
        return _Which(start, element, query, 0, 0)
    row = env.iota(shape, 0)
    number = jnp.minimum(first_query + row, d.queries - 1)
    token = lax.div(number, jnp.int32(d.q_per_kv))
    new = jnp.minimum(row, d.tokens - 1)
    query = kv_head * d.q_per_kv + number - token * d.q_per_kv
    return _Which(start, element, query, token, new)


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
    d, tag = env.dims, env.tag(layer)
    which = _which(env, sequence, kv_head, first_query, rows)
    shape = which.element.shape
    everywhere = which.element >= 0
    asked = everywhere if rows <= LOT else env.iota(shape, 0) < lots * LOT
    new_there = (everywhere if d.tokens == 1 else env.iota(shape, 0) < d.tokens) & has_new
    part = _Part(env, layer, kv_head, position, tag, which, new_there)
    if env.features.qk_norm is None:
        return part.collect(asked)
    queries, keys, values = part.collect_normed(everywhere, everywhere & has_new)
    # Attention multiplies what the cache holds: keys as bfloat16.
    stored = keys.astype(jnp.bfloat16)
    _store_keys(env, layer, sequence, kv_head, position, has_new, keys)
    return Heads(queries * softmax_scale(env), stored.astype(jnp.float32), values)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of attention while its queries, keys and values are collected.

    Attributes:
        env: the program's view.
        layer: int32 scalar.
        kv_head: int32 scalar, which of the K heads.
        position: int32 scalar, the first new position.
        tag: that words carry.
        which: what each number is of.
        new_there: bool `[rows, H]`, which keys and values are waited for.
    """

    env: StreamEnv
    layer: Array
    kv_head: Array
    position: Array
    tag: Array
    which: _Which
    new_there: Array

    def _start_of(self, token: Array | int) -> Array:
        """Where the exchange has a token's queries, keys and values."""
        d = self.env.dims
        start = self.which.start
        return start if d.tokens == 1 else start + token * d.qkv_dim

    def _query(self, element: Array, mask: Array) -> tuple[Array, Array]:
        """Words of the queries, and which are waited for."""
        which = self.which
        return self._start_of(which.token) + which.query * self.env.dims.head_dim + element, mask

    def _new(self, head: Array, element: Array) -> tuple[Array, Array]:
        """Likewise of the new keys or values."""
        start = self._start_of(self.which.new)
        return start + head * self.env.dims.head_dim + element, self.new_there

    def collect(self, asked: Array) -> Heads:
        """What the projection has rotated already."""
        d, element = self.env.dims, self.which.element
        key, value = d.num_heads + self.kv_head, d.num_heads + d.num_kv_heads + self.kv_head
        wanted = [
            self._query(element, asked),
            self._new(key, element),
            self._new(value, element),
        ]
        return Heads(*self.env.exchange.collect_all(wanted, self.tag))

    def collect_normed(self, everywhere: Array, has_new: Array) -> Heads:
        """What is normed and rotated here; queries are not scaled for softmax yet.

        RoPE makes an element of itself and of its partner, half a head away. So that nothing goes
        from thread to thread, each thread waits for both.

        Args:
            everywhere: bool `[rows, H]`, all of it true.
            has_new: bool `[rows, H]`, whether there are keys, the same everywhere.
        """
        d, which, element = self.env.dims, self.which, self.which.element
        key, value = d.num_heads + self.kv_head, d.num_heads + d.num_kv_heads + self.kv_head
        half = d.head_dim // 2
        is_first = element < half
        partner = jnp.where(is_first, element + half, element - half)
        of_queries = self._rotation(which.token, is_first)
        of_keys = of_queries if d.tokens == 1 else self._rotation(which.new, is_first)
        wanted = [
            self._query(element, everywhere),
            self._query(partner, everywhere),
            self._new(key, element),
            self._new(key, partner),
            self._new(value, element),
        ]
        q, q_other, k, k_other, v = self.env.exchange.collect_all(wanted, self.tag)
        of_q = _Norm("q_norm", d.num_heads, 0, which.query, which.token, everywhere)
        queries = self._normed(of_q, q, q_other, partner, of_queries)
        kv = jnp.broadcast_to(self.kv_head, element.shape)
        of_k = _Norm("k_norm", d.num_kv_heads, d.num_heads, kv, which.new, has_new)
        return Heads(queries, self._normed(of_k, k, k_other, partner, of_keys), v)

    def _rotation(self, token: Array | int, is_first: Array) -> tuple[Array, Array]:
        """What an element is multiplied by, and its partner, when a token's head is rotated."""
        position = self.position + token
        cos, sin = _rotation(self.env, self.layer, position, self.which.element)
        return cos, jnp.where(is_first, -sin, sin)

    def _normed(
        self,
        norm: _Norm,
        x: Array,
        other: Array,
        partner: Array,
        rotation: tuple[Array, Array],
    ) -> Array:
        """Queries or keys, normed and rotated: `[rows, H]`.

        Args:
            norm: theirs.
            x: as they were projected.
            other: likewise each element's partner.
            partner: which element that is.
            rotation: from `_rotation`.
        """
        env, d, element = self.env, self.env.dims, self.which.element
        if env.features.qk_norm == "head":
            squares = jnp.sum(x * x, axis=1)[:, None] / d.head_dim
            at, at_other = element, partner
        else:  # of a token's heads all together
            squares = self._mean_square(norm, 0)
            for t in range(1, d.tokens):
                squares = jnp.where(norm.token == t, self._mean_square(norm, t), squares)
            at, at_other = (norm.head * d.head_dim + e for e in (element, partner))
        scale = lax.rsqrt(squares + d.norm_eps)
        x = x * scale * env.norm_weight(norm.name, self.layer, at)
        other = other * scale * env.norm_weight(norm.name, self.layer, at_other)
        cos, sin = rotation
        return x * cos + other * sin

    def _mean_square(self, norm: _Norm, token: int) -> Array:
        """Of a token's projection to all heads."""
        start = self._start_of(token) + norm.first_head * self.env.dims.head_dim
        return _mean_square(self.env, start, norm.heads, self.tag, norm.mask)


class _Norm(NamedTuple):
    """The norm of a part's queries, or of its keys."""

    name: str  # of its weights
    heads: int  # that a token has
    first_head: int  # the first of them among the N + 2K
    head: Array  # which of them each row is: int32 `[rows, H]`
    token: Array | int  # whose, likewise
    mask: Array  # bool `[rows, H]`, whether they are there: the same everywhere


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
