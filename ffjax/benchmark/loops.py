"""A benchmark of whole generations: what a token costs beyond its bare decode step.

`ffjax.generate` and `ffjax.stream` continue the same prompts, each in turn with a loop of bare
steps that starts from the cache which the prompts have filled: the same positions, the same
tokens. Beside the times that they report stand those of a clock around the calls.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ffjax.benchmark.asked import MIN_REPETITIONS, check_asked, listed
from ffjax.benchmark.contenders import choose, implementation
from ffjax.benchmark.inputs import capacity_for, random_model, random_prompts
from ffjax.benchmark.machine import Machine, check_memory
from ffjax.benchmark.timing import DecodeLoop, Samples, Timing, take_turns
from ffjax.config import ModelConfig
from ffjax.decode import Implementation, default_device
from ffjax.generation import generate
from ffjax.loop import BLOCK, Loop
from ffjax.model import Transformer
from ffjax.requests import Request
from ffjax.sampling.params import SamplingParams
from ffjax.streaming import stream

__all__ = ["SAMPLERS", "LoopPoint", "LoopReport", "LoopSweep", "Way", "run"]

# A busy reader leaves the host so much less of a step's time. One that sleeps leaves all of it.
_BUSY = 0.7

SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 0.8": {"temperature": 0.8},
    "top-k 50, top-p 0.9": {"sampling": SamplingParams(temperature=0.8, top_k=50, top_p=0.9)},
}
"""How tokens are chosen: arguments of `ffjax.generate` and `ffjax.stream`, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSweep:
    """What to measure: every batch after prompts of every length.

    Attributes:
        config: the model's sizes.
        batches: values of B.
        positions: tokens of each prompt.
        steps: decode steps of a generation, a multiple of `ffjax.loop.BLOCK`; the first token
            comes with the prefill.
        repetitions: timed generations of each kind, `MIN_REPETITIONS` or more.
        implementation: of prefill and steps, as `ffjax.generate` takes it.

    Raises:
        ValueError: a number is out of its range; the model has too few positions; the fused
            kernel is asked for too many sequences.
    """

    config: ModelConfig
    batches: tuple[int, ...]
    positions: tuple[int, ...]
    steps: int = 512
    repetitions: int = MIN_REPETITIONS
    implementation: Implementation | None = None

    def __post_init__(self):
        config = self.config
        check_asked(config, self.batches, self.steps, self.repetitions, self.implementation)
        if not self.positions or min(self.positions) < 1:
            raise ValueError(
                f"A generation begins after 1 token or more, got {listed(self.positions)}."
            )
        if self.steps % BLOCK:
            raise ValueError(
                f"Generations run whole blocks of {BLOCK} steps: ask for a multiple of {BLOCK} "
                f"steps, got {self.steps}."
            )
        need = max(self.positions) + self.steps + 1
        if need > config.max_context:
            raise ValueError(
                f"{self.steps} steps after {max(self.positions)} tokens and the first new one "
                f"need {need} positions; {config.name} was made for {config.max_context}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """One way to generate, timed.

    Attributes:
        name: as "stream, greedy".
        steps: decode steps of a generation.
        reported: seconds of the decode steps, by the generation's own account.
        clock: seconds that they took by a clock outside. Of a stream, from its first token to its
            last; of `generate`, what the call took beyond a call for one token.
        reader: seconds that the reader slept or computed meanwhile; 0 where there is none.
        sound: whether every run gave the same tokens, as many as asked for, and those of the other
            ways that choose alike.
    """

    name: str
    steps: int
    reported: Samples
    clock: Samples
    reader: Samples
    sound: bool

    def over(self, step_seconds: float) -> float:
        """Time a token by the clock, over that of a bare step."""
        return self.clock.median / self.steps / step_seconds

    def over_longer(self, step_seconds: float) -> float:
        """The same, over the time of a bare step or that of the reader, whichever is longer."""
        longer = max(step_seconds, self.reader.median / self.steps)
        return self.clock.median / self.steps / longer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopPoint:
    """Generations of one batch after prompts of one length, measured.

    Attributes:
        batch: B.
        position: tokens of each prompt.
        implementation: of the steps.
        reason: why they are not the fused kernel's, where nobody had named it; else None.
        step: bare steps at the same positions.
        same_tokens: greedy tokens that `generate` shares with the bare steps before the first
            that differs: of `steps`, all sequences at once.
        ways: in the order in which they were run.
    """

    batch: int
    position: int
    implementation: Implementation
    reason: str | None
    step: Timing
    same_tokens: int
    ways: tuple[Way, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopReport:
    """A benchmark's results.

    Attributes:
        sweep: what was asked for.
        machine: what it ran on.
        points: in the order of batches, then positions.
    """

    sweep: LoopSweep
    machine: Machine
    points: tuple[LoopPoint, ...]


class _Spent(NamedTuple):
    """One generation: seconds as a way has them, and its tokens int32 `[steps + 1, B]`."""

    reported: float
    clock: float
    reader: float
    tokens: np.ndarray


def run(sweep: LoopSweep, say: Callable[[str], None] = lambda text: None) -> LoopReport:
    """Measures what is asked for, on the default device.

    Args:
        sweep: what to measure.
        say: is told what is being done, in a line.

    Raises:
        NotImplementedError: the named implementation cannot run here.
        ValueError: the device has too little memory.
        NotFiniteError: logits were NaN or infinite.
    """
    device, config = default_device(), sweep.config
    grid = dict.fromkeys(itertools.product(sweep.batches, sweep.positions))
    capacities = {(b, at): capacity_for(at, sweep.steps + 1 + BLOCK) for b, at in grid}
    slots = max(batch * capacity for (batch, _), capacity in capacities.items())
    check_memory(device, config, slots, 1, 2, "a smaller batch or position")
    chosen = {
        at: choose(config, at[0], capacity, sweep.implementation)
        for at, capacity in capacities.items()
    }
    model = random_model(config)
    points = []
    for (batch, position), (_, reason) in chosen.items():
        say(f"batch {batch}, position {position}: compiling and timing")
        points.append(_measure(sweep, model, batch, position, reason))
    return LoopReport(sweep=sweep, machine=Machine.of(device), points=tuple(points))


def _measure(
    sweep: LoopSweep, model: Transformer, batch: int, position: int, reason: str | None
) -> LoopPoint:
    prompts = random_prompts(sweep.config, [position] * batch)
    step, name = _bare_steps(sweep, model, prompts)
    step.run()
    pause = step.run() / sweep.steps
    asked = functools.partial(_Asked, sweep, model, prompts)
    ways = [
        ("generate, greedy", "greedy", asked("greedy").generate),
        ("stream, greedy", "greedy", asked("greedy").stream),
        ("stream, greedy, slow reader", "greedy", asked("greedy", pause).stream),
        ("stream, greedy, busy reader", "greedy", asked("greedy", _BUSY * pause, busy=True).stream),
    ]
    for sampler in SAMPLERS:
        if sampler != "greedy":
            ways.append((f"generate, {sampler}", sampler, asked(sampler).generate))
            ways.append((f"stream, {sampler}", sampler, asked(sampler).stream))
    runs: list[Callable[[], Any]] = [step.run, *(run for *_, run in ways)]
    step_seconds, *columns = take_turns(runs, sweep.repetitions)
    bare = step.tokens
    step.close()
    # What the first run of each sampler's first way chose is what all others are to choose.
    expected: dict[str, np.ndarray] = {}
    timed = []
    for (way, sampler, _), column in zip(ways, columns, strict=True):
        want = expected.setdefault(sampler, column[0].tokens)
        timed.append(
            Way(
                name=way,
                steps=sweep.steps,
                reported=Samples(tuple(spent.reported for spent in column)),
                clock=Samples(tuple(spent.clock for spent in column)),
                reader=Samples(tuple(spent.reader for spent in column)),
                sound=want.shape == (sweep.steps + 1, batch)
                and all(np.array_equal(spent.tokens, want) for spent in column),
            )
        )
    return LoopPoint(
        batch=batch,
        position=position,
        implementation=name,
        reason=reason,
        step=Timing(sweep.steps, step_seconds, step.compile_seconds),
        same_tokens=_agreeing(expected["greedy"][1:], bare),
        ways=tuple(timed),
    )


def _bare_steps(
    sweep: LoopSweep, model: Transformer, prompts: Sequence[np.ndarray]
) -> tuple[DecodeLoop, Implementation]:
    """Steps from where a generation's prefill ends, and who runs them."""
    request = Request.checked(model.config, prompts, sweep.steps + 1, 0.0, 0, None, None)
    loop = Loop(model, request, sweep.implementation)
    first = loop.prefill().tokens
    contender = implementation(model, loop.implementation)
    cache, position = loop.cache, len(prompts[0])
    steps = DecodeLoop(contender.step, contender.weights, cache, position, first, sweep.steps)
    return steps, loop.implementation


def _agreeing(tokens: np.ndarray, others: np.ndarray | None) -> int:
    """Steps before the first whose tokens differ; both int32 `[steps, B]`."""
    if others is None or tokens.shape != others.shape:
        return 0
    differ = np.flatnonzero((tokens != others).any(axis=1))
    return int(differ[0]) if len(differ) else len(tokens)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A generation that is asked for again and again.

    Attributes:
        sweep: how many steps, and by whom.
        model: the model.
        prompts: of equal lengths.
        sampler: a name of `SAMPLERS`.
        pause: seconds that a stream's reader takes at each token.
        busy: whether it computes meanwhile, and does not sleep.
    """

    sweep: LoopSweep
    model: Transformer
    prompts: Sequence[np.ndarray]
    sampler: str
    pause: float = 0.0
    busy: bool = False

    def _read(self) -> float:
        """What a stream's reader does with a token; the seconds that it took."""
        start = time.perf_counter()
        if self.busy:
            while time.perf_counter() < start + self.pause:
                pass
        else:
            time.sleep(self.pause)
        return time.perf_counter() - start

    def _call(self, function: Callable[..., Any], new_tokens: int) -> Any:
        return function(
            self.model,
            self.prompts,
            new_tokens,
            # The same for one token and for all, which then share the programs of the prefill.
            capacity=len(self.prompts[0]) + self.sweep.steps + 1,
            implementation=self.sweep.implementation,
            **SAMPLERS[self.sampler],
        )

    def generate(self) -> _Spent:
        """Runs `ffjax.generate`, for one token and for all."""
        start = time.perf_counter()
        self._call(generate, 1)
        middle = time.perf_counter()
        out = self._call(generate, self.sweep.steps + 1)
        end = time.perf_counter()
        tokens = np.array(out.tokens, np.int32).T
        return _Spent(out.decode_seconds, (end - middle) - (middle - start), 0.0, tokens)

    def stream(self) -> _Spent:
        """Runs `ffjax.stream`, its reader taking time at each token where it is to."""
        rows = self._call(stream, self.sweep.steps + 1)
        taken = [next(rows)]
        start = end = time.perf_counter()
        reader = 0.0
        for _ in range(self.sweep.steps):
            if self.pause > 0:
                reader += self._read()
            taken.append(next(rows))
            end = time.perf_counter()
        return _Spent(rows.output.decode_seconds, end - start, reader, np.array(taken, np.int32))
