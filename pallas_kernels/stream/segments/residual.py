"""The residual stream: the embedding that starts it, and the projections added to it.

Program p owns groups p, p + P, p + 2P and so on of the residual's elements. It keeps them in
registers, in float32, for the whole step, and hands copies to whoever normalises them.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dims import next_power_of_2
from pallas_kernels.stream.env import StreamEnv, iota
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.state import State
from pallas_kernels.stream.tiles import Place

__all__ = ["finish_projection", "leave_attn_out", "leave_down", "leave_embed"]


def _elements(env: StreamEnv, shape: tuple[int, ...]) -> Array:
    """Elements of the residual that this program owns, int32; axes 0 and 1 are group and row."""
    group = env.program + iota(shape, 0) * env.plan.programs
    return group * env.plan.rows + iota(shape, 1)


def _publish(env: StreamEnv, residual: Array, start: int, tag: Array) -> None:
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
    _publish(env, x, env.mail.layout.x_in, env.tag(0))
    return state._replace(residual=x)


def _add(state: State, number: Array, sums: Array) -> State:
    mine = iota(state.residual.shape, 0) == number
    added = jnp.where(mine, sums[None], 0.0)
    return state._replace(residual=state.residual + added)


def finish_projection(env: StreamEnv, place: Place, sums: Array, state: State) -> State:
    """Adds a tile of a projection to the residual, or hands its partial sums to the owner."""
    down, bp = env.segment(Segment.DOWN), env.plan.padded_batch
    if down.splits == 1:
        return _add(state, place.number, sums)

    def keep():
        return _add(state, place.number, sums)

    def hand_over():
        element = place.group * env.plan.rows + iota(sums.shape, 0)
        b = iota((env.plan.rows, bp), 1)
        real = (element < env.dims.model_dim) & (b < env.dims.batch)
        pair = (b * env.dims.model_dim + element) * down.splits + place.split
        at = env.mail.layout.partial + 2 * pair
        env.mail.publish_pair(at, sums, env.tag(place.layer), real)
        return state

    return lax.cond(place.segment == Segment.ATTN_OUT, keep, hand_over)


def leave_attn_out(env: StreamEnv, place: Place, state: State) -> State:
    """Hands the residual to the feed-forward block."""
    _publish(env, state.residual, env.mail.layout.x_mid, env.tag(place.layer))
    return state


def leave_down(env: StreamEnv, place: Place, state: State) -> State:
    """Adds up the partial sums, in order, and hands the residual to the next layer."""
    splits = env.segment(Segment.DOWN).splits
    if splits > 1:
        owned, rows, bp = state.residual.shape
        shape = (owned, rows, bp, next_power_of_2(splits))
        element, b, split = _elements(env, shape), iota(shape, 2), iota(shape, 3)
        real = (element < env.dims.model_dim) & (b < env.dims.batch) & (split < splits)
        pair = (b * env.dims.model_dim + element) * splits + split
        at = env.mail.layout.partial + 2 * pair
        bits = env.mail.collect_pair(at, env.tag(place.layer), real)
        partial = lax.bitcast_convert_type(bits, jnp.float32)
        state = state._replace(residual=state.residual + partial.sum(axis=3))
    _publish(env, state.residual, env.mail.layout.x_in, env.tag(place.layer + 1))
    return state
