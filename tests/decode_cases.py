"""What the decode tests start from: a random model, a cache in the middle of its life."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.decode import decode_weights
from ffjax.dims import step_dims
from ffjax.formats import WeightFormat
from ffjax.model import Transformer
from ffjax.packing import INPUTS_A_WORD
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
    """A model whose weights are all random, as large as `Transformer` draws them.

    Norms of ones would hide a norm mistaken for another, and biases of zero one left out; an
    embedding much smaller than what a layer adds to it, a residual that is left out. On a CPU numpy
    draws them, since XLA compiles a program for each configuration; a GPU draws its own.
    """
    if jax.default_backend() != "cpu":
        return _random_model(config, seed)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten_with_path(state)
    specs = {_name(path): leaf for path, leaf in leaves}
    draw, arrays = np.random.default_rng(seed), dict[str, np.ndarray]()
    for name, spec in specs.items():
        shape = spec.shape
        if name in arrays:  # with the integers that it belongs to
            continue
        if f"{name}_scale" in specs:
            weights = config.weights
            format = weights.head if name == "head" else weights.quantized[name]
            assert format is not None
            arrays[name], arrays[f"{name}_scale"] = _random_integers(draw, shape, format)
        elif name.endswith(("norm", "bias")):
            middle = 0 if name.endswith("bias") else 1 - config.norm_offset
            arrays[name] = middle + draw.uniform(-0.5, 0.5, shape)
        else:
            scale = 1 if name == "embed" else 1 / math.sqrt(shape[-1])
            arrays[name] = draw.standard_normal(shape, np.float32) * scale
    values = [jnp.asarray(arrays[name].astype(spec.dtype)) for name, spec in specs.items()]
    return nnx.merge(graph, jax.tree.unflatten(tree, values))


def _random_model(config: ModelConfig, seed: int) -> Transformer:
    """One of other numbers, drawn where it is."""

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


def _name(path: tuple[Any, ...]) -> str:
    """An attribute's name, of its path."""
    return [str(key.key) for key in path if hasattr(key, "key")][-1]


def _random_integers(
    draw: np.random.Generator, shape: tuple[int, ...], format: WeightFormat
) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales as `ffjax.rounding.random_matrix` draws them."""
    *rows, inputs = shape
    signs: Any = 1
    if format.bits == 8:
        integers, deviation = draw.integers(-127, 128, shape, np.int8), math.sqrt((255**2 - 1) / 12)
    else:
        integers = draw.integers(-(2**31), 2**31, shape, np.int32)
        inputs, deviation = inputs * INPUTS_A_WORD, math.sqrt((16**2 - 1) / 12)
    groups = () if format.group_size is None else (inputs // format.group_size,)
    scales = (*rows, *groups)
    if format.bits == 4:
        signs = draw.choice([-1, 1], scales)
    second = None
    if format.offset is not None:
        second, deviation = draw.integers(4, 12, scales), math.sqrt(deviation**2 + (8**2 - 1) / 12)
    scale = signs * draw.uniform(0.5, 1.5, scales) / (deviation * math.sqrt(inputs))
    if second is not None:
        scale = np.stack([scale, second if format.offset == "zero" else -second * scale], axis=-1)
    return integers, scale


def filled_cache(
    config: ModelConfig,
    lengths: Sequence[int],
    capacity: int,
    dead: float = math.nan,
    tokens: int = 1,
) -> KVCache:
    """A cache with random keys and values; slots beyond the live ones hold `dead`.

    On a CPU they are numpy's: see `random_model`.
    """
    if jax.default_backend() != "cpu":
        return _filled_cache(config, jnp.array(lengths, jnp.int32), capacity, dead, tokens)
    shape = functools.partial(KVCache.create, config, len(lengths), capacity, tokens=tokens)
    empty = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), jax.eval_shape(shape))
    live = np.arange(capacity)[:, None] < np.reshape(lengths, (-1, 1, 1, 1))
    draw = np.random.default_rng(3)
    key, value = (
        np.where(live, draw.standard_normal(empty.k.shape, np.float32), np.float32(dead))
        for _ in range(2)
    )
    return dataclasses.replace(
        empty,
        k=jnp.asarray(key, jnp.bfloat16),
        v=jnp.asarray(value, jnp.bfloat16),
        lengths=jnp.asarray(lengths, jnp.int32),
    )


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
    if jax.default_backend() != "cpu":
        return jax.random.randint(jax.random.key(seed), shape, 0, config.vocab_size)
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape, np.int32))


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
