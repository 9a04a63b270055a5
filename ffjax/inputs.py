"""What the reference model is given: token ids or embeddings, and a cache that they go into."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from ffjax.cache import KVCache, check_cache
from ffjax.config import ModelConfig

__all__ = ["checked_inputs", "checked_layers", "checked_store", "checked_tokens"]


def checked_tokens(tokens: Any) -> Array:
    """Token ids int `[B, T]`.

    Raises:
        ValueError: they are not `[B, T]`.
        TypeError: they are not integers.
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2:
        raise ValueError(f"Tokens come as [B, T], got shape {tokens.shape}.{_hint(tokens)}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"Tokens are integers, got {tokens.dtype}.")
    return tokens


def _hint(tokens: Array) -> str:
    if tokens.ndim != 3 or not jnp.issubdtype(tokens.dtype, jnp.floating):
        return ""
    return " Embeddings go into model.last_hidden_state(embeddings, ..)."


def checked_inputs(inputs: Any, config: ModelConfig) -> Array:
    """Token ids int `[B, T]`, or embeddings float32 `[B, T, D]`.

    Args:
        inputs: the ids, or embeddings of any floating dtype.
        config: the model's.

    Raises:
        ValueError: the shape is neither.
        TypeError: the dtype does not go with the shape.
    """
    inputs = jnp.asarray(inputs)
    if jnp.issubdtype(inputs.dtype, jnp.integer) and inputs.ndim == 2:
        return inputs
    if inputs.ndim != 3 or inputs.shape[2] != config.model_dim:
        raise ValueError(
            f"Inputs of {config.name} are token ids int [B, T] or embeddings float [B, T, D] of "
            f"D = {config.model_dim}, got {inputs.dtype} of shape {inputs.shape}."
        )
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise TypeError(
            f"Embeddings are floating-point numbers, got {inputs.dtype}. "
            "model.embedded(tokens) makes them of token ids."
        )
    return inputs.astype(jnp.float32)


def checked_layers(layers: Any, config: ModelConfig, *, some: bool = True) -> tuple[int, ...]:
    """Layers whose hidden states are asked for.

    Args:
        layers: their numbers, 0 to L, each once; 0 is the embedding.
        config: the model's.
        some: whether there has to be one.

    Raises:
        ValueError: there is no such layer, one is named twice, or none is named.
        TypeError: they are no sequence of integers, or traced.
    """
    rule = f"Hidden states are those after layers 1 to {config.num_layers} of {config.name}, or 0"
    if any(isinstance(layer, Tracer) for layer in jax.tree.leaves(layers)):
        raise TypeError(
            f"{rule}, the embedding: numbers that a program is compiled for; got traced ones. Bind "
            "them by functools.partial, or name them in static_argnames."
        )
    if not isinstance(layers, Sequence | np.ndarray) or isinstance(layers, str | bytes):
        raise TypeError(f"{rule}, the embedding: a sequence of integers; got {layers!r}.")
    try:
        chosen = tuple(operator.index(layer) for layer in layers)
    except TypeError:
        raise TypeError(f"{rule}, the embedding: a sequence of integers; got {layers!r}.") from None
    if some and not chosen:
        raise ValueError(f"{rule}, the embedding, at least one of them; got none.")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"{rule}, the embedding, each named once; got {list(chosen)}.")
    if wrong := [layer for layer in chosen if not 0 <= layer <= config.num_layers]:
        raise ValueError(f"{rule}, the embedding; got {wrong[0]}.")
    return chosen


def checked_store(
    inputs: Array, cache: KVCache | None, num_tokens: Any, config: ModelConfig, dtype: Any
) -> KVCache:
    """The cache that inputs `[B, T, ..]` go into: the one given, or one that just holds them.

    Args:
        inputs: token ids or embeddings.
        cache: the cache, or None.
        num_tokens: how many of each row count, or None.
        config: the model's.
        dtype: of the model's weights.

    Raises:
        ValueError: the cache has another batch, is another model's, or, where it is no tracer, has
            a negative length; there is padding and no cache.
        TypeError: the cache has other dtypes.
    """
    batch, count = inputs.shape[:2]
    if cache is None:
        if num_tokens is not None:
            raise ValueError("num_tokens marks padding for a cache; without a cache leave it out.")
        return KVCache.create(config, batch, count, dtype)
    if cache.batch != batch:
        what = "tokens" if inputs.ndim == 2 else "embeddings"
        raise ValueError(f"The cache holds {cache.batch} sequences, got {what} for {batch}.")
    check_cache(cache, config, dtype)
    return cache
