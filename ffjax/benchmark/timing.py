"""Times decode steps: whole loops on the device, repeated, several contenders in turn.

Nothing here knows what a step is made of, so that implementations, and one implementation
with other settings, are all timed by the same code.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

__all__ = [
    "DecodeLoop",
    "Samples",
    "Step",
    "StepOutput",
    "Timing",
    "rewind",
    "take_turns",
    "time_loops",
]

_Found = TypeVar("_Found")


class StepOutput(Protocol):
    """What a step returns: `ffjax.decode.DecodeOutput`, with a cache of any kind.

    Attributes:
        cache: a dataclass and pytree with `lengths`, int32 `[B]`.
        logits: float32 `[B, V]` or `[B, T, V]`.
        token: int32 `[B]` or `[B, T]`, the greedy choice.
    """

    @property
    def cache(self) -> Any: ...  # noqa: D102
    @property
    def logits(self) -> Array: ...  # noqa: D102
    @property
    def token(self) -> Array: ...  # noqa: D102


class Step(Protocol):
    """A decode step that jit can trace: of weights, cache and tokens int32 `[B]` or `[B, T]`."""

    def __call__(self, weights: Any, cache: Any, tokens: Array, /) -> StepOutput: ...  # noqa: D102


def rewind(cache: Any, position: int) -> Any:
    """The cache with every length set to `position`; what lies beyond it is no longer live."""
    lengths = jnp.full_like(cache.lengths, position)
    return dataclasses.replace(cache, lengths=lengths)


@dataclasses.dataclass(frozen=True)
class Samples:
    """The same thing timed again and again.

    Attributes:
        seconds: a number a repetition.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        """Seconds of the fastest repetition."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.seconds) - self.fastest) / self.median


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long a decode loop took.

    Attributes:
        steps: steps of a loop.
        loop_seconds: seconds of a loop, a number a repetition.
        compile_seconds: seconds that compiling the loop took, which no repetition contains.
    """

    steps: int
    loop_seconds: tuple[float, ...]
    compile_seconds: float

    @property
    def step_seconds(self) -> float:
        """Seconds a step: the median."""
        return Samples(self.loop_seconds).median / self.steps

    @property
    def fastest_step_seconds(self) -> float:
        """Seconds a step in the fastest repetition."""
        return Samples(self.loop_seconds).fastest / self.steps

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return Samples(self.loop_seconds).spread


class DecodeLoop:
    """A compiled loop of decode steps that feeds each step the token of the one before it.

    Attributes:
        steps: steps of a loop.
        compile_seconds: seconds that compiling it took.
        tokens: int32 `[steps, B]`, what the first run chose, or None before it.
        repeats: whether every run so far chose the same tokens.
    """

    def __init__(
        self, step: Step, weights: Any, cache: Any, position: int, first: Array, steps: int
    ):
        """Compiles the loop, for the weights and the cache given.

        Args:
            step: the decode step.
            weights: what it takes as weights.
            cache: what it takes as cache. It is used up: runs pass it on in place.
            position: live positions of every sequence when a run starts.
            first: int32 `[B]` or `[B, T]`, the tokens the first step is fed.
            steps: steps of a run.
        """

        def loop(weights: Any, cache: Any, first: Array) -> tuple[Any, Array]:
            def body(carry, _):
                cache, token = carry
                out = step(weights, cache, token)
                return (out.cache, out.token), out.token

            (cache, _), tokens = lax.scan(body, (cache, first), length=steps)
            return cache, tokens

        self.steps = steps
        self.tokens: np.ndarray | None = None
        self.repeats = True
        self._weights, self._cache, self._first = weights, cache, first
        self._position = position
        start = time.perf_counter()
        self._compiled = jax.jit(loop, donate_argnums=1).lower(weights, cache, first).compile()
        self.compile_seconds = time.perf_counter() - start

    def run(self) -> float:
        """Runs the loop once from its starting position; returns the seconds it took."""
        cache = rewind(self._cache, self._position)
        jax.block_until_ready((cache, self._first))
        start = time.perf_counter()
        self._cache, tokens = self._compiled(self._weights, cache, self._first)
        tokens.block_until_ready()
        seconds = time.perf_counter() - start
        chosen = np.asarray(tokens)
        if self.tokens is None:
            self.tokens = chosen
        self.repeats &= bool((chosen == self.tokens).all())
        return seconds

    def memory_analysis(self) -> Any:
        """XLA's account of the compiled loop's memory."""
        return self._compiled.memory_analysis()

    def close(self) -> None:
        """Frees the cache; the loop cannot run any more."""
        for array in jax.tree.leaves(self._cache):
            array.delete()


def take_turns(runs: Sequence[Callable[[], _Found]], repetitions: int) -> list[tuple[_Found, ...]]:
    """Runs each in turn, then again, after a run of each that does not count.

    Taking turns, all meet the same clock rates and temperatures.

    Args:
        runs: what to run, each of which returns what it found.
        repetitions: counted runs of each.

    Returns:
        What each run of each found.
    """
    for run in runs:
        run()
    rounds = [[run() for run in runs] for _ in range(repetitions)]
    return list(zip(*rounds, strict=True))


def time_loops(loops: Sequence[DecodeLoop], repetitions: int) -> list[Timing]:
    """Times loops in turn.

    Args:
        loops: the loops, which may be of different implementations.
        repetitions: counted runs of each.

    Returns:
        A timing a loop.
    """
    columns = take_turns([loop.run for loop in loops], repetitions)
    return [
        Timing(loop.steps, seconds, loop.compile_seconds)
        for loop, seconds in zip(loops, columns, strict=True)
    ]
