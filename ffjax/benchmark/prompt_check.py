"""Whether the prefill that is timed computes the right numbers.

The reference model is fed the same prompts, and both caches are compared, position by position;
and the first token with the reference's logits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from ffjax.benchmark.check import WRONG
from ffjax.cache import KVCache
from ffjax.loop import NOT_FINITE
from ffjax.model import Transformer

__all__ = ["PromptCheck", "ReferencePrefill", "check_prefill", "same_cache"]

# A single position is wrong beyond this relative error: the worst of many thousands lies further
# out than all together, and one that has nothing to do with the right one lies 1.4 away.
_WRONG_POSITION = 0.5
# A token is wrong where the reference's logit of its own lies so many root mean squares above:
# between two logits that are each WRONG away, some standard deviations.
_WRONG_GAP = 0.5
# The reference is fed chunks of this many tokens, fewer where its scores, float32 [B, N, T, S],
# would be larger than the bytes.
_CHUNK = 512
_MAX_SCORE_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class PromptCheck:
    """What is known of the correctness of a timed prefill.

    Attributes:
        tokens: first tokens looked at: B.
        positions: positions of the caches looked at, of all sequences.
        finite: whether all live keys and values were finite and every token was one.
        repeats: whether a second run gave the same bits, and every timed run the same tokens.
        cache_error: L2 norm of the difference of keys, or of values, from the reference's, over
            that of the reference's; of the layer and sequence where that is largest. Infinite
            where the lengths are others.
        position_error: the same of a single position of a layer, the largest.
        same_tokens: first tokens that are the reference's.
        gap: where they are not, how far the reference's logit of its own lies above its logit of
            ours, in root mean squares of its logits; the largest.
    """

    tokens: int
    positions: int
    finite: bool
    repeats: bool
    cache_error: float
    position_error: float
    same_tokens: int
    gap: float

    @property
    def complaint(self) -> str | None:
        """What is wrong, to follow a name in a sentence; None where nothing is."""
        if not self.finite:
            return "made a cache or logits not finite"
        if not self.repeats:
            return "gave other bits when repeated"
        if not (self.cache_error < WRONG and self.position_error < _WRONG_POSITION):
            return "made another cache than the reference"
        if not self.gap < _WRONG_GAP:
            return "chose other first tokens than the reference"
        return None

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return self.complaint is None


class ReferencePrefill:
    """The reference model, fed prompts in chunks through a cache."""

    def __init__(self, model: Transformer, prompts: Sequence[np.ndarray], capacity: int):
        """Cuts the prompts.

        Args:
            model: the model.
            prompts: int32 `[n]` each, n at least 1.
            capacity: S of the cache to fill.
        """
        self._graph, self._params = nnx.split(model)
        self._make = functools.partial(
            KVCache.create, model.config, len(prompts), capacity, model.dtype
        )
        size = _CHUNK
        scores = 4 * len(prompts) * model.config.num_heads * capacity
        while size > 1 and scores * size > _MAX_SCORE_BYTES:
            size //= 2
        longest = max(map(len, prompts))
        size = min(size, longest)
        self._chunks = []
        for start in range(0, longest, size):
            pieces = [prompt[start : start + size] for prompt in prompts]
            tokens = np.zeros((len(prompts), size), np.int32)
            for row, piece in zip(tokens, pieces, strict=True):
                row[: len(piece)] = piece
            self._chunks.append((tokens, np.array([len(piece) for piece in pieces], np.int32)))
        vocab = model.config.vocab_size
        self._logits = functools.partial(jnp.zeros, (len(prompts), vocab), jnp.float32)

    def run(self) -> tuple[Array, KVCache]:
        """Feeds the prompts.

        Returns:
            Logits that follow each prompt, float32 `[B, V]`; the cache.
        """
        cache, logits = self._make(), self._logits()
        for tokens, counts in self._chunks:
            cache, logits = _feed(self._graph, self._params, cache, logits, tokens, counts)
        return logits, cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _feed(
    graph: Any, params: Any, cache: KVCache, logits: Array, tokens: Array, counts: Array
) -> tuple[KVCache, Array]:
    """Feeds a chunk; a sequence of which it holds no token keeps its logits."""
    model = nnx.merge(graph, params)
    new, cache = model(tokens, cache, num_tokens=counts, last_only=True)
    return cache, jnp.where(counts[:, None] > 0, new, logits)


def check_prefill(
    tokens: np.ndarray, cache: KVCache, lengths: Sequence[int], logits: Array, other: KVCache
) -> PromptCheck:
    """Compares a prefill with the reference's.

    Args:
        tokens: int32 `[B]`, the first tokens, or NOT_FINITE.
        cache: what the prefill made.
        lengths: tokens of each prompt.
        logits: the reference's, float32 `[B, V]`.
        other: the reference's cache.

    Returns:
        What was found, `repeats` taken for granted.
    """
    finite, cache_error, position_error = (
        np.asarray(figure).item()
        for figure in _compare(cache, other, jnp.asarray(lengths, jnp.int32))
    )
    if cache.lengths.tolist() != list(lengths):
        cache_error = math.inf
    theirs, rows = np.asarray(logits), np.arange(len(lengths))
    chosen = np.where(tokens == NOT_FINITE, 0, tokens)
    gaps = (theirs.max(axis=-1) - theirs[rows, chosen]) / np.sqrt(np.mean(theirs**2, axis=-1))
    return PromptCheck(
        tokens=len(lengths),
        positions=sum(lengths),
        finite=finite and bool((tokens != NOT_FINITE).all()),
        repeats=True,
        cache_error=cache_error,
        position_error=position_error,
        same_tokens=int((chosen == theirs.argmax(axis=-1)).sum()),
        gap=float(gaps.max()),
    )


def _live(lengths: Array, slots: int) -> Array:
    return jnp.arange(slots) < lengths[:, None]  # [B, S]


@jax.jit
def _compare(cache: KVCache, other: KVCache, lengths: Array) -> tuple[Array, Array, Array]:
    """Whether live keys and values are finite; the two relative errors."""
    slots = min(cache.capacity, other.capacity)
    live = _live(lengths, slots)

    def errors(ours: Array, theirs: Array) -> tuple[Array, Array]:  # [B, K, S, H]
        ours, theirs = (x[:, :, :slots].astype(jnp.float32) for x in (ours, theirs))
        distance = jnp.where(live, jnp.sum((ours - theirs) ** 2, axis=(1, 3)), 0)  # [B, S]
        size = jnp.where(live, jnp.sum(theirs**2, axis=(1, 3)), 0)
        whole = jnp.max(jnp.sum(distance, axis=1) / jnp.sum(size, axis=1))
        return whole, jnp.max(jnp.where(live, distance / size, 0))

    def layer(four: tuple[Array, ...]) -> tuple[Array, Array]:
        k, v, other_k, other_v = four
        pairs = errors(k, other_k), errors(v, other_v)
        whole, one = (jnp.maximum(*both) for both in zip(*pairs, strict=True))
        return whole, one

    # A layer at a time: all in float32 would be twice the cache.
    whole, one = lax.map(layer, (cache.k, cache.v, other.k, other.v))
    # A NaN, or an infinity, of a live position is one of the sum over all.
    return jnp.all(jnp.isfinite(whole)), jnp.sqrt(jnp.max(whole)), jnp.sqrt(jnp.max(one))


@jax.jit
def same_cache(cache: KVCache, other: KVCache) -> Array:
    """Whether two caches of the same shape have the same lengths and bits, where they are live."""
    live = _live(cache.lengths, cache.capacity)[:, None, :, None]
    bits = jnp.uint16 if cache.k.dtype.itemsize == 2 else jnp.uint32

    def layer(four: tuple[Array, ...]) -> Array:
        k, v, other_k, other_v = (lax.bitcast_convert_type(x, bits) for x in four)
        return jnp.all(jnp.where(live, (k == other_k) & (v == other_v), True))

    same = jnp.all(lax.map(layer, (cache.k, cache.v, other.k, other.v)))
    return same & jnp.all(cache.lengths == other.lengths)
