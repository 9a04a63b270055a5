"""The decode step as plain `jax.numpy`: what the kernel computes, with every named intermediate."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.dims import DecodeWeights
from pallas_kernels.launch import StepState
from pallas_kernels.spec import segments
from pallas_kernels.spec.heads import new_positions
from pallas_kernels.spec.segments import Buffers
from pallas_kernels.stream.plan import StreamPlan

__all__ = ["Step", "cache_has_room", "expected_embed", "expected_head", "expected_layer", "step"]


class Step(NamedTuple):
    """A whole step.

    Attributes:
        layers: each layer's buffers: see `segments.NAMES`.
        head: the head's.
        k: the cache's keys after the step, `[L, B, K, S, H]`.
        v: likewise its values.
        lengths: int32 `[B]`, after the step.
    """

    layers: list[Buffers]
    head: Buffers
    k: Array
    v: Array
    lengths: Array


def step(
    plan: StreamPlan,
    weights: DecodeWeights,
    state: StepState,
    tokens: Array,
    live: Array | None = None,
) -> Step:
    """A decode step from what the kernel is given, by the plan it is given.

    Args:
        plan: the step's: its cut decides what shares a scale, and how splits are made.
        weights: the weights, as the model stores them.
        state: the cache; of `counters` nothing is read.
        tokens: int32 `[B * T]`; token t of sequence b is number b * T + t.
        live: int32 `[B]`, how many of each sequence's tokens count; None: all T.
    """
    lengths = jnp.maximum(state.lengths, 0)
    k, v = state.k, state.v
    entering, layers = expected_embed(plan)(weights, tokens), []
    for layer in range(plan.dims.num_layers):
        made = expected_layer(plan)(weights, jnp.int32(layer), lengths, k, v, entering)
        layers.append(made)
        k, v = _with_new(plan)(k, v, jnp.int32(layer), lengths, made["k"], made["v"])
        entering = {"residual": made["residual_out"], "x_in": made["x_out"]}
    last = expected_head(plan)(weights, lengths, entering["x_in"])
    grown = plan.dims.tokens if live is None else live
    return Step(layers, last, k, v, lengths + grown)


def cache_has_room(plan: StreamPlan, lengths: Array) -> Array:
    """Whether the cache has a slot for each column's token: bool `[C]`."""
    return new_positions(plan, jnp.maximum(lengths, 0)) < plan.dims.capacity


@functools.lru_cache
def expected_embed(plan: StreamPlan):
    """The embedding, compiled: `(weights, tokens)` to buffers."""
    return jax.jit(functools.partial(segments.embed, plan))


@functools.lru_cache
def expected_layer(plan: StreamPlan):
    """A layer, compiled once for all: `(weights, layer, lengths, k, v, given)` to buffers.

    `given` holds at least `residual` and `x_in`. What else it holds, as another implementation has
    handed it over, is what the next segment is computed from, in place of what is made here: so
    no segment's difference is carried on to the next one.
    """

    def run(
        weights: DecodeWeights, layer: Array, lengths: Array, k: Array, v: Array, given: Buffers
    ) -> Buffers:
        made = dict(given)

        def add(buffers: Buffers) -> None:
            out.update(buffers)
            made.update({name: x for name, x in buffers.items() if name not in given})

        out: Buffers = {"residual": given["residual"], "x_in": given["x_in"]}
        add(segments.qkv(plan, weights, layer, lengths, given["x_in"]))
        cached = k[layer], v[layer]
        parts = given.get("parts")
        add(segments.attention(plan, weights, layer, lengths, *cached, made["qkv"], parts))
        block = given.get("attn_block")
        add(segments.attn_out(plan, weights, layer, given["residual"], made["attn"], block))
        add(segments.gate_up(plan, weights, layer, made["x_mid"]))
        others = given.get("partial"), given.get("ffw_block")
        add(segments.down(plan, weights, layer, made["residual_mid"], made["ffw"], *others))
        return out

    return jax.jit(run)


@functools.lru_cache
def expected_head(plan: StreamPlan):
    """The head, compiled: `(weights, lengths, x_head)`, and perhaps `logits`, to buffers."""

    def run(
        weights: DecodeWeights, lengths: Array, x_head: Array, logits: Array | None = None
    ) -> Buffers:
        return segments.head(plan, weights, cache_has_room(plan, lengths), x_head, logits)

    return jax.jit(run)


@functools.lru_cache
def _with_new(plan: StreamPlan):
    """The cache with a layer's new keys and values, as far as it has room for them."""

    def put(cache: Array, layer: Array, lengths: Array, rows: Array) -> Array:
        position = new_positions(plan, lengths)
        sequence = jnp.arange(plan.dims.columns) // plan.dims.tokens
        # What has no slot is dropped.
        where = cache.at[layer, sequence, :, position]
        return where.set(rows.astype(cache.dtype), mode="drop")

    def run(k: Array, v: Array, layer: Array, lengths: Array, keys: Array, values: Array):
        return put(k, layer, lengths, keys), put(v, layer, lengths, values)

    return jax.jit(run)
