"""The fused step, stage by stage: what one launch does, as a list that can be run in parts.

In the kernel a program goes from stage to stage by itself and waits where it must. Run one
launch a stage, no program ever has to wait: interpreted, programs run one after another, each
to its end. So a step of several programs can be compared with the model on a CPU, and a fault
be traced to its stage.

An array tells the launch which stage it is, so that all stages are one compiled program: one
compiled for each takes four times as long.
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
from pallas_kernels.stream.kernel import finish_tiles, is_due
from pallas_kernels.stream.launch import StepResult, run_stream
from pallas_kernels.stream.plan import LAYER_SEGMENTS, Segment, StreamPlan
from pallas_kernels.stream.product import Sums, multiply
from pallas_kernels.stream.ring import start_ring
from pallas_kernels.stream.segments.attention import attend_parts, combine_parts
from pallas_kernels.stream.segments.head import leave_head
from pallas_kernels.stream.segments.qkv import make_rotations
from pallas_kernels.stream.segments.residual import add_block, close_block, leave_embed
from pallas_kernels.stream.state import NO_TOKEN, State
from pallas_kernels.stream.tiles import Place, first_place, next_place

__all__ = ["Stage", "run_stage", "run_stages", "stages_of", "state_shapes", "told"]


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


_WAYS = ("embed", "tiles", "parts", "combine", "close", "add", "head")


def told(plan: StreamPlan) -> list[Array]:
    """What the body is told of each stage of a step in which something happens, in order.

    Returns:
        Arrays int32 `[5]`: the way, the segment, its layer, its first tile, and the first one
        after it.
    """
    return [
        jnp.array([_WAYS.index(way), stage.segment, stage.layer, *_tiles(plan, stage)], jnp.int32)
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


def run_stage(env: StreamEnv) -> None:
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
        way, [lambda ways=ways[name]: _kept(ways(state)) for name in _WAYS]
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
    carried["stage"] = jnp.zeros(5, jnp.int32)
    how = {"hidden_layers": hidden_layers, "interpret": True}
    run = jax.jit(
        functools.partial(run_stream, run_stage, plan, **how),
        # It takes less time to run than to optimise.
        compiler_options={"xla_backend_optimization_level": 0},
    )
    for stage in told(plan):
        made = run(weights, state, tokens, updated=carried | {"stage": stage})
        state = StepState(*(made[name] for name in StepState._fields))
        carried = {name: made[name] for name in carried}
    return StepResult(carried["logits"], carried["token"], state, carried.get("hidden"))
