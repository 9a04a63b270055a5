"""What JAX's transformations make of a fused step: they take it whole, or refuse it.

The kernels know nothing of a transformation. `jax.vmap` would move the arrays that Pallas hands
to a kernel, and the kernels read them by their first address: every instance would compute the
first one's step. A derivative no kernel has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.dims import DecodeWeights
from pallas_kernels.launch import StepState
from pallas_kernels.stream.launch import StepResult

__all__ = ["NO_DERIVATIVE", "Launch", "launch_whole"]

Launch = Callable[[DecodeWeights, StepState, jax.Array], StepResult]
"""A step of weights, state and tokens int32 `[B * T]`."""

NO_DERIVATIVE = (
    "A fused decode step has no derivative, got one asked for, as by jax.grad, jvp, vjp or "
    "linearize. Use model(tokens, cache), or decode_step with implementation='xla'; or put "
    "jax.lax.stop_gradient around the step's arguments."
)
_NO_VARYING = (
    "A fused decode step does not say over which axes of a mesh its results vary, got a "
    "jax.shard_map that checks it. Call jax.shard_map with check_vma=False: every device then "
    "runs the step of its own arrays."
)


def launch_whole(
    launch: Launch, weights: DecodeWeights, state: StepState, tokens: jax.Array
) -> StepResult:
    """Launches a step such that transformations of JAX take it whole.

    Under `jax.vmap` the instances run one after another, each as a launch of its own; what is
    not mapped, the weights above all, is not copied. Under jit alone nothing is added: the
    launch is all there is.

    Args:
        launch: the step.
        weights: the weights.
        state: what the step updates.
        tokens: int32 `[B * T]`.

    Returns:
        What `launch` returns.

    Raises:
        NotImplementedError: a derivative is asked for, or arrays are sharded over the explicit
            axes of a mesh.
        ValueError: a `jax.shard_map` checks how results vary over its mesh.
    """
    _check_sharding(weights, state, tokens)

    def in_32_bits(*step):
        # The kernels' numbers are of 32 bits or fewer, also those that they write without a
        # dtype, whatever a program around them is in.
        with jax.enable_x64(False):
            return launch(*step)

    step = jax.custom_jvp(jax.custom_batching.sequential_vmap(in_32_bits))
    step.defjvp(_refuse_derivative)
    try:
        return step(weights, state, tokens)
    except ValueError as error:
        if "check_vma" in str(error):
            raise ValueError(_NO_VARYING) from error
        raise


def _refuse_derivative(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(NO_DERIVATIVE)


def _check_sharding(*arrays: Any) -> None:
    """Refuses what is known to be sharded over several devices.

    Under jit with automatic axes nothing is known here.
    """
    for leaf in jax.tree.leaves(arrays):
        spec = getattr(getattr(jax.typeof(leaf), "sharding", None), "spec", None)
        if spec is not None and any(axis is not None for axis in spec):
            raise NotImplementedError(
                "A fused decode step runs on one device, with all of each array; got an array "
                f"{list(leaf.shape)} sharded as {spec}. Call the step within jax.shard_map, "
                "batch by batch, or use implementation='xla'."
            )
