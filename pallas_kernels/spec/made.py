"""Random weights, a cache and tokens of a step's sizes: no model is needed to look for a fault."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.dims import DecodeWeights, Dims
from pallas_kernels.launch import StepState
from pallas_kernels.stream.exchange_layout import exchange_words

__all__ = ["random_state", "random_tokens", "random_weights"]

# Rotary bases; the second one is that of layers that have their own.
_BASE, _OTHER_BASE = 500_000.0, 10_000.0


def random_weights(dims: Dims, seed: int = 0) -> DecodeWeights:
    """Weights of these sizes and formats, none of which is like another's, on the default device.

    Products keep the size of what they are given. Norms are far from ones, and biases from zeros:
    else one that is left out would go unnoticed.
    """
    made: dict[str, Any] = {}
    key = jax.random.key(seed)
    for number, (name, spec) in enumerate(dims.abstract_weights()._asdict().items()):
        made[name] = (
            None if spec is None else _made(dims, name, spec, jax.random.fold_in(key, number))
        )
    return DecodeWeights(**made)


def _made(dims: Dims, name: str, spec: Any, key: Array) -> Array:
    if name.startswith("inv_freq"):
        pairs = dims.head_dim // 2
        base = _BASE if name == "inv_freq" else _OTHER_BASE
        return base ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    if jnp.issubdtype(spec.dtype, jnp.integer):
        most = jnp.iinfo(spec.dtype).max
        return jax.random.randint(key, spec.shape, -most, most, spec.dtype)
    if name.endswith("_scale"):
        return _scales(dims, name.removesuffix("_scale"), spec, key)
    if name.endswith(("norm", "bias")):
        middle = 0.0 if name.endswith("bias") else 1 - dims.features.norm_offset
        return (middle + jax.random.uniform(key, spec.shape, minval=-0.5, maxval=0.5)).astype(
            spec.dtype
        )
    size = 1.0 if name == "embed" else 1 / math.sqrt(spec.shape[-1])
    return jax.random.normal(key, spec.shape, spec.dtype) * jnp.asarray(size, spec.dtype)


def _scales(dims: Dims, name: str, spec: Any, key: Array) -> Array:
    """So that integers times scales have a standard deviation of about 1 / sqrt(inputs)."""
    stored = dims.stored(name)
    inner = {"attn_out": dims.attn_dim, "down": dims.ffw_dim}.get(name, dims.model_dim)
    size = 1 / math.sqrt(inner) / (73.0 if stored.bits == 8 else 4.6)
    spread = jax.random.uniform(key, spec.shape, minval=0.5, maxval=1.5)
    if stored.groups is None or stored.groups.offset is None:
        return (spread * size).astype(spec.dtype)
    first, other = spread[..., 0] * size, spread[..., 1]
    second = 8 * other if stored.groups.offset == "zero" else -7.5 * first * other
    return jnp.stack([first, second], axis=-1).astype(spec.dtype)


def random_state(dims: Dims, lengths: Sequence[int], seed: int = 1) -> StepState:
    """A cache in the middle of its life: NaN where nobody may read."""
    shape = dims.num_layers, dims.batch, dims.num_kv_heads, dims.capacity, dims.head_dim
    live = jnp.arange(dims.capacity)[:, None] < jnp.array(lengths)[:, None, None, None]

    @jax.jit
    def made(key: Array) -> Array:
        return jnp.where(live, jax.random.normal(key, shape, jnp.bfloat16), jnp.nan)

    k, v = (made(key) for key in jax.random.split(jax.random.key(seed)))
    counters = jnp.zeros(exchange_words(dims), jnp.int32)
    return StepState(k, v, jnp.array(lengths, jnp.int32), counters)


def random_tokens(dims: Dims, seed: int = 2) -> Array:
    """Token ids, int32 `[B * T]`."""
    return jax.random.randint(jax.random.key(seed), (dims.columns,), 0, dims.vocab_size, jnp.int32)
