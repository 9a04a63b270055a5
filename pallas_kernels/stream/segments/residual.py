"""The residual stream: the embedding that starts it, and the projections added to it.

Program p owns groups p, p + P, p + 2P and so on of the residual's elements. It keeps them in
registers, in float32, for the whole step, and hands copies to whoever normalises them.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dims import next_power_of_2
from pallas_kernels.program import iota
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.state import State
from pallas_kernels.stream.tiles import Place

__all__ = ["add_block", "close_block", "finish_projection", "leave_embed"]


def _elements(env: StreamEnv, shape: tuple[int, ...]) -> Array:
    """Elements of the residual that this program owns, int32; axes 0 and 1 are group and row."""
    group = env.program + iota(shape, 0) * env.plan.programs
    return group * env.plan.rows + iota(shape, 1)


def _publish(env: StreamEnv, residual: Array, start: Array | int, tag: Array) -> None:
    element, b = _elements(env, residual.shape), iota(residual.shape, 2)
    real = (element < env.dims.model_dim) & (b < env.dims.batch)
    env.mail.publish(start + b * env.dims.model_dim + element, residual, tag, real)


def leave_embed(env: StreamEnv, place: Place, state: State) -> State:
    """x[b] = embed[tokens[b]]. Ids outside the vocabulary are clamped."""
    d, shape = env.dims, state.residual.shape
    b = jnp.minimum(iota(shape, 2), d.batch - 1)
    token = jnp.clip(plgpu.load(env["tokens"].at[b]), 0, d.vocab_size - 1)
    element = _elements(env, shape)
    real = element < d.model_dim
    row = env["embed"].at[token, jnp.minimum(element, d.model_dim - 1)]
    x = plgpu.load(row, mask=real, other=0.0).astype(jnp.float32)
    if env.features.embed_scale != 1:
        x = x * env.features.embed_scale
    _publish(env, x, env.mail.layout.x_in, env.tag(0))
    return state._replace(residual=x)


def _gather(state: State, number: Array, sums: Array) -> State:
    """The sums of this program's `number`-th group become part of the block's output."""
    mine = iota(state.block.shape, 0) == number
    return state._replace(block=state.block + jnp.where(mine, sums[None], 0.0))


def finish_projection(env: StreamEnv, place: Place, sums: Array, state: State) -> State:
    """Keeps a tile of a projection for the residual, or hands its partial sums to the owner."""
    down, bp = env.segment(Segment.DOWN), env.plan.padded_batch
    if down.splits == 1:
        return _gather(state, place.number, sums)

    def keep():
        return _gather(state, place.number, sums)

    def hand_over():
        element = place.group * env.plan.rows + iota(sums.shape, 0)
        b = iota((env.plan.rows, bp), 1)
        real = (element < env.dims.model_dim) & (b < env.dims.batch)
        pair = (b * env.dims.model_dim + element) * down.splits + place.split
        at = env.mail.layout.partial + 2 * pair
        env.mail.publish_pair(at, sums, env.tag(place.layer), real)
        return state

    return lax.cond(place.segment == Segment.ATTN_OUT, keep, hand_over)


def _collect_squares(env: StreamEnv, start: Array | int, tag: Array) -> Array:
    """Waits for all of a block's output; its mean square of each sequence, float32 `[Bp]`."""
    plan, d, bp = env.plan, env.dims, env.plan.padded_batch
    shape = (plan.columns, plan.depth)
    chunk, b = lax.div(iota(shape, 0), jnp.int32(bp)), lax.rem(iota(shape, 0), jnp.int32(bp))
    element = chunk * plan.depth + iota(shape, 1)
    # A program that owns nothing needs nothing.
    owns = env.program < env.segment(Segment.ATTN_OUT).groups
    there = (b < d.batch) & (element < d.model_dim) & owns
    x = env.mail.collect(start + b * d.model_dim + element, tag, there)
    return jnp.sum(x * x, axis=1).reshape(plan.columns // bp, bp).sum(axis=0) / d.model_dim


def close_block(env: StreamEnv, place: Place, state: State) -> State:
    """Completes this program's elements of a block's output, and hands them over to be normed."""
    layout, tag = env.mail.layout, env.tag(place.layer)
    splits = env.segment(Segment.DOWN).splits

    def add_partial_sums():
        owned, rows, bp = state.block.shape
        shape = (owned, rows, bp, next_power_of_2(splits))
        element, b, split = _elements(env, shape), iota(shape, 2), iota(shape, 3)
        real = (element < env.dims.model_dim) & (b < env.dims.batch) & (split < splits)
        pair = (b * env.dims.model_dim + element) * splits + split
        bits = env.mail.collect_pair(layout.partial + 2 * pair, tag, real)
        partial = lax.bitcast_convert_type(bits, jnp.float32)
        return state._replace(block=partial.sum(axis=3))

    is_down = place.segment == Segment.DOWN
    if splits > 1:
        state = lax.cond(is_down, add_partial_sums, lambda: state)
    if env.features.post_norm:
        start = jnp.where(is_down, jnp.int32(layout.ffw_block), jnp.int32(layout.attn_block))
        _publish(env, state.block, start, tag)
    return state


def add_block(env: StreamEnv, place: Place, state: State) -> State:
    """Adds a block's output to the residual, and hands the residual to who reads it next."""
    d, block, layout = env.dims, state.block, env.mail.layout
    is_down, tag = place.segment == Segment.DOWN, env.tag(place.layer)
    if env.features.post_norm:
        element = jnp.minimum(_elements(env, block.shape), d.model_dim - 1)
        weight = lax.cond(
            is_down,
            lambda: env.norm_weight("mlp_post_norm", place.layer, element),
            lambda: env.norm_weight("attn_post_norm", place.layer, element),
        )
        start = jnp.where(is_down, jnp.int32(layout.ffw_block), jnp.int32(layout.attn_block))
        scale = lax.rsqrt(_collect_squares(env, start, tag) + d.norm_eps)
        block = block * scale[None, None, :] * weight
    if env.features.residual_scale != 1:
        block = block * env.features.residual_scale
    residual = state.residual + block
    start = jnp.where(is_down, jnp.int32(layout.x_in), jnp.int32(layout.x_mid))
    _publish(env, residual, start, jnp.where(is_down, tag + 1, tag))
    return state._replace(residual=residual, block=jnp.zeros_like(block))
