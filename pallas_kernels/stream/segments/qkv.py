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
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dims import next_power_of_2
from pallas_kernels.program import iota
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.state import State
from pallas_kernels.stream.tiles import Place

__all__ = ["Rotations", "finish_qkv", "make_rotations", "softmax_scale"]


class Rotations(NamedTuple):
    """Of each pair that this program rotates; float32 `[tiles, rows / 2, Bp]`.

    The second two are those of local layers, where these have frequencies of their own.
    """

    cos: Array
    sin: Array
    local_cos: Array | None
    local_sin: Array | None


def _head_and_pair(env: StreamEnv, pair: Array) -> tuple[Array, Array]:
    per_head = jnp.int32(env.dims.head_dim // 2)
    head = lax.div(pair, per_head)
    return head, pair - head * per_head


def make_rotations(env: StreamEnv) -> Rotations:
    """The rotations at this step's positions; values are not rotated."""
    d, plan = env.dims, env.plan
    shape = (next_power_of_2(env.segment(Segment.QKV).tiles), plan.rows // 2, plan.padded_batch)
    group = env.program + iota(shape, 0) * plan.programs
    head, pair = _head_and_pair(env, group * (plan.rows // 2) + iota(shape, 1))
    position = env.batch_lengths(iota(shape, 2)).astype(jnp.float32)
    rotates = head < d.num_heads + d.num_kv_heads

    def both(name: str) -> tuple[Array, Array]:
        angle = position * plgpu.load(env[name].at[pair])
        return (
            jnp.where(rotates, jnp.cos(angle), 1.0),
            jnp.where(rotates, jnp.sin(angle), 0.0),
        )

    local = both("inv_freq_local") if env.features.local_rope else (None, None)
    return Rotations(*both("inv_freq"), *local)


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
    env: StreamEnv, rotations: Rotations, place: Place, sums: Array, state: State
) -> State:
    """(q, k, v)[b] = W_qkv @ h, and a bias; q and k rotated; k and v go to the cache.

    Attention reads all three from the mail: the cache's new position is for later steps.
    Queries and keys that are normed first can only be rotated where the norm is known: that
    is attention's work, see `heads`.
    """
    d, features = env.dims, env.features
    half, bp = env.plan.rows // 2, env.plan.padded_batch
    shape = (half, bp)
    b = iota(shape, 1)
    length = env.batch_lengths(b)
    head, pair = _head_and_pair(env, place.group * half + iota(shape, 0))
    both = sums.reshape(half, 2, bp)
    is_first = iota(both.shape, 1) == 0
    first = jnp.sum(jnp.where(is_first, both, 0.0), axis=1)
    second = jnp.sum(jnp.where(is_first, 0.0, both), axis=1)
    is_query, is_value = head < d.num_heads, head >= d.num_heads + d.num_kv_heads
    real = (b < d.batch) & (head < d.num_heads + 2 * d.num_kv_heads)
    row = head * d.head_dim + pair
    if features.qkv_bias:
        bias = env["qkv_bias"]
        layer, inside = place.layer, jnp.minimum(row, d.qkv_dim - d.head_dim // 2 - 1)
        first += bias[layer, inside].astype(jnp.float32)
        second += bias[layer, inside + d.head_dim // 2].astype(jnp.float32)
    if features.qk_norm is None:
        cos, sin = rotations.cos, rotations.sin
        if rotations.local_cos is not None and rotations.local_sin is not None:
            local = env.is_local(place.layer)
            cos = jnp.where(local, rotations.local_cos, cos)
            sin = jnp.where(local, rotations.local_sin, sin)
        mine = iota(cos.shape, 0) == place.number
        cos = jnp.sum(jnp.where(mine, cos, 0.0), axis=0)
        sin = jnp.sum(jnp.where(mine, sin, 0.0), axis=0)
        first, second = first * cos - second * sin, second * cos + first * sin
    scale = 1.0 if features.qk_norm is not None else softmax_scale(env)
    # What a full cache has no slot for is dropped.
    new = real & (length < d.capacity)
    kv_head = lax.rem(jnp.maximum(head - d.num_heads, 0), jnp.int32(d.num_kv_heads))
    tag = env.tag(place.layer)
    for offset, value in ((0, first), (d.head_dim // 2, second)):
        # Attention multiplies the very numbers that the cache will hold.
        stored = value.astype(jnp.bfloat16)
        where = (place.layer, b, kv_head, length, pair + offset)
        plgpu.store(env["v"].at[where], stored, mask=new & is_value)
        rounded = stored.astype(jnp.float32)
        if features.qk_norm is None:
            plgpu.store(env["k"].at[where], stored, mask=new & ~is_query & ~is_value)
        else:
            rounded = jnp.where(is_value, rounded, value)
        word = jnp.where(is_query, value * scale, rounded)
        at = env.mail.layout.qkv + b * d.qkv_dim + row + offset
        env.mail.publish(at, word, tag, real)
    return state
