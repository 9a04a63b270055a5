"""The streamed step, stage by stage: what one launch does, as a list that can be run in parts.

In the kernel a program goes from stage to stage by itself and waits where it must. Run one
launch a stage, no program ever has to wait: interpreted, programs run one after another, each
to its end. So a step of several programs can be compared with the model on a CPU, and a fault
be traced to its stage.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.kernel import finish_tile, leave_segment
from pallas_kernels.stream.operand import collect_operand
from pallas_kernels.stream.plan import LAYER_SEGMENTS, Segment, StreamPlan
from pallas_kernels.stream.segments.attention import attend_parts, combine_parts
from pallas_kernels.stream.segments.qkv import make_rotations
from pallas_kernels.stream.segments.residual import add_block, close_block
from pallas_kernels.stream.state import State
from pallas_kernels.stream.tiles import load_weights, place_of, tile_sums

__all__ = ["Stage", "run_stage", "stages_of", "state_shapes"]


class Stage(NamedTuple):
    """One stage: the tiles of a segment, or what follows them.

    Attributes:
        what: "tiles", "leave"; of attention "parts" and "combine"; of a block "close" and "add".
        segment: which.
        layer: which.
    """

    what: str
    segment: Segment
    layer: int


# What follows a segment's tiles, where programs wait for each other on the way.
_ENDS = {
    Segment.QKV: ("parts", "combine"),
    Segment.ATTN_OUT: ("close", "add"),
    Segment.DOWN: ("close", "add"),
}


def stages_of(plan: StreamPlan) -> list[Stage]:
    """All stages of a step, in order."""
    stages = [Stage("leave", Segment.EMBED, 0)]
    for layer in range(plan.dims.num_layers):
        for segment in LAYER_SEGMENTS:
            stages.append(Stage("tiles", segment, layer))
            ends = _ENDS.get(segment, ("leave",))
            stages.extend(Stage(end, segment, layer) for end in ends)
    last = plan.dims.num_layers
    return [*stages, Stage("tiles", Segment.HEAD, last), Stage("leave", Segment.HEAD, last)]


def state_shapes(plan: StreamPlan) -> dict[str, jax.ShapeDtypeStruct]:
    """What programs carry from stage to stage: a row of each array a program."""
    tile = (plan.programs, plan.rows, plan.padded_batch)
    owned = (plan.programs, plan.owned, plan.rows, plan.padded_batch)
    return {
        "residual": jax.ShapeDtypeStruct(owned, jnp.float32),
        "block": jax.ShapeDtypeStruct(owned, jnp.float32),
        "best_logit": jax.ShapeDtypeStruct(tile, jnp.float32),
        "best_token": jax.ShapeDtypeStruct(tile, jnp.int32),
    }


def run_stage(stage: Stage, env: StreamEnv) -> None:
    """One stage, as every program runs it; a body for `launch.run_stream`."""
    plan, layer = env.plan, jnp.int32(stage.layer)
    carried = {name: env[name][env.program] for name in state_shapes(plan)}
    vectors = jnp.zeros((plan.columns, plan.depth), jnp.bfloat16)
    state = State(vectors=vectors, **carried)

    def place(number):
        return place_of(env, jnp.int32(stage.segment), layer, jnp.asarray(number, jnp.int32))

    if stage.what == "parts":
        attend_parts(env, layer)
    elif stage.what == "combine":
        combine_parts(env, layer)
    elif stage.what == "close":
        state = close_block(env, place(0), state)
    elif stage.what == "add":
        state = add_block(env, place(0), state)
    elif stage.what == "leave":
        state = leave_segment(env, place(0), state)
    else:
        state = state._replace(vectors=collect_operand(env, place(0)))
        rotations = make_rotations(env)

        def tile_step(number, state):
            here = place(number)
            sums = tile_sums(env, load_weights(env, here), state.vectors)
            return finish_tile(env, rotations, here, sums, state)

        tiles = jnp.int32(env.segment(stage.segment).tiles)
        state = lax.fori_loop(jnp.int32(0), tiles, tile_step, state)
    for name in carried:
        env[name][env.program] = getattr(state, name)
