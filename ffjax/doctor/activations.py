"""What a text makes of the reference model, tensor by tensor: what is not finite, what is large."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ffjax.model import LAST_TENSORS, LAYER_TENSORS, Transformer

__all__ = ["Activations", "BadActivation", "Largest", "observe"]


class _Summary(NamedTuple):
    """Of one tensor `[1, T, ...]`; or of each layer's, all with an axis `[L]` in front.

    Attributes:
        size: int32, its values.
        bad: int32, those that are not finite.
        first: int32, place of the first of them, a number an axis.
        largest: float32, the largest magnitude of finite values; NaN where none is.
        where: int32, its place.
        rms: float32, root mean square of finite values.
    """

    size: Array
    bad: Array
    first: tuple[Array, ...]
    largest: Array
    where: tuple[Array, ...]
    rms: Array


@dataclasses.dataclass(frozen=True)
class BadActivation:
    """A tensor that is not finite.

    Attributes:
        tensor: its name, of `LAYER_TENSORS` or `LAST_TENSORS`.
        layer: its layer; None after the last one.
        count: values that are not finite.
        size: values in all.
        position: of the first of them, in the text.
        channel: its channel; of queries, keys and values head and element.
    """

    tensor: str
    layer: int | None
    count: int
    size: int
    position: int
    channel: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest magnitude of a tensor over all layers, of finite values.

    Attributes:
        tensor: its name.
        layer: where it stands; None after the last layer.
        position: likewise, in the text.
        channel: likewise; of queries, keys and values head and element.
        magnitude: how large it is; NaN where no value is finite in any layer.
        rms: root mean square of that layer's tensor, for comparison.
    """

    tensor: str
    layer: int | None
    position: int
    channel: tuple[int, ...]
    magnitude: float
    rms: float


@dataclasses.dataclass(frozen=True)
class Activations:
    """What was seen.

    Attributes:
        tokens: T, tokens of the text.
        first_bad: the first tensor that is not finite, in the order of computation, or None.
        bad: how many tensors are not finite, each layer's counted.
        largest: of each tensor, in the order of computation.
    """

    tokens: int
    first_bad: BadActivation | None
    bad: int
    largest: list[Largest]


def observe(model: Transformer, tokens: list[int]) -> Activations:
    """Runs the reference over a text, once.

    Args:
        model: the model.
        tokens: the text's token ids, at least one.

    Raises:
        ValueError: there is no token, or one outside the vocabulary.
    """
    if not tokens:
        raise ValueError("Activations are looked at for one token at least; the text has none.")
    if not 0 <= min(tokens) <= max(tokens) < model.config.vocab_size:
        raise ValueError(
            f"Token ids of {model.config.name} are 0 to {model.config.vocab_size - 1}; the text "
            f"has {min(tokens)} to {max(tokens)}. Is it another model's tokenizer?"
        )
    graph, state = nnx.split(model)
    seen = jax.device_get(_observe(graph, state, jnp.array([tokens], jnp.int32)))
    return _read(seen, model.config.num_layers, len(tokens))


@functools.partial(jax.jit, static_argnames="graph")
def _observe(graph: Any, state: Any, tokens: Array) -> dict[str, _Summary]:
    return nnx.merge(graph, state).observe(tokens, _summary)


def _summary(x: Array) -> _Summary:
    finite = jnp.isfinite(x)
    # Kept from overflowing: the square of 1e20 is not finite, and 1e20 is.
    size = jnp.where(finite, jnp.abs(x.astype(jnp.float32)), 0)
    top = jnp.max(size)
    share = size / jnp.where(top == 0, 1, top)
    count = jnp.maximum(jnp.sum(finite), 1)

    def place(flat: Array) -> tuple[Array, ...]:
        return jnp.unravel_index(flat, x.shape)

    return _Summary(
        size=jnp.int32(x.size),
        bad=jnp.sum(~finite, dtype=jnp.int32),
        first=place(jnp.argmax(~finite)),
        largest=jnp.where(jnp.any(finite), top, jnp.nan),
        where=place(jnp.argmax(size)),
        rms=top * jnp.sqrt(jnp.sum(share * share) / count),
    )


def _read(seen: dict[str, _Summary], num_layers: int, tokens: int) -> Activations:
    """The report of summaries that have come to the host."""
    in_order: list[tuple[str, int | None, _Summary]] = []
    for layer in range(num_layers):
        take = operator.itemgetter(layer)
        in_order += [(name, layer, jax.tree.map(take, seen[name])) for name in LAYER_TENSORS]
    in_order += [(name, None, seen[name]) for name in LAST_TENSORS]
    bad = [entry for entry in in_order if entry[2].bad]
    best: dict[str, Largest] = {}
    for name, layer, one in in_order:
        _, position, *channel = map(int, one.where)
        place = layer, position, tuple(channel)
        found = Largest(name, *place, magnitude=float(one.largest), rms=float(one.rms))
        if name not in best or _magnitude(found) > _magnitude(best[name]):
            best[name] = found
    return Activations(tokens, _bad(*bad[0]) if bad else None, len(bad), list(best.values()))


def _magnitude(one: Largest) -> float:
    """Of a tensor without finite values, less than any."""
    return -1.0 if math.isnan(one.magnitude) else one.magnitude


def _bad(name: str, layer: int | None, one: _Summary) -> BadActivation:
    _, position, *channel = map(int, one.first)
    return BadActivation(name, layer, int(one.bad), int(one.size), position, tuple(channel))
