"""A case's model and cache, made on the device by one cheap program each.

Numbers come of a hash instead of JAX's random numbers: what they are made by compiles in no time.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.dims import step_dims
from ffjax.model import Transformer
from pallas_kernels.stream.exchange_layout import exchange_words

from .draw import STEPS, Case

__all__ = ["cache_of", "live_of", "model_of", "tokens_of"]


def _mixed(shape: tuple[int, ...], seed: Array | int) -> Array:
    """Random bits, uint32."""
    x = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    x = (x + jnp.asarray(seed, jnp.uint32) * jnp.uint32(0x632BE5AB)) * jnp.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def _uniform(shape: tuple[int, ...], seed: Array | int) -> Array:
    """Float32 of mean 0 and variance 1."""
    return (_mixed(shape, seed) >> 8).astype(jnp.float32) * (math.sqrt(12) / 2**24) - math.sqrt(3)


def _array(config: ModelConfig, name: str, like: Any, seed: Array) -> Array:
    """A weight: of a size that leaves activations theirs; norms and biases are not trivial."""
    shape, dtype = like.shape, like.dtype
    if dtype == jnp.int8:
        return jnp.clip(_uniform(shape, seed) * 42, -127, 127).round().astype(dtype)
    if dtype == jnp.int32:
        return jax.lax.bitcast_convert_type(_mixed(shape, seed), jnp.int32)
    values = _uniform(shape, seed)
    if name.endswith("norm"):
        return (1 - config.norm_offset + 0.3 * values).astype(dtype)
    if name.endswith("bias"):
        return (0.3 * values).astype(dtype)
    if name.endswith("_scale"):
        return _scales(config, name.removesuffix("_scale"), shape, seed).astype(dtype)
    # An embedding much smaller than what a layer adds would hide a residual that is left out.
    return (values if name == "embed" else values / math.sqrt(shape[-1])).astype(dtype)


def _scales(config: ModelConfig, matrix: str, shape: tuple[int, ...], seed: Array) -> Array:
    """Scales by which weights have a row's size, and what stands beside them."""
    form = config.weights.quantized[matrix]
    values, inner = _uniform(shape, seed), config.matrices[matrix][1]
    size = 42 if form.bits == 8 else 4.6  # the integers' deviation
    scales = (1 + 0.2 * values) / (size * math.sqrt(inner))
    if form.bits == 8:
        return scales
    # Those of int4 may be negative.
    scales *= jnp.where(_mixed(shape, seed + 1) & 1 == 0, 1.0, -1.0)
    if form.offset is None:
        return scales
    number = (_mixed(shape, seed + 2) & 15).astype(jnp.float32)
    offset = number if form.offset == "zero" else -scales[..., :1] * number
    return jnp.where(jnp.arange(2) == 0, scales, offset)


def model_of(case: Case) -> tuple[Any, Any]:
    """The model in the parts that jit takes: its structure, and its arrays."""
    graph, state = nnx.split(_skeleton(case.config))
    flat = nnx.to_flat_state(state)

    @jax.jit
    def make(seed: Array) -> list[Array]:
        return [
            _array(case.config, str(path[-1]), param, seed + 101 * number)
            for number, (path, param) in enumerate(flat)
        ]

    arrays = make(np.uint32(case.seed))
    made = [(path, param.replace(array)) for (path, param), array in zip(flat, arrays, strict=True)]
    return graph, nnx.from_flat_state(made)


@functools.lru_cache(maxsize=4)
def _skeleton(config: ModelConfig) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))


def cache_of(case: Case, counters: np.ndarray) -> KVCache:
    """A cache of random keys and values, with these counters; NaN where nobody may read.

    Of several tokens they are those of its wide steps.
    """
    c, batch = case.config, len(case.lengths)
    shape = (c.num_layers, batch, c.num_kv_heads, case.capacity, c.head_dim)

    @jax.jit
    def make(seed: Array, lengths: Array) -> tuple[Array, Array]:
        live = jnp.arange(case.capacity)[:, None] < lengths[:, None, None, None]

        def filled(seed: Array) -> Array:
            return jnp.where(live, _uniform(shape, seed), jnp.nan).astype(jnp.bfloat16)

        return filled(seed), filled(seed + 1)

    lengths = jnp.array(case.lengths, jnp.int32)
    keys, values = make(np.uint32(case.seed + 7001), lengths)
    if case.tokens == 1:
        return KVCache(keys, values, lengths, jnp.asarray(counters))
    unused = jnp.zeros((exchange_words(step_dims(c, batch, case.capacity)),), jnp.int32)
    return KVCache(keys, values, lengths, unused, jnp.asarray(counters))


def tokens_of(case: Case) -> Array:
    """What is fed to kernel and reference alike, int32 `[STEPS, B]` or `[STEPS, B, T]`."""
    draw = np.random.default_rng(case.seed)
    shape = (STEPS, len(case.lengths)) + (() if case.tokens == 1 else (case.tokens,))
    return jnp.array(draw.integers(0, case.vocab, shape), jnp.int32)


def live_of(case: Case) -> np.ndarray:
    """How many tokens of each sequence count in each step, 1 to T: int32 `[STEPS, B]`."""
    draw = np.random.default_rng(case.seed + 1)
    return draw.integers(1, case.tokens + 1, (STEPS, len(case.lengths)), np.int32)
