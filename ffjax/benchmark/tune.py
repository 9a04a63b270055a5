"""Looks for the fused kernel's best tuning on this device.

First the sizes of tiles and programs are timed in turn, each with as many slots as fit; then,
for the fastest, fewer slots, other numbers of tiles in flight, or some asked for ahead. Every
candidate's step is compared with the reference before it counts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ffjax.benchmark.check import WRONG, compare, follow, observe
from ffjax.benchmark.contenders import Contender, implementation, keeping_one, one_by_one
from ffjax.benchmark.inputs import capacity_for, first_tokens, started_cache
from ffjax.benchmark.timing import DecodeLoop, Timing, rewind, time_loops
from ffjax.cache import KVCache
from ffjax.decode import DecodeOutput, fused_step
from ffjax.model import Transformer
from pallas_kernels.dims import Dims
from pallas_kernels.gpu import Gpu
from pallas_kernels.stream.plan import StreamPlan
from pallas_kernels.stream.planner import fitting, make_stream_plan
from pallas_kernels.stream.tuning import Tuning

__all__ = ["Trial", "candidates", "refinements", "tune", "tuned"]

_CHECKED_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate, measured.

    Attributes:
        tuning: the candidate.
        plan: the plan it leads to.
        timing: how long a loop of steps took; None where it did not compile.
        relative_error: of its logits against the reference's, the worst step.
        repeats: whether a second run gave the same bits.
        failure: why it did not compile, or None.
    """

    tuning: Tuning
    plan: StreamPlan
    timing: Timing | None
    relative_error: float
    repeats: bool
    failure: str | None

    @property
    def sound(self) -> bool:
        """Whether it may be chosen."""
        return self.timing is not None and self.repeats and self.relative_error < WRONG


def _distinct(dims: Dims, gpu: Gpu, tunings: Iterable[Tuning]) -> list[Tuning]:
    """Those that can be planned, without those that lead to the same plan."""
    plans: dict[tuple, Tuning] = {}
    for tuning in tunings:
        try:
            plan = make_stream_plan(dims, gpu, tuning)
        except ValueError:
            continue
        if plan.why_no_room is not None:
            continue
        rows = tuple((part.rows, part.splits) for part in plan.segments.values())
        flying = min(plan.in_flight, plan.slots)
        ring = plan.slots, flying, plan.next_tiles, tuning.l2_tiles, tuning.l2_bytes
        cut = plan.attention
        others = tuning.collect_tiles, tuning.hidden_copies, cut.tiles, cut.block
        plans.setdefault((rows, plan.num_warps, *ring, *others), tuning)
    return list(plans.values())


def candidates(dims: Dims, gpu: Gpu) -> list[Tuning]:
    """Sizes of tiles and programs to try, the default first."""
    default = fitting(dims, gpu)
    sizes = itertools.product((32_768, 16_384, 65_536, 8192), (None, 4, 8))
    options = (
        dataclasses.replace(default, tile_bytes=size, num_warps=warps) for size, warps in sizes
    )
    return _distinct(dims, gpu, [default, *options])


def refinements(dims: Dims, gpu: Gpu, tuning: Tuning) -> list[Tuning]:
    """The same sizes with fewer slots, or with more or less in flight, ahead, or of the cache.

    The tuning itself is not among them.
    """
    usual = make_stream_plan(dims, gpu, tuning).slots
    options = [dataclasses.replace(tuning, slots=number) for number in range(usual - 1, 1, -1)]
    options += [dataclasses.replace(tuning, in_flight=number) for number in range(1, 5)]
    options += [dataclasses.replace(tuning, l2_tiles=tiles) for tiles in (0, 2, 4, 8, 16)]
    options += [dataclasses.replace(tuning, l2_bytes=size) for size in (4096, 8192, 32_768)]
    options += [dataclasses.replace(tuning, next_tiles=tiles) for tiles in (1, 2, 16)]
    options += [dataclasses.replace(tuning, collect_tiles=tiles) for tiles in (0, 1, 2)]
    options += [dataclasses.replace(tuning, hidden_copies=copies) for copies in (1, 2)]
    options += [dataclasses.replace(tuning, cache_tiles=tiles) for tiles in (2, 3)]
    options += [dataclasses.replace(tuning, cache_tile_bytes=8192 << i) for i in range(3)]
    return _distinct(dims, gpu, [tuning, *options])[1:]


def tuned(model: Transformer, tuning: Tuning) -> Contender:
    """The fused kernel with this tuning, as something that can be timed."""
    graph, params = nnx.split(model)

    def step(params: Any, cache: KVCache, tokens: Array) -> DecodeOutput:
        model = nnx.merge(graph, params)
        return fused_step(model, cache, tokens, tuning=tuning)

    return Contender(step, params, lambda cache: cache)


def tune(
    model: Transformer,
    dims: Dims,
    gpu: Gpu,
    position: int,
    steps: int,
    repetitions: int,
    make: Callable[[Transformer, Tuning], Contender] = tuned,
    say: Callable[[str], None] = lambda text: None,
) -> list[Trial]:
    """Times the candidates; the fastest sound one comes first.

    Args:
        model: a model of the sizes.
        dims: the sizes, with the tokens that a step takes of each sequence.
        gpu: the device.
        position: live positions before the first step.
        steps: steps of a timed loop.
        repetitions: timed loops of each.
        make: makes a contender of a tuning.
        say: is told what is being done, in a line.
    """
    measure = functools.partial(_measure, model, dims, gpu, position, steps, repetitions, make, say)
    trials = measure(candidates(dims, gpu))
    best = next((trial for trial in trials if trial.sound), None)
    if best is not None:
        trials = _ranked([*trials, *measure(refinements(dims, gpu, best.tuning))])
    return trials


def _ranked(trials: list[Trial]) -> list[Trial]:
    def rank(trial: Trial) -> tuple[bool, float]:
        seconds = trial.timing.step_seconds if trial.timing is not None else float("inf")
        return not trial.sound, seconds

    return sorted(trials, key=rank)


def _measure(
    model: Transformer,
    dims: Dims,
    gpu: Gpu,
    position: int,
    steps: int,
    repetitions: int,
    make: Callable[[Transformer, Tuning], Contender],
    say: Callable[[str], None],
    tunings: list[Tuning],
) -> list[Trial]:
    config, batch, tokens = model.config, dims.batch, dims.tokens
    first = first_tokens(config, batch, tokens=tokens)
    capacity = capacity_for(position, steps, tokens)
    fresh = functools.partial(started_cache, config, batch, position, capacity, tokens=tokens)
    reference = implementation(model, "xla")
    if tokens > 1:
        # As `ffjax bench --tokens` does: each step goes one position further.
        reference = keeping_one(one_by_one(model))
    checked = min(steps, _CHECKED_STEPS)
    trials, loops = [], []
    for number, tuning in enumerate(tunings, start=1):
        say(f"{number} of {len(tunings)}: {tuning}")
        contender = make(model, tuning)
        contender = keeping_one(contender) if tokens > 1 else contender
        plan = make_stream_plan(dims, gpu, tuning)
        try:
            seen = observe(contender, fresh(), first, checked)
            loop = DecodeLoop(contender.step, contender.weights, fresh(), position, first, steps)
        except jax.errors.JaxRuntimeError as error:  # the compiler's, as of too much memory
            reason = str(error).strip().splitlines()[0]
            trials.append(Trial(tuning, plan, None, float("inf"), False, reason))
            continue
        others, _ = follow(reference, rewind(fresh(), position), seen.fed)
        error = compare(seen.logits, others).relative_error
        error = error if bool(jnp.isfinite(seen.logits).all()) else float("inf")
        trials.append(Trial(tuning, plan, None, error, seen.repeats, None))
        loops.append((len(trials) - 1, loop))
    timings = time_loops([loop for _, loop in loops], repetitions) if loops else []
    for (index, loop), timing in zip(loops, timings, strict=True):
        trial = trials[index]
        repeats = trial.repeats and loop.repeats
        trials[index] = dataclasses.replace(trial, timing=timing, repeats=repeats)
        loop.close()
    return _ranked(trials)
