"""Query, key and value projections, RoPE, and the cache's new position.

A group of rows holds both halves of some of one head's rotated pairs, so that the program
which computes them can rotate them. What a program computes is the same in every layer: its
sines and cosines are computed once a step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.stream import access
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.product import Outputs, Sums, outputs_of
from pallas_kernels.stream.tiles import Flush

__all__ = ["Rotations", "finish_qkv", "make_rotations", "scaled", "softmax_scale"]


class Rotations(NamedTuple):
    """Of each pair that this program rotates; float32 `[E]`.

    The second two are those of layers that have frequencies of their own, where there are some.
    """

    cos: Array
    sin: Array
    other_cos: Array | None
    other_sin: Array | None


def _head_and_pair(env: StreamEnv, pair: Array) -> tuple[Array, Array]:
    per_head = jnp.int32(env.dims.head_dim // 2)
    head = lax.div(pair, per_head)
    return head, pair - head * per_head


def make_rotations(env: StreamEnv) -> Rotations:
    """The rotations at this step's positions; values are not rotated."""
    d, plan = env.dims, env.plan
    outputs = outputs_of(env, Segment.QKV)
    group = env.program + outputs.number * plan.programs
    head, pair = _head_and_pair(env, group * (env.segment(Segment.QKV).rows // 2) + outputs.pair)
    position = env.positions(outputs.column).astype(jnp.float32)
    rotates = head < d.num_heads + d.num_kv_heads

    def both(name: str, scale: float = 1.0) -> tuple[Array, Array]:
        angle = position * access.load(env[name].at[pair])
        return (
            jnp.where(rotates, scaled(env, jnp.cos(angle), pair, scale), 1.0),
            jnp.where(rotates, scaled(env, jnp.sin(angle), pair, scale), 0.0),
        )

    other = both("inv_freq_other") if env.features.other_rope else (None, None)
    return Rotations(*both("inv_freq", env.features.rope_scale), *other)


def scaled(env: StreamEnv, x: Array, pair: Array, scale: float) -> Array:
    """Cosines or sines multiplied, as far as the pairs are rotated."""
    if scale == 1:
        return x
    if (pairs := env.features.rotary_pairs) is None:
        return x * scale
    return jnp.where(pair < pairs, x * scale, x)


def softmax_scale(env: StreamEnv) -> float:
    """What queries are multiplied by, so that scores come ready for their softmax.

    Scores that are capped come as the argument of tanh, others for powers of 2.
    """
    features = env.features
    scale = features.attn_scale
    if scale is None:
        scale = 1 / math.sqrt(env.dims.head_dim)
    if features.attn_softcap is not None:
        return scale / features.attn_softcap
    return scale * math.log2(math.e)


def finish_qkv(
    env: StreamEnv, rotations: Rotations, flush: Flush, outputs: Outputs, sums: Sums
) -> None:
    """(q, k, v)[c] = W_qkv @ h, and a bias; q and k rotated; k and v go to the cache.

    Attention reads all three from the exchange: the cache's new position is for later steps.
    Queries and keys that are normed first can only be rotated where the norm is known: that
    is attention's work, see `heads`.
    """
    d, features = env.dims, env.features
    column = outputs.column
    place = env.positions(column)
    sequence, _ = env.sequence_and_token(column)
    group = flush.group(outputs.number)
    head, pair = _head_and_pair(env, group * (env.segment(Segment.QKV).rows // 2) + outputs.pair)
    first, second = sums
    is_query, is_value = head < d.num_heads, head >= d.num_heads + d.num_kv_heads
    real = flush.real(outputs.number) & (column < d.columns)
    real &= head < d.num_heads + 2 * d.num_kv_heads
    row = head * d.head_dim + pair
    if features.qkv_bias:
        bias = env["qkv_bias"]
        layer, inside = flush.layer, jnp.minimum(row, d.qkv_dim - d.head_dim // 2 - 1)
        first += bias[layer, inside].astype(jnp.float32)
        second += bias[layer, inside + d.head_dim // 2].astype(jnp.float32)
    if features.qk_norm is None:
        cos, sin = rotations.cos, rotations.sin
        if rotations.other_cos is not None and rotations.other_sin is not None:
            other = env.rotates_otherwise(flush.layer)
            cos = jnp.where(other, rotations.other_cos, cos)
            sin = jnp.where(other, rotations.other_sin, sin)
        first, second = first * cos - second * sin, second * cos + first * sin
    scale = 1.0 if features.qk_norm is not None else softmax_scale(env)
    # What a full cache has no room for is dropped.
    new = real & (place < d.capacity)
    kv_head = lax.rem(jnp.maximum(head - d.num_heads, 0), jnp.int32(d.num_kv_heads))
    tag = env.tag(flush.layer)

    def keep(name: str, element: Array, stored: Array, mask: Array) -> None:
        # An interpreted store writes what was there where the mask is false: far off, so that
        # it does not meet what the same store writes.
        position = jnp.where(mask, place, d.capacity) if env.interpret else place
        where = (flush.layer, sequence, kv_head, position, element)
        access.store(env[name].at[where], stored, mask=mask)

    for offset, value in ((0, first), (d.head_dim // 2, second)):
        # Attention multiplies the very numbers that the cache will hold.
        stored = value.astype(jnp.bfloat16)
        keep("v", pair + offset, stored, new & is_value)
        rounded = stored.astype(jnp.float32)
        if features.qk_norm is None:
            keep("k", pair + offset, stored, new & ~is_query & ~is_value)
        else:
            rounded = jnp.where(is_value, rounded, value)
        word = jnp.where(is_query, value * scale, rounded)
        at = env.exchange.layout.qkv + column * d.qkv_dim + row + offset
        env.exchange.publish(at, word, tag, real)
