"""What the decode tests start from: a random model, a cache in the middle of its life."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.decode import decode_weights
from ffjax.dims import step_dims
from ffjax.model import Transformer
from pallas_kernels.dims import Dims
from pallas_kernels.launch import StepState

__all__ = [
    "QUICK_COMPILE",
    "dims_of",
    "filled_cache",
    "kernel_inputs",
    "random_model",
    "random_tokens",
    "small_config",
]


# For what runs once or twice: LLVM's optimisations would take longer than they save.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


def small_config(**sizes) -> ModelConfig:
    """A configuration of two layers whose sizes are no powers of two."""
    defaults = {
        "vocab_size": 101,
        "num_layers": 2,
        "model_dim": 144,
        "ffw_dim": 208,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 64,
        # Far from a rounding error, so that a kernel with another one is found out.
        "norm_eps": 1e-2,
    }
    return ModelConfig(**(defaults | sizes))


@functools.cache
def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model whose weights are all random.

    Norms of ones would hide a norm mistaken for another, and biases of zero one left out; an
    embedding much smaller than what a layer adds to it, a residual that is left out.
    """

    @nnx.jit  # one program to compile instead of one an array
    def make() -> Transformer:
        model = Transformer(config, rngs=nnx.Rngs(seed))
        vectors = {
            name: param
            for name, param in sorted(vars(model.layers).items())
            if name.endswith(("norm", "bias"))
        }
        vectors["final_norm"] = model.final_norm
        keys = iter(jax.random.split(jax.random.key(seed + 1), len(vectors) + 1))
        for name, param in vectors.items():
            noise = jax.random.uniform(next(keys), param[...].shape, minval=-0.5, maxval=0.5)
            middle = 0 if name.endswith("bias") else 1 - config.norm_offset
            param[...] = (middle + noise).astype(model.dtype)
        model.embed[...] = jax.random.normal(next(keys), model.embed[...].shape, model.dtype)
        return model

    return make()


def filled_cache(
    config: ModelConfig,
    lengths: Sequence[int],
    capacity: int,
    dead: float = math.nan,
    tokens: int = 1,
) -> KVCache:
    """A cache with random keys and values; slots beyond the live ones hold `dead`."""
    return _filled_cache(config, jnp.array(lengths, jnp.int32), capacity, dead, tokens)


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _filled_cache(
    config: ModelConfig, lengths: jax.Array, capacity: int, dead: float, tokens: int
) -> KVCache:
    empty = KVCache.create(config, lengths.shape[0], capacity, tokens=tokens)
    live = jnp.arange(capacity)[:, None] < lengths[:, None, None, None]
    key, value = (
        jnp.where(live, jax.random.normal(k, empty.k.shape, jnp.bfloat16), dead)
        for k in jax.random.split(jax.random.key(3))
    )
    return dataclasses.replace(empty, k=key, v=value, lengths=lengths)


def random_tokens(config: ModelConfig, batch: int, seed: int = 1, tokens: int = 1) -> jax.Array:
    """Token ids, int32 `[B]`, or `[B, T]`."""
    shape = (batch,) if tokens == 1 else (batch, tokens)
    return jax.random.randint(jax.random.key(seed), shape, 0, config.vocab_size)


def dims_of(config: ModelConfig, batch: int, capacity: int, tokens: int = 1) -> Dims:
    """The kernel's sizes for a step of this model."""
    return step_dims(config, batch, capacity, tokens)


def kernel_inputs(model: Transformer, cache: KVCache, tokens: int = 1):
    """Weights and state as `stream_step` takes them."""
    counters = cache.counters if tokens == 1 else cache.wide_counters
    assert counters is not None
    return decode_weights(model, cache.capacity), StepState(
        cache.k, cache.v, cache.lengths, counters
    )
