"""A few decode steps: the kernel beside the reference, the kernel again, and memory's speed."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Any

from flax import nnx
from jax import Array

from ffjax.benchmark.bandwidth import Bandwidth, default_bytes, read_bandwidth
from ffjax.benchmark.check import compare, follow, observe
from ffjax.benchmark.contenders import Contender, implementation
from ffjax.benchmark.inputs import first_tokens, random_model, started_cache
from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.decode import (
    DecodeOutput,
    Implementation,
    choose_kernel,
    default_device,
    fused_step,
)
from ffjax.doctor.choices import BATCHES
from ffjax.model import Transformer

__all__ = ["MOST_ERROR", "Trial", "bandwidth", "interpreted_trial", "trials"]

MOST_ERROR = 0.1
"""Of the logits' norm. Two right computations in bfloat16 lie up to 0.04 apart, wrong ones 0.5."""

_STEPS = 8
# After the first KV split of attention, so that splits are combined.
_POSITION = 300
# Interpreted in seconds.
_SMALL = ModelConfig(
    name="a small random model",
    vocab_size=101,
    num_layers=2,
    model_dim=144,
    ffw_dim=208,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
)
_SMALL_STEPS, _SMALL_POSITION, _SMALL_BATCH = 2, 40, 1
_REPETITIONS = 5


@dataclasses.dataclass(frozen=True)
class Trial:
    """A kernel beside the reference: the same weights, cache and tokens, step by step.

    Attributes:
        model: whose weights.
        kernel: whose steps.
        interpreted: whether its body was interpreted, for want of a GPU that can run it.
        batch: B.
        steps: how many.
        position: live positions before the first one.
        finite: whether all its logits were finite.
        repeats: whether a second run gave the same bits.
        relative_error: L2 norm of the difference of logits over that of the reference's; of the
            step and sequence where that is largest.
        same_tokens: greedy choices that are the same, of `batch * steps`.
        seconds: what the trial took, compiling included.
    """

    model: str
    kernel: Implementation
    interpreted: bool
    batch: int
    steps: int
    position: int
    finite: bool
    repeats: bool
    relative_error: float
    same_tokens: int
    seconds: float

    @property
    def what_is_wrong(self) -> str | None:
        """A sentence, or None where nothing is."""
        which = f"{self.kernel!r} with a batch of {self.batch} on {self.model}"
        report = "Report it with this text; implementation='xla' computes rightly meanwhile."
        if not self.finite:
            return f"The logits of {which} are not finite, those of the reference are. {report}"
        if not self.repeats:
            return f"A second run of {which} gave other bits. {report}"
        if not self.relative_error <= MOST_ERROR:
            return (
                f"The logits of {which} lie {self.relative_error:.3g} of their norm from the "
                f"reference's, where {MOST_ERROR} is the most that rounding explains. {report}"
            )
        return None


def trials(model: Transformer) -> list[Trial]:
    """Tries the fused kernel that would be chosen here, with 1 and with 8 sequences.

    Args:
        model: its weights finite.

    Returns:
        A trial each; none for a batch with which no kernel can run.
    """
    config, found = model.config, []
    steps = min(_STEPS, config.max_context)
    position = max(min(_POSITION, config.max_context - steps), 0)
    capacity = position + steps
    for batch in BATCHES:
        kernel, _ = choose_kernel(config, model.dtype, batch, capacity)
        if kernel is not None:
            found.append(
                _trial(model, kernel, implementation(model, kernel), batch, position, steps)
            )
    return found


def interpreted_trial() -> Trial:
    """Tries the kernel's body on a small random model, interpreted on a CPU."""
    model = random_model(_SMALL)
    graph, params = nnx.split(model)

    def step(params: Any, cache: KVCache, tokens: Array) -> DecodeOutput:
        whole = nnx.merge(graph, params)
        return fused_step(whole, cache, tokens, interpret=True)

    contender = Contender(step, params, lambda cache: cache)
    return _trial(model, "pallas", contender, _SMALL_BATCH, _SMALL_POSITION, _SMALL_STEPS, True)


def _trial(
    model: Transformer,
    kernel: Implementation,
    contender: Contender,
    batch: int,
    position: int,
    steps: int,
    interpreted: bool = False,
) -> Trial:
    start = time.perf_counter()
    config = model.config
    fresh = functools.partial(started_cache, config, batch, position, position + steps)
    seen = observe(contender, fresh(), first_tokens(config, batch), steps)
    wanted, _ = follow(implementation(model, "xla"), fresh(), seen.fed)
    difference = compare(seen.logits, wanted)
    return Trial(
        model=config.name,
        kernel=kernel,
        interpreted=interpreted,
        batch=batch,
        steps=steps,
        position=position,
        finite=math.isfinite(float(abs(seen.logits).max())),
        repeats=seen.repeats,
        relative_error=difference.relative_error,
        same_tokens=difference.same_tokens,
        seconds=time.perf_counter() - start,
    )


def bandwidth() -> Bandwidth:
    """The read bandwidth of the default device."""
    return read_bandwidth(default_bytes(default_device()), _REPETITIONS)
