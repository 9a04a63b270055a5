"""The streamed kernel's body: one loop over this program's tiles of the whole step."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.operand import collect_operand
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.segments.attention import attend_parts, combine_parts
from pallas_kernels.stream.segments.gate_up import finish_gate_up
from pallas_kernels.stream.segments.head import finish_head, leave_head
from pallas_kernels.stream.segments.qkv import Rotations, finish_qkv, make_rotations
from pallas_kernels.stream.segments.residual import (
    add_block,
    close_block,
    finish_projection,
    leave_embed,
)
from pallas_kernels.stream.state import State, empty_state
from pallas_kernels.stream.tiles import Place, load_weights, locate, prefetch_weights, tile_sums

__all__ = ["finish_tile", "leave_segment", "stream_kernel"]


def finish_tile(
    env: StreamEnv, rotations: Rotations, place: Place, sums: Array, state: State
) -> State:
    """What becomes of a tile's sums."""
    ways = {
        Segment.QKV: lambda: finish_qkv(env, rotations, place, sums, state),
        Segment.ATTN_OUT: lambda: finish_projection(env, place, sums, state),
        Segment.GATE_UP: lambda: finish_gate_up(env, place, sums, state),
        Segment.HEAD: lambda: finish_head(env, place, sums, state),
    }
    # Both projections share their code: the kernel holds it once.
    number = jnp.where(place.segment == Segment.DOWN, jnp.int32(Segment.ATTN_OUT), place.segment)
    number = jnp.where(number == Segment.HEAD, jnp.int32(3), number)
    return lax.cond(place.real, lambda: lax.switch(number, list(ways.values())), lambda: state)


def leave_segment(env: StreamEnv, place: Place, state: State) -> State:
    """What follows a program's last tile of a segment."""

    def leave_qkv():
        attend_parts(env, place.layer)
        combine_parts(env, place.layer)
        return state

    def leave_block():
        return add_block(env, place, close_block(env, place, state))

    ways = {
        Segment.QKV: leave_qkv,
        Segment.ATTN_OUT: leave_block,
        Segment.GATE_UP: lambda: state,
        Segment.HEAD: lambda: leave_head(env, place, state),
        Segment.EMBED: lambda: leave_embed(env, place, state),
    }
    # Both projections share their code: the kernel holds it once.
    is_down = place.segment == Segment.DOWN
    number = jnp.where(is_down, jnp.int32(Segment.ATTN_OUT), place.segment)
    number = jnp.where(number > Segment.DOWN, number - 1, number)
    return lax.switch(number, [ways[s] for s in sorted(ways)])


def _ask_ahead(env: StreamEnv, place: Place, index: Array) -> None:
    """Asks for tiles beyond those in flight, while attention leaves memory idle."""
    if not env.plan.tuning.l2_tiles:
        return

    @pl.when(place.segment == Segment.QKV)
    def _():
        first = index + env.plan.num_stages
        last = env.plan.total_tiles - 1
        for ahead in range(env.plan.tuning.l2_tiles):
            prefetch_weights(env, locate(env, jnp.minimum(first + ahead, last)))


def stream_kernel(env: StreamEnv) -> None:
    """One whole decode step, as every program runs it.

    The loop's only loads that the compiler may move are those of weights: it keeps the next
    tiles on their way, whatever segment or layer they belong to. Everything that waits stands
    at the end of an iteration, behind its tile's last use and before the next one's first.
    """
    rotations = make_rotations(env)
    total = env.plan.total_tiles

    def tile_step(index, state):
        tile = load_weights(env, locate(env, env.again(index)))
        place = locate(env, index)
        sums = tile_sums(env, tile, state.vectors)
        state = finish_tile(env, rotations, place, sums, state)

        def change_segment():
            _ask_ahead(env, place, index)
            left = leave_segment(env, place, state)
            following = locate(env, jnp.minimum(index + 1, total - 1))
            vectors = lax.cond(
                index < total - 1, lambda: collect_operand(env, following), lambda: left.vectors
            )
            return left._replace(vectors=vectors)

        return lax.cond(place.last, change_segment, lambda: state)

    lax.fori_loop(jnp.int32(0), jnp.int32(total), tile_step, empty_state(env))
