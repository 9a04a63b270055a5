"""The reference's prefill: prompts side by side, padded, through the model itself.

All prompts end with the last chunk, so that its logits serve every one: a shorter prompt has fewer
or no tokens in the first chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
from jax import Array

from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.parts import Parts
from ffjax.prefill.first import first_token
from ffjax.prefill.request import RequestPrefill
from ffjax.programs import Programs
from ffjax.reproducible import compiler_options
from ffjax.sampling.choose import Choice
from ffjax.sampling.history import History, fed_side_by_side
from ffjax.sampling.rows import Rows, Stages

__all__ = ["PaddedPrefill", "chunk_sizes"]

# A prompt is fed in pieces of two sizes: the large one, and for what is left over the
# small one where it suffices. Two sizes are two compilations, whatever the lengths.
_LARGE_CHUNK = 256
_SMALL_CHUNK = 32
# The reference keeps the attention scores of a chunk, float32 [B, N, T, S].
_MAX_SCORE_BYTES = 1 << 30


def chunk_sizes(config: ModelConfig, longest: int, batch: int, capacity: int) -> list[int]:
    """Sizes of the chunks in which prompts are fed, first to last.

    Args:
        config: the model's.
        longest: tokens of the longest prompt.
        batch: B.
        capacity: S.
    """
    large = _LARGE_CHUNK
    while large > _SMALL_CHUNK and 4 * batch * config.num_heads * large * capacity > (
        _MAX_SCORE_BYTES
    ):
        large //= 2
    rest = longest % large
    sizes = [large] * (longest // large)
    return [_SMALL_CHUNK if rest <= _SMALL_CHUNK else large, *sizes] if rest else sizes


def _feed_and_choose(
    graphdef: Any,
    state: Any,
    cache: KVCache,
    tokens: Array,
    num_tokens: Array,
    rows: Rows,
    history: History | None,
    *,
    stages: Stages,
) -> tuple[KVCache, History | None, Choice]:
    """Feeds `tokens [B, T]`, of which `num_tokens [B]` count; also the token that follows."""
    model = graphdef.merged(state)
    logits, cache = model(tokens, cache, num_tokens=num_tokens, last_only=True)
    if history is not None:
        history = fed_side_by_side(history, tokens, num_tokens)
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


class PaddedPrefill(RequestPrefill):
    """The reference's prefill of one request."""

    name = "xla"

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
        self._prompts = prompts
        longest = max(len(prompt) for prompt in prompts)
        self._sizes = chunk_sizes(parts.config, longest, len(prompts), capacity)

    def _args(
        self,
        cache: KVCache,
        tokens: np.ndarray,
        counts: np.ndarray,
        history: History | None,
    ) -> tuple[Any, ...]:
        return self._parts.state, cache, tokens, counts, self._rows, history

    def compile(self, cache: KVCache, history: History | None, like: Hashable = None) -> None:
        """Compiles what `run` needs, ahead of it."""
        batch = len(self._prompts)
        for size in sorted(set(self._sizes)):
            tokens, counts = np.zeros((batch, size), np.int32), np.zeros(batch, np.int32)
            args = self._args(cache, tokens, counts, history)
            self._compile(_programs(self._parts.device), size, like, *args)

    def run(
        self, cache: KVCache, history: History | None
    ) -> tuple[KVCache, History | None, Choice]:
        """Feeds the prompts; returns both with them, and the first new tokens."""
        after, choice = sum(self._sizes), None  # positions this chunk and those after it hold
        for size in self._sizes:
            tokens = np.zeros((len(self._prompts), size), np.int32)
            counts = np.zeros(len(self._prompts), np.int32)
            for row, prompt in enumerate(self._prompts):
                start = max(len(prompt) - after, 0)
                stop = max(len(prompt) - (after - size), 0)
                counts[row] = stop - start
                tokens[row, : stop - start] = prompt[start:stop]
            args = self._args(cache, tokens, counts, history)
            cache, history, choice = self._compiled[size](*args)
            after -= size
        assert choice is not None, "a prompt has at least one token"
        return cache, history, choice
