"""Query, key and value projections, RoPE, and the cache's new position.

A group of rows holds both halves of some of one head's rotated pairs, so that the program
which computes them can rotate them, and store keys and values where they belong.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.env import Env, Wait, no_wait
from pallas_kernels.matvec import PREFETCH, RowStream
from pallas_kernels.phases.residual import rms_scale
from pallas_kernels.program import iota

__all__ = ["qkv"]


def qkv(env: Env, layer: Array, wait: Wait = no_wait) -> None:
    """(q, k, v)[b] = W_qkv @ rmsnorm(x[b]); q and k rotated; k and v go to the cache.

    Queries are stored in float32, scaled for a softmax in base 2.
    """
    tile, d, bp = env.plan.qkv, env.dims, env.plan.padded_batch
    half = tile.rows // 2
    per_head = d.head_dim // tile.rows
    shape = (half, bp)
    b = iota(shape, 1)
    length = jnp.maximum(plgpu.load(env["lengths"].at[jnp.minimum(b, d.batch - 1)]), 0)
    softmax_scale = math.log2(math.e) / math.sqrt(d.head_dim)

    def rows_of(group):
        head = lax.div(group, jnp.int32(per_head))
        r = iota((tile.rows,), 0)
        pair = (group - head * per_head) * half + lax.rem(r, jnp.int32(half))
        return head * d.head_dim + pair + lax.div(r, jnp.int32(half)) * (d.head_dim // 2)

    groups = d.qkv_dim // tile.rows
    stream = RowStream(env, env["w_qkv"], layer, groups, rows_of, tile, env["x_operand"])
    prefetched = stream.prefetch(PREFETCH)
    wait()
    scale = rms_scale(env)

    def finish(j, group, sums, carry):
        head = lax.div(group, jnp.int32(per_head))
        pair = (group - head * per_head) * half + iota(shape, 0)
        angle = length.astype(jnp.float32) * env["inv_freq"][pair]
        rotates = head < d.num_heads + d.num_kv_heads
        cos = jnp.where(rotates, jnp.cos(angle), 1.0)
        sin = jnp.where(rotates, jnp.sin(angle), 0.0)
        both = (sums * scale[None, :]).reshape(2, half, bp)
        is_first = iota(both.shape, 0) == 0
        first = jnp.sum(jnp.where(is_first, both, 0.0), axis=0)
        second = jnp.sum(jnp.where(is_first, 0.0, both), axis=0)
        for offset, value in (
            (0, first * cos - second * sin),
            (d.head_dim // 2, second * cos + first * sin),
        ):
            element = pair + offset
            real = b < d.batch
            plgpu.store(
                env["q"].at[b, head * d.head_dim + element],
                value * softmax_scale,
                mask=real & (head < d.num_heads),
            )
            # What a full cache has no slot for is dropped.
            new = real & (length < d.capacity)
            kv_head = lax.rem(jnp.maximum(head - d.num_heads, 0), jnp.int32(d.num_kv_heads))
            stored = value.astype(jnp.bfloat16)
            where = (layer, b, kv_head, length, element)
            is_key = (head >= d.num_heads) & rotates
            plgpu.store(env["k"].at[where], stored, mask=new & is_key)
            plgpu.store(env["v"].at[where], stored, mask=new & ~rotates)
        return carry

    stream.run(finish, prefetched=prefetched)
