"""Short prompts by fused decode steps of several tokens.

A prefill of a few tokens waits for its launches, some 90 us a layer on an H200, and unpacks
quantized weights first. A decode step of 8 tokens is one launch and reads the weights as they are.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from ffjax.cache import KVCache
from ffjax.decode import decode_step
from ffjax.parts import Parts
from ffjax.prefill.first import first_token
from ffjax.prefill.request import RequestPrefill
from ffjax.programs import Programs
from ffjax.reproducible import compiler_options
from ffjax.sampling.choose import Choice
from ffjax.sampling.history import History, fed_side_by_side
from ffjax.sampling.rows import Rows, Stages
from pallas_kernels.dims import ceil_div
from pallas_kernels.support import MAX_BATCH

__all__ = ["StepwisePrefill", "step_tokens"]

# Steps that are compiled one behind the other. Longer prompts may be asked to be fed so, too.
_MOST_UNROLLED = 4


def step_tokens(batch: int) -> int:
    """T of the steps for so many sequences: all that a fused step takes, 1 where it has no more."""
    return max(1, MAX_BATCH // batch)


def _feed_and_choose(
    graphdef: Any,
    state: Any,
    cache: KVCache,
    tokens: Array,
    counts: Array,
    rows: Rows,
    history: History | None,
    *,
    stages: Stages,
) -> tuple[KVCache, History | None, Choice]:
    """Feeds `tokens [steps, B, T]`, of which `counts [steps, B]` count; the token that follows."""
    model = nnx.merge(graphdef, state)

    def step(carry: tuple[KVCache, Array], given: tuple[Array, Array]) -> Any:
        cache, last = carry
        some, count = given
        out = decode_step(model, cache, some, count, implementation="pallas")
        newest = jnp.maximum(count - 1, 0)[:, None, None]
        logits = jnp.take_along_axis(out.logits, newest, axis=1)[:, 0]
        return (out.cache, jnp.where(count[:, None] > 0, logits, last)), None

    nothing = jnp.zeros((tokens.shape[1], model.config.vocab_size), jnp.float32)
    # Of a few, a loop on the device would only be in the way.
    few = len(tokens) <= _MOST_UNROLLED
    (cache, logits), _ = lax.scan(step, (cache, nothing), (tokens, counts), unroll=few)
    if history is not None:
        history = fed_side_by_side(history, tokens, counts)
    return cache, history, first_token(logits, rows, history, stages)


@functools.cache
def _programs(device: Any) -> Programs:
    jitted = jax.jit(
        _feed_and_choose,
        static_argnames=("graphdef", "stages"),
        donate_argnames=("cache", "history"),
        compiler_options=compiler_options(device),
    )
    return Programs(jitted)


class StepwisePrefill(RequestPrefill):
    """The prefill of a request of short prompts. Its cache is made for such steps."""

    name = "steps"

    def __init__(
        self,
        parts: Parts,
        prompts: tuple[np.ndarray, ...],
        capacity: int,
        rows: Rows,
        stages: Stages,
        last: Array,
    ):
        """Takes what `ffjax.prefill.packed.PackedPrefill` does."""
        super().__init__(parts, rows, stages)
        size = step_tokens(len(prompts))
        steps = ceil_div(max(len(prompt) for prompt in prompts), size)
        tokens = np.zeros((steps, len(prompts), size), np.int32)
        counts = np.zeros((steps, len(prompts)), np.int32)
        for row, prompt in enumerate(prompts):
            for step in range(steps):
                some = prompt[step * size : (step + 1) * size]
                tokens[step, row, : len(some)] = some
                counts[step, row] = len(some)
        # On their way to the device while it still makes the cache.
        self._tokens, self._counts = jax.device_put((tokens, counts))

    def _args(self, cache: KVCache, history: History | None) -> tuple[Any, ...]:
        return self._parts.state, cache, self._tokens, self._counts, self._rows, history

    def compile(self, cache: KVCache, history: History | None) -> None:
        """Compiles what `run` needs, ahead of it."""
        self._compile(_programs(self._parts.device), 0, *self._args(cache, history))

    def run(
        self, cache: KVCache, history: History | None
    ) -> tuple[KVCache, History | None, Choice]:
        """Feeds the prompts; returns both with them, and the first new tokens."""
        return self._compiled[0](*self._args(cache, history))
