"""Ways to run the kernel: compiled or interpreted as one launch, or a launch for each stage."""

from __future__ import annotations

import functools
from typing import Protocol

import jax
from jax import Array

from pallas_kernels.dims import DecodeWeights
from pallas_kernels.launch import StepState
from pallas_kernels.stream.launch import StepResult, stream_step
from pallas_kernels.stream.plan import StreamPlan

__all__ = ["Run", "compiled", "interpreted"]


class Run(Protocol):
    """Runs a step and leaves its arguments as they were."""

    def __call__(
        self,
        plan: StreamPlan,
        weights: DecodeWeights,
        state: StepState,
        tokens: Array,
        /,
        *,
        hidden_layers: tuple[int, ...],
    ) -> StepResult:
        """A step of tokens int32 `[B * T]`; see `stream_step`."""
        ...


def compiled(
    plan: StreamPlan,
    weights: DecodeWeights,
    state: StepState,
    tokens: Array,
    *,
    hidden_layers: tuple[int, ...],
) -> StepResult:
    """On the GPU that the arrays are on. Nothing is donated: XLA copies the cache."""
    return _jitted(plan, hidden_layers, False)(weights, state, tokens)


def interpreted(
    plan: StreamPlan,
    weights: DecodeWeights,
    state: StepState,
    tokens: Array,
    *,
    hidden_layers: tuple[int, ...],
) -> StepResult:
    """On a CPU, by one program: the plan is one for `pallas_kernels.gpu.INTERPRETER`."""
    return _jitted(plan, hidden_layers, True)(weights, state, tokens)


@functools.lru_cache
def _jitted(plan: StreamPlan, hidden_layers: tuple[int, ...], interpret: bool):
    how = {"hidden_layers": hidden_layers, "interpret": interpret}
    # What is interpreted runs once: optimising it would take longer than it saves.
    options = {"xla_backend_optimization_level": 0} if interpret else {}
    return jax.jit(functools.partial(stream_step, plan, **how), compiler_options=options)
