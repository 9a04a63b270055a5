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
from pallas_kernels.stream.env import StreamEnv, iota
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.state import State
from pallas_kernels.stream.tiles import Place

__all__ = ["Rotations", "finish_qkv", "make_rotations"]


class Rotations(NamedTuple):
    """Of each pair that this program rotates; float32 `[tiles, rows / 2, Bp]`."""

    cos: Array
    sin: Array


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
    angle = env.batch_lengths(iota(shape, 2)).astype(jnp.float32) * plgpu.load(
        env["inv_freq"].at[pair]
    )
    rotates = head < d.num_heads + d.num_kv_heads
    return Rotations(
        cos=jnp.where(rotates, jnp.cos(angle), 1.0), sin=jnp.where(rotates, jnp.sin(angle), 0.0)
    )


def finish_qkv(
    env: StreamEnv, rotations: Rotations, place: Place, sums: Array, state: State
) -> State:
    """(q, k, v)[b] = W_qkv @ rmsnorm(x[b]); q and k rotated; k and v go to the cache.

    Queries are scaled for a softmax in base 2. Attention reads all three from the mail: the
    cache's new position is for later steps.
    """
    d, half, bp = env.dims, env.plan.rows // 2, env.plan.padded_batch
    shape = (half, bp)
    b = iota(shape, 1)
    length = env.batch_lengths(b)
    mine = iota(rotations.cos.shape, 0) == place.number
    cos = jnp.sum(jnp.where(mine, rotations.cos, 0.0), axis=0)
    sin = jnp.sum(jnp.where(mine, rotations.sin, 0.0), axis=0)
    head, pair = _head_and_pair(env, place.group * half + iota(shape, 0))
    both = sums.reshape(half, 2, bp)
    is_first = iota(both.shape, 1) == 0
    first = jnp.sum(jnp.where(is_first, both, 0.0), axis=1)
    second = jnp.sum(jnp.where(is_first, 0.0, both), axis=1)
    is_query, is_value = head < d.num_heads, head >= d.num_heads + d.num_kv_heads
    softmax_scale = math.log2(math.e) / math.sqrt(d.head_dim)
    real = (b < d.batch) & (head < d.num_heads + 2 * d.num_kv_heads)
    # What a full cache has no slot for is dropped.
    new = real & (length < d.capacity)
    kv_head = lax.rem(jnp.maximum(head - d.num_heads, 0), jnp.int32(d.num_kv_heads))
    tag = env.tag(place.layer)
    for offset, value in (
        (0, first * cos - second * sin),
        (d.head_dim // 2, second * cos + first * sin),
    ):
        element = pair + offset
        # Attention multiplies the very numbers that the cache will hold.
        stored = value.astype(jnp.bfloat16)
        where = (place.layer, b, kv_head, length, element)
        plgpu.store(env["k"].at[where], stored, mask=new & ~is_query & ~is_value)
        plgpu.store(env["v"].at[where], stored, mask=new & is_value)
        word = jnp.where(is_query, value * softmax_scale, stored.astype(jnp.float32))
        at = env.mail.layout.qkv + b * d.qkv_dim + head * d.head_dim + element
        env.mail.publish(at, word, tag, real)
    return state
