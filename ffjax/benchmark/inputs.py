"""What a benchmark starts from: random weights, and a cache in the middle of its life."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.model import Transformer
from pallas_kernels.dims import ceil_div

__all__ = [
    "capacity_for",
    "first_tokens",
    "random_model",
    "random_prompts",
    "scale_logits",
    "started_cache",
]

# Capacities are multiples of this. XLA cuts a long sum over slots into up to 16 parts of a
# multiple of 16 each, and copies the whole cache of a layer to pad it where that does not come
# out even: the baseline of llama3.1-8b did so with 16064 slots and not with 16128.
_CAPACITY_STEP = 256


def capacity_for(position: int, steps: int, tokens: int = 1) -> int:
    """S, just above what `steps` steps of T tokens from `position` on need, one position apart.

    The baseline attends over the whole capacity, so that a generous one would slow it down. Its
    local layers have a smaller one, made by the same rule.
    """
    return ceil_div(position + steps + tokens - 1, _CAPACITY_STEP) * _CAPACITY_STEP


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A bfloat16 model with random weights, made on the device by one program.

    Quantized matrices are drawn as integers and scales: of none is there a bfloat16 one first.
    Matrices are normal with standard deviation 1/sqrt(in), the embedding too, so that the
    next token is not simply the last one again. Norms scale by 0.5 to 1.5, evenly drawn, and
    biases are normal with standard deviation 0.1: a step that leaves one out is found out.
    """

    @nnx.jit
    def make() -> Transformer:
        model = Transformer(config, rngs=nnx.Rngs(seed))
        rngs = nnx.Rngs(seed + 1)
        vectors = {**vars(model.layers), "final_norm": model.final_norm}
        for name, param in vectors.items():
            if name.endswith("norm"):
                noise = jax.random.uniform(rngs.params(), param[...].shape, minval=-0.5, maxval=0.5)
                param[...] += noise.astype(model.dtype)
            elif name.endswith("bias"):
                noise = 0.1 * jax.random.normal(rngs.params(), param[...].shape)
                param[...] = noise.astype(model.dtype)
        noise = jax.random.normal(rngs.params(), model.embed[...].shape, model.dtype)
        model.embed[...] = noise * jnp.asarray(1 / math.sqrt(config.model_dim), model.dtype)
        return model

    return make()


def scale_logits(model: Transformer, factor: float) -> None:
    """Makes a model's logits `factor` times as large, by its last norm, in place.

    Where logits are capped, that is what they are before the cap.
    """
    offset = model.config.norm_offset
    scaled = (model.final_norm[...].astype(jnp.float32) + offset) * factor - offset
    model.final_norm[...] = scaled.astype(model.dtype)


def started_cache(
    config: ModelConfig, batch: int, position: int, capacity: int, seed: int = 0, tokens: int = 1
) -> KVCache:
    """A bfloat16 cache whose sequences all have `position` live positions, made on the device.

    Live keys and values are standard normal. Beyond them everything is NaN: whoever reads
    what is not live yet has NaN logits. The same arguments give the same cache.

    Args:
        config: the model's.
        batch: B.
        position: live positions of every sequence, 0 to S.
        capacity: S.
        seed: of the keys and values.
        tokens: T, of each sequence, that steps take.
    """
    return _started_cache(config, batch, position, capacity, tokens, jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _started_cache(
    config: ModelConfig, batch: int, position: int, capacity: int, tokens: int, key: Array
) -> KVCache:
    empty = KVCache.create(config, batch, capacity, tokens=tokens)
    live = jnp.arange(capacity)[:, None] < position  # [S, 1]
    k, v = (
        jnp.where(live, jax.random.normal(part, empty.k.shape, empty.k.dtype), jnp.nan)
        for part in jax.random.split(key)
    )
    return dataclasses.replace(empty, k=k, v=v, lengths=jnp.full((batch,), position, jnp.int32))


def first_tokens(config: ModelConfig, batch: int, seed: int = 0, tokens: int = 1) -> Array:
    """Random token ids to begin with, int32 `[B]`, or `[B, T]`; those of a batch differ."""
    shape = (batch,) if tokens == 1 else (batch, tokens)
    return jax.random.randint(jax.random.key(seed), shape, 0, config.vocab_size, jnp.int32)


def random_prompts(config: ModelConfig, lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Prompts of random token ids, int32 `[n]` for each length n."""
    rng = np.random.default_rng(seed)
    return [rng.integers(config.vocab_size, size=n, dtype=np.int32) for n in lengths]
