"""The fused kernel's body: one loop over this program's tiles of the whole step."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.stream import access
from pallas_kernels.stream.activations import collect_activations
from pallas_kernels.stream.cache import feed_cache, start_cache
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.feeding import feed_more, feed_ring, with_ring
from pallas_kernels.stream.fragments import no_fragments
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.product import multiply, outputs_of, sum_up
from pallas_kernels.stream.ring import next_turn, start_ring
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
from pallas_kernels.stream.tiles import (
    Place,
    first_place,
    flush_of,
    next_place,
    next_segment,
)

__all__ = [
    "finish_tiles",
    "is_due",
    "leave_segment",
    "leaves_time",
    "stream_kernel",
    "tiles_ahead",
]


def is_due(env: StreamEnv, place: Place) -> Array:
    """Whether the tiles up to this one are to be summed up; bool scalar."""
    is_full = place.flush_index == env.plan.flush - 1
    if env.segment(Segment.DOWN).run > 1:  # all of its groups' tiles belong together
        is_full &= place.segment != Segment.DOWN
    return place.last | is_full


def finish_tiles(env: StreamEnv, rotations: Rotations, place: Place, state: State) -> State:
    """Sums up the products of the tiles since the last flush; what becomes of the sums."""
    flush = flush_of(place)

    def way(segment: Segment) -> Callable[[], State]:
        def finish():
            if segment == Segment.GATE_UP:
                finish_gate_up(env, flush)
                return state
            sums = sum_up(env, segment, outputs_of(env, segment))
            # Of several sequences a program has no register left for addresses of all segments.
            outputs = outputs_of(env, segment, anew=env.plan.half2)
            if segment == Segment.HEAD:
                return finish_head(env, flush, outputs, sums, state)
            if segment in (Segment.ATTN_OUT, Segment.DOWN):
                return finish_projection(env, segment, flush, outputs, sums, state)
            finish_qkv(env, rotations, flush, outputs, sums)
            return state

        return finish

    segment = jnp.minimum(place.segment, jnp.int32(Segment.HEAD))
    ways = [way(s) for s in sorted(env.plan.segments)]
    return lax.cond(flush.tiles > 0, lambda: lax.switch(segment, ways), lambda: state)


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
        Segment.EMBED: lambda: state,
    }
    # Both projections share their code: the kernel holds it once.
    is_down = place.segment == Segment.DOWN
    number = jnp.where(is_down, jnp.int32(Segment.ATTN_OUT), place.segment)
    number = jnp.where(number > Segment.DOWN, number - 1, number)
    return lax.switch(number, [ways[s] for s in sorted(ways)])


def _meet(env: StreamEnv) -> None:
    """Waits for the program's other threads."""
    if not env.interpret:
        access.meet()


def tiles_ahead(env: StreamEnv, place: Place) -> Array:
    """Tiles beyond this one that may have been asked for when it has been used: int32 scalar.

    After a segment's last one the program waits for words, and others wait for its own: few tiles
    may be in their way.
    """
    # Of plain integers, Pallas would choose between bits.
    return jnp.where(place.last, jnp.int32(env.plan.next_tiles), jnp.int32(env.plan.slots))


def leaves_time(first: Place) -> Array:
    """Whether memory has time for more tiles when a segment's activations have come: bool scalar.

    Whoever attended has asked for some before attention's output came; and the head's stream is
    never interrupted.
    """
    return (first.segment != Segment.ATTN_OUT) & (first.segment < Segment.HEAD)


def stream_kernel(env: StreamEnv) -> None:
    """One whole decode step, as every program runs it.

    Everything that waits for other programs stands at the end of an iteration, after the
    tile's last use: its slot of the ring has been asked for anew by then.
    """
    # The embedding goes out first: others wait for it.
    state = leave_embed(env, empty_state(env))
    env = with_ring(env)
    turn = start_ring(env)
    start_cache(env)
    rotations = make_rotations(env)
    total = env.plan.total_tiles

    def tile_step(index, carry):
        turn, place, state = carry
        multiply(env, turn, index, place, state.activations)
        _meet(env)
        feed_ring(env, index + 1, tiles_ahead(env, place))

        def change_segment(state):
            left = leave_segment(env, place, state)
            following = next_segment(env, place)
            activations = lax.cond(
                index < total - 1,
                lambda: collect_activations(env, following),
                lambda: no_fragments(env),
            )
            # Nobody waits for long now: time for the next layer's keys and values, and for weights.
            lax.cond(
                following.segment == Segment.GATE_UP,
                lambda: feed_cache(env, following.layer + 1),
                lambda: None,
            )
            if (tiles := env.plan.tuning.collect_tiles) > 0:
                lax.cond(leaves_time(following), lambda: feed_more(env, tiles), lambda: None)
            return following, left._replace(activations=activations)

        def flush():
            finished = finish_tiles(env, rotations, place, state)
            _meet(env)
            return lax.cond(
                place.last,
                lambda: change_segment(finished),
                lambda: (next_place(place, flushed=True), finished),
            )

        place, state = lax.cond(is_due(env, place), flush, lambda: (next_place(place), state))
        return next_turn(env, turn), place, state

    start = turn, first_place(env, Segment.EMBED, 0), state
    lax.fori_loop(jnp.int32(0), jnp.int32(total), tile_step, start)
