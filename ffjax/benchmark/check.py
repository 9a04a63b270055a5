"""Whether the step that is timed computes the right numbers.

Two implementations take the same steps from the same cache: the first chooses the tokens, and
both are fed those, so that a choice they do not share cannot lead them apart.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ffjax.benchmark.contenders import Contender
from ffjax.benchmark.timing import Step, rewind
from ffjax.cache import KVCache

__all__ = ["WRONG", "Check", "Difference", "Observed", "compare", "follow", "observe"]

# What is computed is wrong beyond this relative error; bfloat16 computations of real depth lie
# 0.04 apart at most.
WRONG = 0.1


class Observed(NamedTuple):
    """What a contender did, step by step.

    Attributes:
        cache: the cache it leaves, grown by the steps.
        fed: int32 `[steps, B]`, of several tokens `[steps, B, T]`, the tokens each step was fed.
        chosen: int32, likewise: the tokens each step chose.
        logits: float32 `[steps, B, V]` or `[steps, B, T, V]`.
        repeats: whether a second run gave the same bits.
    """

    cache: Any
    fed: Array
    chosen: Array
    logits: Array
    repeats: bool


class Difference(NamedTuple):
    """How far the logits of two implementations lie apart.

    Attributes:
        relative_error: L2 norm of the difference over that of the other's logits; of the step
            and sequence where that is largest.
        largest_difference: of two logits.
        logit_rms: root mean square of the other's logits, for comparison.
        same_tokens: greedy choices that are the same. A near tie that falls the other way is a
            difference.
        largest_gap: where choices differ, how far the other's logit of its own choice lies
            above its logit of ours; the largest. 0 where all are the same.
    """

    relative_error: float
    largest_difference: float
    logit_rms: float
    same_tokens: int
    largest_gap: float


@dataclasses.dataclass(frozen=True)
class Check:
    """What is known of the correctness of a timed step.

    Attributes:
        steps: steps looked at.
        tokens: greedy choices looked at: steps times B times T.
        finite: whether every logit was finite.
        repeats: whether a second run gave the same bits, and every timed run the same tokens.
        against: what it was compared with: "xla", "baseline" or "one by one".
        difference: how far they lie apart.
    """

    steps: int
    tokens: int
    finite: bool
    repeats: bool
    against: str
    difference: Difference

    @property
    def sound(self) -> bool:
        """Whether all logits were finite and repeated runs equal."""
        return self.finite and self.repeats


def observe(contender: Contender, cache: KVCache, first: Array, steps: int) -> Observed:
    """Takes steps twice from the same position, each fed the token of the one before it.

    The second time, what lies beyond the live positions is not NaN any more: it must not matter.

    Args:
        contender: who takes them.
        cache: with the same length in every row and room for the steps. It is used up.
        first: int32 `[B]` or `[B, T]`, the tokens the first step is fed.
        steps: how many.
    """
    position = int(cache.lengths[0])
    own = contender.adopt(cache)
    own, chosen, logits = _take(contender.step, contender.weights, own, first, None, steps)
    own = rewind(own, position)
    own, _, again = _take(contender.step, contender.weights, own, first, None, steps)
    fed = jnp.concatenate([first[None], chosen[:-1]])
    return Observed(own, fed, chosen, logits, bool(_same_bits(logits, again)))


def follow(contender: Contender, cache: Any, fed: Array) -> tuple[Array, Any]:
    """Takes a step for each row of `fed`, int32 `[steps, B]`.

    Args:
        contender: who takes them.
        cache: of the contender's kind; it is used up.
        fed: the tokens.

    Returns:
        Logits float32 `[steps, B, V]`; the cache, grown by the steps.
    """
    cache, _, logits = _take(contender.step, contender.weights, cache, fed[0], fed, len(fed))
    return logits, cache


@functools.partial(jax.jit, static_argnames=("step", "steps"), donate_argnames="cache")
def _take(
    step: Step, weights: Any, cache: Any, first: Array, fed: Array | None, steps: int
) -> tuple[Any, Array, Array]:
    def body(carry, given):
        cache, token = carry
        out = step(weights, cache, token if given is None else given)
        return (out.cache, out.token), (out.token, out.logits)

    (cache, _), (chosen, logits) = lax.scan(body, (cache, first), fed, length=steps)
    return cache, chosen, logits


@jax.jit
def _same_bits(a: Array, b: Array) -> Array:
    return jnp.all(lax.bitcast_convert_type(a, jnp.int32) == lax.bitcast_convert_type(b, jnp.int32))


def compare(logits: Array, others: Array) -> Difference:
    """How far `logits` lie from another implementation's, both float32 `[steps, B, V]`."""
    figures = [np.asarray(x).item() for x in _compare(logits, others)]
    return Difference(*figures)


@jax.jit
def _compare(logits: Array, others: Array) -> tuple[Array, ...]:
    distance = jnp.linalg.norm(logits - others, axis=-1)
    ours, theirs = (jnp.argmax(x, axis=-1, keepdims=True) for x in (logits, others))
    gaps = jnp.take_along_axis(others, theirs, -1) - jnp.take_along_axis(others, ours, -1)
    return (
        jnp.max(distance / jnp.linalg.norm(others, axis=-1)),
        jnp.max(jnp.abs(logits - others)),
        jnp.sqrt(jnp.mean(others**2)),
        jnp.sum(ours == theirs),
        jnp.max(gaps),
    )
