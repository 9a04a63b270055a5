"""What can be timed: an implementation of the decode step, with its weights and its cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

from flax import nnx
from jax import Array

from ffjax.benchmark.baseline import LayerCaches, baseline_step, split_cache, split_weights
from ffjax.benchmark.timing import Step
from ffjax.cache import KVCache
from ffjax.decode import DecodeOutput, Implementation, decode_step
from ffjax.model import Transformer

__all__ = ["Contender", "ContenderName", "baseline", "contender", "implementation"]

ContenderName = Literal[Implementation, "baseline"]


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


def contender(model: Transformer, name: ContenderName) -> Contender:
    """The contender of that name."""
    return baseline(model) if name == "baseline" else implementation(model, name)


def implementation(model: Transformer, name: Implementation) -> Contender:
    """`ffjax.decode_step` by the implementation of that name, on the model's own arrays."""
    graph, params = nnx.split(model)

    def step(params: Any, cache: KVCache, tokens: Array) -> DecodeOutput:
        return decode_step(nnx.merge(graph, params), cache, tokens, implementation=name)

    return Contender(step, params, lambda cache: cache)


def baseline(model: Transformer) -> Contender:
    """The baseline, with copies of the model's layers."""
    config = model.config

    def adopt(cache: KVCache) -> LayerCaches:
        # No loop passes the capacity, so that any can be rewound and run again.
        return split_cache(config, cache, cache.capacity - int(cache.lengths.min()))

    return Contender(functools.partial(baseline_step, config), split_weights(model), adopt)
