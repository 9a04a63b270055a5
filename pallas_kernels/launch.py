"""Launches a decode step: the one `pallas_call`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dims import DecodeWeights
from pallas_kernels.env import Env
from pallas_kernels.kernel import decode_kernel
from pallas_kernels.plan import Plan
from pallas_kernels.scratch import scratch_shapes
from pallas_kernels.sync import GridSync

# The kernel's name in compiled programs and in profiles.
KERNEL_NAME = "ffjax_decode_step"

__all__ = ["KERNEL_NAME", "StepState", "launch_step", "named_weights", "run_kernel"]

# Names the kernels use for the arrays of DecodeWeights, in its order.
_WEIGHT_NAMES = (
    "embed",
    "attn_norm",
    "w_qkv",
    "w_attn_out",
    "mlp_norm",
    "w_gate_up",
    "w_down",
    "final_norm",
    "w_head",
    "inv_freq",
    "inv_freq_local",
    "qkv_bias",
    "q_norm",
    "k_norm",
    "attn_post_norm",
    "mlp_post_norm",
    "qkv_scale",
    "attn_out_scale",
    "gate_up_scale",
    "down_scale",
    "head_scale",
)
_STATE = ("k", "v", "lengths", "counters")


class StepState(NamedTuple):
    """What a step updates in place.

    Attributes:
        k: `[L, B, K, S, H]`.
        v: `[L, B, K, S, H]`.
        lengths: int32 `[B]`.
        counters: int32 `[num_counters(B, K)]`, zero between steps.
    """

    k: Array
    v: Array
    lengths: Array
    counters: Array


def named_weights(weights: DecodeWeights) -> dict[str, Array]:
    """The arrays that a model has, by the names the kernels use."""
    pairs = zip(_WEIGHT_NAMES, weights, strict=True)
    return {name: array for name, array in pairs if array is not None}


def run_kernel(
    body: Callable[[Env], None],
    plan: Plan,
    weights: DecodeWeights,
    state: StepState,
    tokens: Array,
    *,
    scratch: dict[str, Array] | None = None,
    interpret: bool = False,
) -> dict[str, Array]:
    """Runs `body` once on each of the plan's programs, as one launch.

    Args:
        body: the kernel's body.
        plan: the step's plan.
        weights: the weights.
        state: what is updated in place.
        tokens: int32 `[B]`.
        scratch: contents of all scratch buffers and of logits and token, so that a
            step can be run phase by phase. None: they start as the allocator left them.
        interpret: run on a CPU, programs one after another.

    Returns:
        The state, logits float32 `[B, V]`, token int32 `[B]` and the scratch, by name.

    Raises:
        ValueError: the programs cannot all be on the device at once.
    """
    d = plan.dims
    if plan.programs > plan.resident and not interpret:
        raise ValueError(
            "Programs wait for each other, so all of a launch must be on the device at once: "
            f"this plan has {plan.programs}, the device holds {plan.resident}. "
            "Take the plan from make_plan for this device."
        )
    made: dict[str, Any] = {
        "logits": jax.ShapeDtypeStruct((d.batch, d.vocab_size), jnp.float32),
        "token": jax.ShapeDtypeStruct((d.batch,), jnp.int32),
        **scratch_shapes(plan),
    }
    updated = state._asdict() | (scratch or {})
    outputs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in updated.items()}
    outputs |= {name: spec for name, spec in made.items() if name not in outputs}
    inputs = named_weights(weights) | {"tokens": tokens}
    first_updated = len(inputs)
    aliases = {first_updated + i: i for i in range(len(updated))}

    def kernel(*refs):
        refs_in = refs[:first_updated]
        refs_out = refs[first_updated + len(updated) :]
        named = dict(zip(inputs, refs_in, strict=True)) | dict(zip(outputs, refs_out, strict=True))
        sync = GridSync(named["counters"], plan.programs, interpret)
        env = Env(
            plan=plan,
            refs=named,
            program=pl.program_id(0),
            lengths=tuple(jnp.maximum(named["lengths"][b], 0) for b in range(d.batch)),
            sync=sync,
            interpret=interpret,
        )
        body(env)

    call = pl.pallas_call(
        kernel,
        grid=(plan.programs,),
        out_shape=list(outputs.values()),
        input_output_aliases=aliases,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=plan.num_warps, num_stages=plan.num_stages),
        name=KERNEL_NAME,
    )
    results = call(*inputs.values(), *updated.values())
    return dict(zip(outputs, results, strict=True))


def launch_step(
    plan: Plan,
    weights: DecodeWeights,
    state: StepState,
    tokens: Array,
    *,
    interpret: bool = False,
) -> tuple[Array, Array, StepState]:
    """One fused decode step: one kernel launch.

    Args:
        plan: the step's plan, from `make_plan`.
        weights: the weights, as the model stores them.
        state: the cache; donate it to the surrounding jit, or XLA copies it.
        tokens: int32 `[B]`.
        interpret: run on a CPU with one program.

    Returns:
        Logits float32 `[B, V]`, the greedy token int32 `[B]`, and the new state.
    """
    results = run_kernel(decode_kernel, plan, weights, state, tokens, interpret=interpret)
    return results["logits"], results["token"], StepState(*(results[name] for name in _STATE))
