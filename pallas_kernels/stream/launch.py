"""Launches a fused step: the one `pallas_call`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.dims import DecodeWeights
from pallas_kernels.launch import KERNEL_NAME, StepState, named_weights
from pallas_kernels.stream.descriptors import descriptors_shape
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.exchange import Exchange
from pallas_kernels.stream.exchange_layout import Layout, exchange_words
from pallas_kernels.stream.kernel import stream_kernel
from pallas_kernels.stream.layout import ALIGNMENT, SharedLayout
from pallas_kernels.stream.plan import Segment, StreamPlan
from pallas_kernels.stream.product import products_shape

__all__ = ["StepResult", "layout_of", "run_stream", "stream_step"]


class StepResult(NamedTuple):
    """What a step returns.

    Attributes:
        logits: float32 `[B * T, V]`.
        token: int32 `[B * T]`, the greedy ones.
        state: the cache.
        hidden: float32 `[B * T, n, D]`, of n layers that were asked for; None if none were.
    """

    logits: Array
    token: Array
    state: StepState
    hidden: Array | None


def layout_of(plan: StreamPlan) -> Layout:
    """Where the exchange's buffers lie for a step of this plan."""
    splits = plan.segments[Segment.DOWN].splits
    return Layout.of(plan.dims, splits, plan.attention.max_splits, plan.programs)


def run_stream(
    body: Callable[[StreamEnv], None],
    plan: StreamPlan,
    weights: DecodeWeights,
    state: StepState,
    tokens: Array,
    *,
    updated: dict[str, Array] | None = None,
    hidden_layers: tuple[int, ...] = (),
    interpret: bool = False,
) -> dict[str, Array]:
    """Runs `body` once on each of the plan's programs, as one launch.

    Args:
        body: the kernel's body.
        plan: the step's plan.
        weights: the weights.
        state: what is updated in place.
        tokens: int32 `[B * T]`, those of a sequence one after the other.
        updated: more arrays that the body knows by name and may update in place, logits
            and token among them. Those not given start as the allocator left them.
        hidden_layers: see `stream_step`.
        interpret: run on a CPU, programs one after another.

    Returns:
        The state, logits float32 `[B * T, V]`, token int32 `[B * T]`, `updated` and, of n
        layers, hidden float32 `[B * T, n, D]`, by name.

    Raises:
        ValueError: the programs cannot all be on the device at once, their tiles do not fit in
            shared memory, or the cache was made for another model or batch.
    """
    d, layout = plan.dims, layout_of(plan)
    if plan.programs > plan.resident and not interpret:
        raise ValueError(
            "Programs wait for each other, so all of a launch must be on the device at once: "
            f"this plan has {plan.programs}, the device holds {plan.resident}. "
            "Take the plan from make_stream_plan for this device."
        )
    if plan.why_no_room is not None and not interpret:
        raise ValueError(plan.why_no_room)
    if state.counters.shape[0] != (words := exchange_words(d)):
        raise ValueError(
            f"A step of {d.columns} tokens of this model hands over activations in {words} "
            f"words; the cache has {state.counters.shape[0]}. Make it with KVCache.create for "
            "this model and batch."
        )
    if plan.backend == "mosaic_gpu":  # it leaves shared memory to the kernel
        plan = dataclasses.replace(plan, num_stages=1)
    given = state._asdict() | (updated or {})
    made = {
        "logits": jax.ShapeDtypeStruct((d.columns, d.vocab_size), jnp.float32),
        "token": jax.ShapeDtypeStruct((d.columns,), jnp.int32),
    }
    if hidden_layers:
        shape = (d.columns, len(hidden_layers), d.model_dim)
        made["hidden"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if interpret:  # else in shared memory
        made["descriptors"] = jax.ShapeDtypeStruct(descriptors_shape(plan), jnp.int32)
        made["products"] = jax.ShapeDtypeStruct(products_shape(plan), jnp.float32)
    outputs: dict[str, Any] = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in given.items()}
    outputs |= {name: spec for name, spec in made.items() if name not in outputs}
    inputs = named_weights(weights) | {"tokens": tokens}
    aliases = {len(inputs) + i: i for i in range(len(given))}

    def kernel(*refs):
        refs_out = refs[len(inputs) + len(given) :]
        named = dict(zip(inputs, refs, strict=False)) | dict(zip(outputs, refs_out, strict=True))
        body(
            StreamEnv(
                plan=plan,
                refs=named,
                program=pl.program_id(0),
                lengths=tuple(jnp.maximum(named["lengths"][b], 0) for b in range(d.batch)),
                step=named["counters"][layout.steps],
                exchange=Exchange(
                    named["counters"],
                    layout,
                    interpret,
                    plan.threads,
                    sparing=plan.spares_addresses,
                ),
                shared=jnp.int32(0),  # see `feeding.with_ring`
                hidden_layers=hidden_layers,
                interpret=interpret,
            )
        )

    arrays, shapes = [*inputs.values(), *given.values()], list(outputs.values())
    if interpret:
        results = _interpret(kernel, plan.programs, arrays, shapes, aliases)
    else:
        results = _launch(kernel, plan, arrays, shapes, aliases)
    return dict(zip(outputs, results, strict=True))


def _interpret(kernel: Any, programs: int, arrays: Any, shapes: Any, aliases: Any) -> Any:
    """Runs the programs one after another, on a CPU."""
    return pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=shapes,
        input_output_aliases=aliases,
        interpret=True,
        name=KERNEL_NAME,
    )(*arrays)


def _launch(kernel: Any, plan: StreamPlan, arrays: Any, shapes: Any, aliases: Any) -> Any:
    """Runs the programs on a GPU, compiled by the plan's backend."""
    options: dict[str, Any] = {
        "programs": plan.programs,
        "threads": plan.threads,
        "arrays": arrays,
        "out_shapes": shapes,
        "aliases": aliases,
        "name": KERNEL_NAME,
    }
    if plan.backend == "mosaic_gpu":
        from pallas_kernels.mosaic_gpu.launch import launch

        size = SharedLayout.of(plan).size + ALIGNMENT
        return launch(kernel, shared_bytes=size, **options)
    from pallas_kernels.triton.launch import launch

    return launch(kernel, num_stages=plan.num_stages, **options)


def stream_step(
    plan: StreamPlan,
    weights: DecodeWeights,
    state: StepState,
    tokens: Array,
    *,
    hidden_layers: tuple[int, ...] = (),
    interpret: bool = False,
) -> StepResult:
    """One fused decode step: one kernel launch.

    Args:
        plan: the step's plan, from `make_stream_plan`.
        weights: the weights, as the model stores them.
        state: the cache; donate it to the surrounding jit, or XLA copies it.
        tokens: int32 `[B * T]`.
        hidden_layers: the layers after which the residual is returned, each once: 0 is the
            embedding, L what the final norm is given. Without any, the kernel has nothing of it.
        interpret: run on a CPU with one program.
    """
    results = run_stream(
        stream_kernel,
        plan,
        weights,
        state,
        tokens,
        hidden_layers=hidden_layers,
        interpret=interpret,
    )
    state = StepState(*(results[name] for name in StepState._fields))
    return StepResult(results["logits"], results["token"], state, results.get("hidden"))
