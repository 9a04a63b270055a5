"""The streamed step, stage by stage: what one launch does, as a list that can be run in parts.

In the kernel a program goes from stage to stage by itself and waits where it must. Run one
launch a stage, no program ever has to wait: interpreted, programs run one after another, each
to its end. So a step of several programs can be compared with the model on a CPU, and a fault
be traced to its stage.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.dims import DecodeWeights
from pallas_kernels.launch import StepState
from pallas_kernels.stream.activations import collect_activations
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.fragments import no_fragments
from pallas_kernels.stream.kernel import finish_tiles, is_due, leave_segment
from pallas_kernels.stream.launch import StepResult, run_stream
from pallas_kernels.stream.plan import LAYER_SEGMENTS, Segment, StreamPlan
from pallas_kernels.stream.product import Sums, multiply
from pallas_kernels.stream.ring import start_ring
from pallas_kernels.stream.segments.attention import attend_parts, combine_parts
from pallas_kernels.stream.segments.qkv import make_rotations
from pallas_kernels.stream.segments.residual import add_block, close_block, leave_embed
from pallas_kernels.stream.state import NO_TOKEN, State
from pallas_kernels.stream.tiles import (
    first_place,
    next_place,
)

__all__ = ["Stage", "run_stage", "run_stages", "stages_of", "state_shapes"]


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
    columns, half = plan.padded_columns, plan.rows // 2
    owned = (plan.programs, plan.flushed(Segment.EMBED) * half * columns)
    best = (plan.programs, plan.flushed(Segment.HEAD) * half * columns)
    names = ("residual_first", "residual_second", "block_first", "block_second")
    return {
        **{name: jax.ShapeDtypeStruct(owned, jnp.float32) for name in names},
        "best_logit": jax.ShapeDtypeStruct(best, jnp.float32),
        "best_token": jax.ShapeDtypeStruct(best, jnp.int32),
    }


def _carried(state: State) -> dict[str, Array]:
    residual, block = state.residual, state.block
    return {
        "residual_first": residual.first,
        "residual_second": residual.second,
        "block_first": block.first,
        "block_second": block.second,
        "best_logit": state.best_logit,
        "best_token": state.best_token,
    }


def run_stage(stage: Stage, env: StreamEnv) -> None:
    """One stage, as every program runs it; a body for `launch.run_stream`."""
    plan, layer = env.plan, jnp.int32(stage.layer)
    kept = {name: env[name][env.program] for name in state_shapes(plan)}
    state = State(
        activations=no_fragments(env),
        residual=Sums(kept["residual_first"], kept["residual_second"]),
        block=Sums(kept["block_first"], kept["block_second"]),
        best_logit=kept["best_logit"],
        best_token=kept["best_token"],
    )
    first = first_place(env, stage.segment, layer)
    if stage.what == "parts":
        attend_parts(env, layer)
    elif stage.what == "combine":
        combine_parts(env, layer)
    elif stage.what == "close":
        state = close_block(env, first, state)
    elif stage.what == "add":
        state = add_block(env, first, state)
    elif stage.segment == Segment.EMBED:
        state = leave_embed(env, state)
    elif stage.what == "leave":
        state = leave_segment(env, first, state)
    else:
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

        start = plan.first_tile(stage.segment, stage.layer)
        end = start + env.segment(stage.segment).tiles
        _, state = lax.fori_loop(jnp.int32(start), jnp.int32(end), tile_step, (first, state))
    for name, value in _carried(state).items():
        env[name][env.program] = value


def run_stages(
    plan: StreamPlan,
    weights: DecodeWeights,
    state: StepState,
    tokens: Array,
    *,
    hidden_layers: tuple[int, ...] = (),
) -> StepResult:
    """A step of several programs on a CPU: one launch a stage, so that nobody has to wait.

    Args: see `launch.stream_step`.
    """
    d = plan.dims
    carried = {name: jnp.zeros(x.shape, x.dtype) for name, x in state_shapes(plan).items()}
    # What is read before it is written is no number.
    for name in ("residual_first", "residual_second"):
        carried[name] = jnp.full_like(carried[name], jnp.nan)
    carried["best_logit"] = jnp.full_like(carried["best_logit"], -jnp.inf)
    carried["best_token"] = jnp.full_like(carried["best_token"], NO_TOKEN)
    carried["logits"] = jnp.full((d.columns, d.vocab_size), jnp.nan, jnp.float32)
    carried["token"] = jnp.full((d.columns,), -1, jnp.int32)
    if hidden_layers:
        shape = (d.columns, len(hidden_layers), d.model_dim)
        carried["hidden"] = jnp.full(shape, jnp.nan, jnp.float32)
    options = {"xla_backend_optimization_level": 0}  # each runs once
    for stage in stages_of(plan):
        body = functools.partial(run_stage, stage)
        how = {"hidden_layers": hidden_layers, "interpret": True}
        run = functools.partial(run_stream, body, plan, **how)
        made = jax.jit(run, compiler_options=options)(weights, state, tokens, updated=carried)
        state = StepState(*(made[name] for name in StepState._fields))
        carried = {name: made[name] for name in carried}
    return StepResult(carried["logits"], carried["token"], state, carried.get("hidden"))
