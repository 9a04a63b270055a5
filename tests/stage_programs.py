"""One body that runs any stage of a streamed step, so that all stages are one compiled program.

`pallas_kernels.stream.stages` has a body a stage. Compiled one by one they take four times as long
as this one, which is told the stage by an array.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.stream.activations import collect_activations
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.fragments import no_fragments
from pallas_kernels.stream.kernel import finish_tiles, is_due
from pallas_kernels.stream.plan import Segment, StreamPlan
from pallas_kernels.stream.product import Sums, multiply
from pallas_kernels.stream.ring import start_ring
from pallas_kernels.stream.segments.attention import attend_parts, combine_parts
from pallas_kernels.stream.segments.head import leave_head
from pallas_kernels.stream.segments.qkv import make_rotations
from pallas_kernels.stream.segments.residual import add_block, close_block, leave_embed
from pallas_kernels.stream.stages import Stage, stages_of, state_shapes
from pallas_kernels.stream.state import State
from pallas_kernels.stream.tiles import Place, first_place, next_place

__all__ = ["run_any_stage", "told"]

WAYS = ("embed", "tiles", "parts", "combine", "close", "add", "head")


def told(plan: StreamPlan) -> list[Array]:
    """What the body is told of each stage of a step in which something happens, in order.

    Returns:
        Arrays int32 `[5]`: the way, the segment, its layer, its first tile, and the first one
        behind it.
    """
    return [
        jnp.array([WAYS.index(way), stage.segment, stage.layer, *_tiles(plan, stage)], jnp.int32)
        for stage in stages_of(plan)
        if (way := _way(stage)) is not None
    ]


def _way(stage: Stage) -> str | None:
    if stage.what != "leave":
        return stage.what
    # Nothing follows the tiles of the gate and the up projection.
    return {Segment.EMBED: "embed", Segment.HEAD: "head"}.get(stage.segment)


def _tiles(plan: StreamPlan, stage: Stage) -> tuple[int, int]:
    if stage.what != "tiles":
        return 0, 0
    start = plan.first_tile(stage.segment, stage.layer)
    return start, start + plan.segments[stage.segment].tiles


def run_any_stage(env: StreamEnv) -> None:
    """The stage that the array `stage` tells; a body for `launch.run_stream`."""
    way, segment, layer, start, end = (env["stage"][at] for at in range(5))
    kept = {name: env[name][env.program] for name in state_shapes(env.plan)}
    first = first_place(env, segment, layer)
    ways = {
        "embed": lambda state: leave_embed(env, state),
        "tiles": lambda state: _run_tiles(env, first, start, end, state),
        "parts": lambda state: _behind(attend_parts(env, layer), state),
        "combine": lambda state: _behind(combine_parts(env, layer), state),
        "close": lambda state: close_block(env, first, state),
        "add": lambda state: add_block(env, first, state),
        "head": lambda state: leave_head(env, first, state),
    }
    state = State(
        activations=no_fragments(env),
        residual=Sums(kept["residual_first"], kept["residual_second"]),
        block=Sums(kept["block_first"], kept["block_second"]),
        best_logit=kept["best_logit"],
        best_token=kept["best_token"],
    )
    residual, block, best_logit, best_token = lax.switch(
        way, [lambda ways=ways[name]: _kept(ways(state)) for name in WAYS]
    )
    made = (*residual, *block, best_logit, best_token)
    names = ("residual_first", "residual_second", "block_first", "block_second")
    for name, value in zip((*names, "best_logit", "best_token"), made, strict=True):
        env[name][env.program] = value


def _behind(_: None, state: State) -> State:
    """The state, which a stage has left as it was."""
    return state


def _kept(state: State) -> tuple[Sums, Sums, Array, Array]:
    return state.residual, state.block, state.best_logit, state.best_token


def _run_tiles(env: StreamEnv, first: Place, start: Array, end: Array, state: State) -> State:
    """All tiles of a segment, as every program runs them."""
    state = state._replace(activations=collect_activations(env, first))
    turn = start_ring(env)
    rotations = make_rotations(env)

    def tile_step(index, carry):
        place, state = carry
        multiply(env, turn, index, place, state.activations)

        def finish():
            finished = finish_tiles(env, rotations, place, state)
            return next_place(place, flushed=True), finished

        return lax.cond(is_due(env, place), finish, lambda: (next_place(place), state))

    return lax.fori_loop(start, end, tile_step, (first, state))[1]
