"""A benchmark: a sweep over batches, positions and tokens a step, each point timed and checked."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

from ffjax.benchmark.asked import MIN_REPETITIONS, check_asked, listed
from ffjax.benchmark.bandwidth import Bandwidth, default_bytes, read_bandwidth
from ffjax.benchmark.check import Check, compare, follow, observe
from ffjax.benchmark.contenders import (
    Contender,
    ContenderName,
    choose,
    contender,
    keeping_one,
)
from ffjax.benchmark.inputs import capacity_for, first_tokens, random_model, started_cache
from ffjax.benchmark.machine import Machine, check_memory
from ffjax.benchmark.timing import DecodeLoop, Timing, rewind, time_loops
from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.decode import Implementation, default_device
from ffjax.dims import step_dims
from ffjax.model import Transformer

__all__ = ["Point", "Report", "Sweep", "Traffic", "run", "traffic"]

# The logits of every step looked at are kept, float32 [steps, B, V], up to three times.
_MAX_CHECKED_STEPS = 64

_Contenders = Callable[[ContenderName], Contender]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to measure: every batch at every position with every number of tokens.

    Attributes:
        config: the model's sizes.
        batches: values of B.
        positions: live positions of every sequence before the first step.
        steps: steps of a timed loop; each goes on where the one before it has ended.
        repetitions: timed loops, `MIN_REPETITIONS` or more.
        implementation: what to time. None: the fused kernel where it can run, else the
            reference.
        others: implementations that are timed in turn with it, each a point of its own.
        baseline: whether to time the XLA baseline in turn with it.
        tokens: values of T, that a step takes of each sequence.

    Raises:
        ValueError: a number is out of its range; the model has too few positions; the fused
            kernel is asked for too many sequences.
    """

    config: ModelConfig
    batches: tuple[int, ...]
    positions: tuple[int, ...]
    steps: int = 64
    repetitions: int = MIN_REPETITIONS
    implementation: Implementation | None = None
    others: tuple[Implementation, ...] = ()
    baseline: bool = False
    tokens: tuple[int, ...] = (1,)

    def __post_init__(self):
        limit = self.config.max_context
        for name in (self.implementation, *self.others):
            check_asked(self.config, self.batches, self.steps, self.repetitions, name)
        if not self.positions or min(self.positions) < 0:
            raise ValueError(f"A position is 0 or more, got {listed(self.positions)}.")
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"A step takes 1 token or more, got {listed(self.tokens)}.")
        if self.baseline and max(self.tokens) > 1:
            raise ValueError(
                "The baseline takes one token of each sequence a step, got "
                f"{listed(self.tokens)}. Time it with one token."
            )
        end = max(self.positions) + self.steps + max(self.tokens) - 1
        if end > limit:
            raise ValueError(
                f"{self.steps} steps from position {max(self.positions)} on need {end} positions; "
                f"{self.config.name} was made for {limit}."
            )


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a step reads, at least.

    Attributes:
        weight_bytes: of weights, each once.
        cache_bytes: of keys and values, on average over the steps of a loop.
    """

    weight_bytes: int
    cache_bytes: float

    @property
    def total(self) -> float:
        """Bytes a step."""
        return self.weight_bytes + self.cache_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One batch at one position with one number of tokens, measured.

    Attributes:
        batch: B.
        position: live positions before the first step of a loop.
        capacity: S.
        implementation: what was timed.
        reason: why it was not the fused kernel, where nobody had named it; else None.
        tokens: T, that a step takes of each sequence.
        traffic: what a step reads.
        timing: how long it took.
        baseline: how long the XLA baseline took, or None.
        check: whether the numbers are right.
    """

    batch: int
    position: int
    capacity: int
    implementation: Implementation
    reason: str | None
    tokens: int
    traffic: Traffic
    timing: Timing
    baseline: Timing | None
    check: Check

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.batch * self.tokens / self.timing.step_seconds

    @property
    def bytes_per_second(self) -> float:
        """Bytes a step over seconds a step."""
        return self.traffic.total / self.timing.step_seconds

    @property
    def speedup(self) -> float | None:
        """Time of the baseline over ours: above 1 where ours is faster."""
        if self.baseline is None:
            return None
        return self.baseline.step_seconds / self.timing.step_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A benchmark's results.

    Attributes:
        sweep: what was asked for.
        machine: what it ran on.
        bandwidth: the device's read bandwidth, measured in the same run.
        points: in the order of batches, then positions, then tokens; of implementations that were
            timed in turn, in theirs.
    """

    sweep: Sweep
    machine: Machine
    bandwidth: Bandwidth
    points: tuple[Point, ...]

    def fraction_of_bandwidth(self, point: Point) -> float:
        """Bytes a second over the measured read bandwidth. Weights in a cache can exceed 1."""
        return point.bytes_per_second / self.bandwidth.bytes_per_second

    def floor_seconds(self, point: Point) -> float:
        """Seconds a step takes at least, if all it reads comes from memory."""
        return point.traffic.total / self.bandwidth.bytes_per_second


def traffic(
    model: Transformer, batch: int, position: int, capacity: int, steps: int, tokens: int = 1
) -> Traffic:
    """What a step of a loop reads.

    Args:
        model: the model.
        batch: B.
        position: live positions before the first step.
        capacity: S.
        steps: steps of the loop, each a position further.
        tokens: T.
    """
    dims = step_dims(model.config, batch, capacity, tokens)
    read = [dims.cache_bytes([position + i] * batch) for i in range(steps)]
    return Traffic(dims.step_weight_bytes, statistics.fmean(read))


def run(sweep: Sweep, say: Callable[[str], None] = lambda text: None) -> Report:
    """Measures what is asked for, on the default device.

    Args:
        sweep: what to measure.
        say: is told what is being done, in a line.

    Raises:
        NotImplementedError: the named implementation cannot run here.
        ValueError: the device has too little memory.
    """
    device = default_device()
    # The baseline has copies of all; the reference is checked against it.
    copies = 2 if sweep.baseline or "xla" in (sweep.implementation, *sweep.others) else 1
    slots = max(b * capacity_for(p, sweep.steps, t) for b, p, t in _grid(sweep))
    advice = "a smaller batch or position" + (", or leave --compare out" * sweep.baseline)
    check_memory(device, sweep.config, slots, copies, copies + len(sweep.others), advice)
    # Asked before the weights are made: a kernel that cannot run costs nobody gigabytes.
    chosen = {point: _choose(sweep, *point) for point in _grid(sweep)}
    model = random_model(sweep.config)
    say("measuring the read bandwidth")
    bandwidth = read_bandwidth(default_bytes(device), sweep.repetitions)
    # Each is made when first asked for: the baseline copies the weights.
    contenders = functools.cache(functools.partial(contender, model))
    keeping = functools.cache(lambda name: keeping_one(contenders(name)))
    points = []
    for (batch, position, tokens), named in chosen.items():
        where = f"batch {batch}, position {position}" + f", {tokens} tokens" * (tokens > 1)
        said = " and ".join(repr(name) for name, _ in named)
        say(f"{where}: compiling, checking and timing {said}")
        contending = contenders if tokens == 1 else keeping
        points += _measure(sweep, model, contending, batch, position, tokens, named)
    return Report(
        sweep=sweep,
        machine=Machine.of(device),
        bandwidth=bandwidth,
        points=tuple(points),
    )


def _grid(sweep: Sweep) -> list[tuple[int, int, int]]:
    """Batch, position and tokens, each once."""
    return list(dict.fromkeys(itertools.product(sweep.batches, sweep.positions, sweep.tokens)))


def _choose(
    sweep: Sweep, batch: int, position: int, tokens: int
) -> list[tuple[Implementation, str | None]]:
    """What is timed in turn, each with the reason why it is the reference unasked."""
    capacity = capacity_for(position, sweep.steps, tokens)
    asked = (sweep.implementation, *sweep.others)
    return [choose(sweep.config, batch, capacity, name, tokens) for name in asked]


def _measure(
    sweep: Sweep,
    model: Transformer,
    contenders: _Contenders,
    batch: int,
    position: int,
    tokens: int,
    named: list[tuple[Implementation, str | None]],
) -> list[Point]:
    """A point for each of the implementations, timed in turn."""
    config, steps = sweep.config, sweep.steps
    capacity = capacity_for(position, steps, tokens)
    first = first_tokens(config, batch, tokens=tokens)
    checks, contending = [], []
    for name, _ in named:
        cache = started_cache(config, batch, position, capacity, tokens=tokens)
        check, chosen, cache = _check(sweep, contenders, name, cache, first)
        checks.append((check, chosen))
        contending.append((contenders(name), cache))
    if sweep.baseline:
        rival = contenders("baseline")
        contending.append((rival, rival.adopt(contending[0][1])))
    loops = [DecodeLoop(c.step, c.weights, own, position, first, steps) for c, own in contending]
    timings = time_loops(loops, sweep.repetitions)
    read = traffic(model, batch, position, capacity, steps, tokens)
    points = []
    for (name, reason), (check, chosen), loop, timing in zip(
        named, checks, loops, timings, strict=False
    ):
        ran = loop.tokens
        same = loop.repeats and ran is not None and np.array_equal(ran[: len(chosen)], chosen)
        points.append(
            Point(
                batch=batch,
                position=position,
                capacity=capacity,
                implementation=name,
                reason=reason,
                tokens=tokens,
                traffic=read,
                timing=timing,
                baseline=timings[-1] if sweep.baseline else None,
                check=dataclasses.replace(check, repeats=check.repeats and same),
            )
        )
    for loop in loops:
        loop.close()
    return points


def _check(
    sweep: Sweep, contenders: _Contenders, name: Implementation, cache: KVCache, first: Array
) -> tuple[Check, np.ndarray, KVCache]:
    """Checks the contender of that name against another.

    Returns:
        What was found; the tokens it chose, int32 `[steps, B]` or `[steps, B, T]`; and the cache,
        as it was.
    """
    steps = min(sweep.steps, _MAX_CHECKED_STEPS)
    position = int(cache.lengths[0])
    seen = observe(contenders(name), cache, first, steps)
    # The other one, which is not under test, finds no NaN beyond the live positions any more.
    cache = rewind(seen.cache, position)
    # It is computed in another way.
    other: ContenderName = "baseline" if name == "xla" else "xla"
    if first.ndim > 1:
        other = "one by one"
    judge = contenders(other)
    logits, own = follow(judge, judge.adopt(cache), seen.fed)
    difference = compare(seen.logits, logits)
    if other != "baseline":  # its steps were taken in the same arrays
        cache = rewind(own, position)
    del own
    check = Check(
        steps=steps,
        tokens=steps * first.size,
        finite=bool(jnp.isfinite(seen.logits).all()),
        repeats=seen.repeats,
        against=other,
        difference=difference,
    )
    return check, np.asarray(seen.chosen), cache
