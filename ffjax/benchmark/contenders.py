"""What can be timed: an implementation of the decode step, with its weights and its cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, cast

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from ffjax.benchmark.baseline import LayerCaches, baseline_step, split_cache, split_weights
from ffjax.benchmark.timing import Step
from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.decode import (
    DecodeOutput,
    Implementation,
    choose_kernel,
    decode_step,
    why_not_kernel,
)
from ffjax.model import Transformer

__all__ = [
    "Contender",
    "ContenderName",
    "baseline",
    "choose",
    "contender",
    "implementation",
    "keeping_one",
    "one_by_one",
]

ContenderName = Literal[Implementation, "baseline", "one by one"]


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something that decodes.

    Attributes:
        step: the decode step.
        weights: what the step takes as weights.
        adopt: the step's kind of cache with the contents of a `KVCache`: its own arrays, or
            copies of them.
    """

    step: Step
    weights: Any
    adopt: Callable[[KVCache], Any]


def choose(
    config: ModelConfig,
    batch: int,
    capacity: int,
    named: Implementation | None,
    tokens: int = 1,
) -> tuple[Implementation, str | None]:
    """Which implementation of the bfloat16 step to time.

    Args:
        config: the model's.
        batch: B.
        capacity: S.
        named: what was asked for, or None for the best that can run here.
        tokens: T, of each sequence.

    Returns:
        Its name; and, where that is the reference unasked, why, a sentence.

    Raises:
        NotImplementedError: the named implementation cannot run here.
    """
    if named == "xla":
        return "xla", None
    if named is not None:
        reason = why_not_kernel(named, config, jnp.bfloat16, batch, capacity, tokens)
        if reason is not None:
            raise NotImplementedError(reason)
        return named, None
    kernel, reason = choose_kernel(config, jnp.bfloat16, batch, capacity, tokens)
    return ("xla", reason) if kernel is None else (kernel, None)


def contender(model: Transformer, name: ContenderName) -> Contender:
    """The contender of that name."""
    if name == "baseline":
        return baseline(model)
    return one_by_one(model) if name == "one by one" else implementation(model, name)


def one_by_one(model: Transformer) -> Contender:
    """The reference, for tokens `[B, T]` by T steps of one token."""
    graph, params = nnx.split(model)

    def step(params: Any, cache: KVCache, tokens: Array) -> DecodeOutput:
        model = nnx.merge(graph, params)

        def single(cache: KVCache, token: Array) -> tuple[KVCache, tuple[Array, Array]]:
            out = decode_step(model, cache, token, implementation="xla")
            return out.cache, (out.logits, out.token)

        cache, (logits, token) = lax.scan(single, cache, tokens.T)
        return DecodeOutput(cache, jnp.moveaxis(logits, 0, 1), token.T)

    return Contender(step, params, lambda cache: cache)


def implementation(model: Transformer, name: Implementation) -> Contender:
    """`ffjax.decode_step` by the implementation of that name, on the model's own arrays."""
    graph, params = nnx.split(model)

    def step(params: Any, cache: KVCache, tokens: Array) -> DecodeOutput:
        return decode_step(nnx.merge(graph, params), cache, tokens, implementation=name)

    return Contender(step, params, lambda cache: cache)


def keeping_one(contender: Contender) -> Contender:
    """The same, but a step of several tokens keeps the first of them: one position further.

    So steps of any number of tokens go through the same positions, and can be compared.
    """

    def step(weights: Any, cache: KVCache, tokens: Array) -> DecodeOutput:
        out = cast(DecodeOutput, contender.step(weights, cache, tokens))
        # From the lengths that come out: those that go in would have to be copied first.
        lengths = out.cache.lengths - (tokens.shape[1] - 1)
        return out._replace(cache=dataclasses.replace(out.cache, lengths=lengths))

    return dataclasses.replace(contender, step=step)


def baseline(model: Transformer) -> Contender:
    """The baseline, with copies of the model's layers."""
    config = model.config

    def adopt(cache: KVCache) -> LayerCaches:
        # No loop passes the capacity, so that any can be rewound and run again.
        return split_cache(config, cache, cache.capacity - int(cache.lengths.min()))

    return Contender(functools.partial(baseline_step, config), split_weights(model), adopt)
