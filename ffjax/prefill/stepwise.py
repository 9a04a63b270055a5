"""Short prompts by fused decode steps of several tokens.

A prefill of a few tokens waits for its launches, some 90 us a layer on an H200, and unpacks
quantized weights first. A decode step of 8 tokens is one launch and reads the weights as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ffjax.cache import KVCache
from ffjax.decode import decode_step
from ffjax.parcel import Layout, as_words
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

# Steps that are compiled one after the other. Longer prompts may be asked to be fed so, too.
_MOST_UNROLLED = 4


def step_tokens(batch: int) -> int:
    """T of the steps for so many sequences: all that a fused step takes, 1 where it has no more."""
    return max(1, MAX_BATCH // batch)


class _Sizes(NamedTuple):
    """Of the cache that a program makes; static.

    Attributes:
        batch: B.
        capacity: S.
        tokens: T, of the steps.
    """

    batch: int
    capacity: int
    tokens: int


def _feed_and_choose(
    graphdef: Any,
    state: Any,
    words: Array,
    *,
    layout: Layout,
    sizes: _Sizes,
    stages: Stages,
) -> tuple[KVCache, History | None, Choice]:
    """Makes a cache, feeds prompts into it, and chooses the token that follows each.

    All in one program: another call of one would take the host as long as some launches, and a
    cache is made in three.

    Args:
        graphdef: the model's structure.
        state: its weights.
        words: tokens `[steps, B, T]`, of which counts `[steps, B]` count, and the rows, as `layout`
            says. The last step feeds the end of each prompt.
        layout: of the words.
        sizes: of the cache.
        stages: how the first token is chosen.
    """
    model = graphdef.merged(state)
    config, (batch, capacity, size) = model.config, sizes
    tokens, counts, rows = layout.opened(words)
    cache = KVCache.create(config, batch, capacity, model.dtype, tokens=size)

    def step(carry: tuple[KVCache, Array, Array], given: tuple[Array, Array]) -> Any:
        cache, _, _ = carry
        some, count = given
        out = decode_step(model, cache, some, count, implementation="pallas")
        newest = jnp.maximum(count - 1, 0)[:, None]
        logits = jnp.take_along_axis(out.logits, newest[..., None], axis=1)[:, 0]
        return (out.cache, logits, jnp.take_along_axis(out.token, newest, axis=1)[:, 0]), None

    nothing = jnp.zeros((batch, config.vocab_size), jnp.float32), jnp.zeros((batch,), jnp.int32)
    # Of a few, a loop on the device would only be in the way.
    few = len(tokens) <= _MOST_UNROLLED
    (cache, logits, token), _ = lax.scan(step, (cache, *nothing), (tokens, counts), unroll=few)
    history = None
    if stages.remembers:
        history = History.empty(batch, config.vocab_size)
        history = fed_side_by_side(history, tokens, counts)
    return cache, history, first_token(logits, rows, history, stages, token)


@functools.cache
def _programs(device: Any) -> Programs:
    jitted = jax.jit(
        _feed_and_choose,
        static_argnames=("graphdef", "layout", "sizes", "stages"),
        compiler_options=compiler_options(device),
    )
    return Programs(jitted)


class StepwisePrefill(RequestPrefill):
    """The prefill of a request of short prompts. It makes its cache, for such steps."""

    name = "steps"

    def __init__(
        self,
        parts: Parts,
        prompts: tuple[np.ndarray, ...],
        capacity: int,
        rows: Rows,
        stages: Stages,
        last: Any,
    ):
        """Takes what `ffjax.prefill.packed.PackedPrefill` does, and has no use for `last`."""
        super().__init__(parts, rows, stages)
        batch = len(prompts)
        size = step_tokens(batch)
        self._sizes = _Sizes(batch, capacity, size)
        steps = ceil_div(max(len(prompt) for prompt in prompts), size)
        tokens = np.zeros((steps, batch, size), np.int32)
        counts = np.zeros((steps, batch), np.int32)
        for row, prompt in enumerate(prompts):
            # All prompts end with the last step: no other step's logits are looked at.
            first = steps - ceil_div(len(prompt), size)
            for step in range(first, steps):
                some = prompt[(step - first) * size : (step - first + 1) * size]
                tokens[step, row, : len(some)] = some
                counts[step, row] = len(some)
        self._words, self._layout = as_words((tokens, counts, rows))

    def compile(self, cache: KVCache, history: History | None, like: Hashable = None) -> None:
        """Compiles what `run` needs, ahead of it."""
        static = {"layout": self._layout, "sizes": self._sizes}
        args = self._parts.state, self._words
        self._compile(_programs(self._parts.device), 0, like, *args, **static)

    def run(
        self, cache: KVCache, history: History | None
    ) -> tuple[KVCache, History | None, Choice]:
        """Feeds the prompts; returns what it made, with them, and the first new tokens.

        Args:
            cache: is not looked at.
            history: likewise.
        """
        return self._compiled[0](self._parts.state, self._words)
