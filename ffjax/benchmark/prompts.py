"""A benchmark of prompts: how long from a request to its first token.

What is timed is what `ffjax.generate` does for one new token: `ffjax.loop.Loop` and its prefill.
Beside it stand the floor of its multiplications, at the rate of dense products measured in the
same run, and the bare decode step after the prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ffjax.benchmark.asked import MIN_REPETITIONS, check_asked
from ffjax.benchmark.contenders import choose, implementation
from ffjax.benchmark.dense_rate import DenseRate, default_size, dense_rate
from ffjax.benchmark.flops import PromptFlops, prompt_flops
from ffjax.benchmark.inputs import (
    capacity_for,
    first_tokens,
    random_model,
    random_prompts,
    started_cache,
)
from ffjax.benchmark.machine import Machine, check_memory
from ffjax.benchmark.prompt_check import (
    PromptCheck,
    ReferencePrefill,
    check_prefill,
    same_cache,
)
from ffjax.benchmark.span import Span
from ffjax.benchmark.timing import DecodeLoop, Samples, Timing, take_turns
from ffjax.config import ModelConfig
from ffjax.decode import Implementation, default_device
from ffjax.loop import BLOCK, Loop
from ffjax.model import Transformer
from ffjax.prefill.choice import Prefill
from ffjax.requests import Request

__all__ = ["Peak", "PromptPoint", "PromptReport", "PromptSweep", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSweep:
    """What to measure: every batch with prompts of every length.

    Attributes:
        config: the model's sizes.
        batches: values of B.
        spans: lengths of the prompts.
        steps: steps of the loop by which the bare step is timed.
        repetitions: timed requests, `MIN_REPETITIONS` or more.
        implementation: of prefill and steps, as `ffjax.generate` takes it.
        reference: whether to time the reference model in turn with it.

    Raises:
        ValueError: a number is out of its range; the model has too few positions; the fused
            kernel is asked for too many sequences.
    """

    config: ModelConfig
    batches: tuple[int, ...]
    spans: tuple[Span, ...]
    steps: int = 64
    repetitions: int = MIN_REPETITIONS
    implementation: Implementation | None = None
    reference: bool = False

    def __post_init__(self):
        config = self.config
        check_asked(config, self.batches, self.steps, self.repetitions, self.implementation)
        for span in self.spans:
            if not 1 <= span.shortest <= span.longest:
                raise ValueError(f"A prompt has at least 1 token, got {span}.")
            if span.ragged and min(self.batches) < 2:
                raise ValueError(
                    f"Prompts of {span} tokens are several, evenly spread between the two: ask "
                    "for a batch of 2 or more."
                )
            if span.longest >= config.max_context:
                raise ValueError(
                    f"A prompt of {span.longest} tokens and a new one need {span.longest + 1} "
                    f"positions; {config.name} was made for {config.max_context}."
                )
        if self.steps > config.max_context:
            raise ValueError(
                f"{self.steps} steps need as many positions; {config.name} was made for "
                f"{config.max_context}."
            )

    def step_position(self, span: Span) -> int:
        """Live positions before the first bare step: the longest prompt's, if steps fit there."""
        return min(span.longest, self.config.max_context - self.steps)


@dataclasses.dataclass(frozen=True)
class Peak:
    """The most memory that the process has had at a time, so far.

    Attributes:
        bytes: with weights and cache.
        raised: whether the prefill made it: else it is of what came before, and the prefill's own
            is at most that.
    """

    bytes: int
    raised: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptPoint:
    """Prompts of one batch and span, measured.

    Attributes:
        span: as asked for.
        lengths: tokens of each prompt.
        implementation: of the steps.
        prefill: of the prefill.
        reason: why steps are not the fused kernel's, where nobody had named it; else None.
        flops: what the prompts need.
        first_token: seconds from the prefill's call until the first token of each was here; the
            cache may still be being made when it starts.
        request: seconds from the arguments of `ffjax.generate` to the same moment.
        compile_seconds: of the first request, which is none of the timed ones. What it shares
            with prompts of fewer tokens has been compiled for those.
        reference: seconds of the reference model's prefill, or None.
        step: the bare step after the prompts.
        temp_bytes: most bytes for intermediates of one of the prefill's programs.
        peak: of the device's memory; None where it does not say.
        check: whether the numbers are right.
    """

    span: Span
    lengths: tuple[int, ...]
    implementation: Implementation
    prefill: Prefill
    reason: str | None
    flops: PromptFlops
    first_token: Samples
    request: Samples
    compile_seconds: float
    reference: Samples | None
    step: Timing
    temp_bytes: int
    peak: Peak | None
    check: PromptCheck

    @property
    def batch(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def steps(self) -> float:
        """Time to the first token, in bare steps."""
        return self.first_token.median / self.step.step_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptReport:
    """A benchmark's results.

    Attributes:
        sweep: what was asked for.
        machine: what it ran on.
        rate: of dense products, measured in the same run.
        points: in the order of batches, then spans.
    """

    sweep: PromptSweep
    machine: Machine
    rate: DenseRate
    points: tuple[PromptPoint, ...]

    def floor_seconds(self, point: PromptPoint) -> float:
        """Seconds that the multiplications alone take, at the measured rate."""
        return point.flops.total / self.rate.flops_per_second

    def fraction_of_rate(self, point: PromptPoint) -> float:
        """Operations a second over the measured rate."""
        return self.floor_seconds(point) / point.first_token.median


class _Served(NamedTuple):
    """A request up to its first token.

    Attributes:
        tokens: int32 `[B]`.
        first_token: seconds, as those of a point.
        request: likewise.
    """

    tokens: np.ndarray
    first_token: float
    request: float


class _First(NamedTuple):
    """What the first request tells, as a point has it."""

    compile_seconds: float
    temp_bytes: int
    peak: Peak | None


def run(sweep: PromptSweep, say: Callable[[str], None] = lambda text: None) -> PromptReport:
    """Measures what is asked for, on the default device.

    Args:
        sweep: what to measure.
        say: is told what is being done, in a line.

    Raises:
        NotImplementedError: the named implementation cannot run here.
        ValueError: the device has too little memory.
    """
    device, config = default_device(), sweep.config
    grid = dict.fromkeys(itertools.product(sweep.batches, sweep.spans))
    capacities = {(b, span): capacity_for(span.longest, BLOCK + 1) for b, span in grid}
    slots = max(batch * capacity for (batch, _), capacity in capacities.items())
    caches = 3 if sweep.reference else 2
    check_memory(device, config, slots, 1, caches, "a smaller batch or shorter prompts")
    # Asked before the weights are made: a kernel that cannot run costs nobody gigabytes.
    reasons = {
        at: choose(config, at[0], capacity, sweep.implementation)[1]
        for at, capacity in capacities.items()
    }
    model = random_model(config)
    prompts = {(b, span): random_prompts(config, span.lengths(b)) for b, span in grid}
    say("compiling, and looking at the memory")
    # Before anything else is made, and small ones first: a device tells the most it ever had.
    by_size = sorted(grid, key=lambda at: sum(map(len, prompts[at])))
    firsts = {at: _first(sweep, model, device, prompts[at]) for at in by_size}
    say("measuring the rate of dense products")
    rate = dense_rate(default_size(device), sweep.repetitions)
    points = []
    for at in grid:
        batch, span = at
        say(f"batch {batch}, prompts of {span}: checking and timing")
        point = _measure(sweep, model, span, prompts[at], reasons[at], firsts[at])
        say(
            f"first token {1e3 * point.first_token.median:.2f} ms, "
            f"a step {1e6 * point.step.step_seconds:.1f} us"
        )
        points.append(point)
    return PromptReport(sweep=sweep, machine=Machine.of(device), rate=rate, points=tuple(points))


def _serve(
    sweep: PromptSweep, model: Transformer, prompts: Sequence[np.ndarray]
) -> tuple[_Served, Loop]:
    """What `ffjax.generate` does for one new token, by the same code."""
    start = time.perf_counter()
    request = Request.checked(model.config, prompts, 1, 0.0, 0, None, None)
    loop = Loop(model, request, sweep.implementation)
    made = time.perf_counter()
    tokens = jax.device_get(loop.prefill().tokens)
    done = time.perf_counter()
    return _Served(tokens, done - made, done - start), loop


def _first(
    sweep: PromptSweep, model: Transformer, device: Any, prompts: Sequence[np.ndarray]
) -> _First:
    before = _peak_bytes(device)
    _, loop = _serve(sweep, model, prompts)
    after = _peak_bytes(device)
    peak = None if before is None or after is None else Peak(after, after > before)
    return _First(loop.compile_seconds, loop.prefill_temp_bytes, peak)


def _peak_bytes(device: Any) -> int | None:
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def _measure(
    sweep: PromptSweep,
    model: Transformer,
    span: Span,
    prompts: Sequence[np.ndarray],
    reason: str | None,
    first: _First,
) -> PromptPoint:
    lengths = tuple(map(len, prompts))
    serve = functools.partial(_serve, sweep, model, prompts)
    (tokens, *_), loop = serve()
    reference = ReferencePrefill(model, prompts, loop.cache.capacity)
    check = check_prefill(tokens, loop.cache, lengths, *reference.run())
    repeats = bool(same_cache(loop.cache, serve()[1].cache))
    name, prefill = loop.implementation, loop.prefill_implementation
    del loop  # and its cache

    def feed_reference() -> float:
        start = time.perf_counter()
        jax.block_until_ready(reference.run()[0])
        return time.perf_counter() - start

    position = sweep.step_position(span)
    step = _bare_step(sweep, model, len(prompts), position, name)
    runs: list[Callable[[], Any]] = [lambda: serve()[0], step.run]
    if sweep.reference:
        runs.append(feed_reference)
    requests, step_seconds, *others = take_turns(runs, sweep.repetitions)
    step.close()
    same = all(np.array_equal(served.tokens, tokens) for served in requests)
    return PromptPoint(
        span=span,
        lengths=lengths,
        implementation=name,
        prefill=prefill,
        reason=reason,
        flops=prompt_flops(sweep.config, lengths),
        first_token=Samples(tuple(served.first_token for served in requests)),
        request=Samples(tuple(served.request for served in requests)),
        compile_seconds=first.compile_seconds,
        reference=Samples(others[0]) if others else None,
        step=Timing(step.steps, step_seconds, step.compile_seconds),
        temp_bytes=first.temp_bytes,
        peak=first.peak,
        check=dataclasses.replace(check, repeats=repeats and same),
    )


def _bare_step(
    sweep: PromptSweep, model: Transformer, batch: int, position: int, name: Implementation
) -> DecodeLoop:
    contender = implementation(model, name)
    cache = started_cache(sweep.config, batch, position, capacity_for(position, sweep.steps))
    first = first_tokens(sweep.config, batch)
    return DecodeLoop(contender.step, contender.weights, cache, position, first, sweep.steps)
