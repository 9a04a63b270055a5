"""The key/value cache: a preallocated pytree that decode steps update in place."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from ffjax.config import ModelConfig
from ffjax.dims import step_dims
from ffjax.settings import own_settings
from pallas_kernels.stream.mail import mail_words

__all__ = ["KVCache", "check_cache"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions seen so far, one row of S slots a sequence.

    Attributes:
        k: `[L, B, K, S, H]`, keys after RoPE, in the dtype of the weights.
        v: `[L, B, K, S, H]`, values.
        lengths: int32 `[B]`, live positions of each sequence. What lies beyond
            is never read, whatever it holds. They are 0 or more; in a jitted step, where
            nobody can look, a smaller one counts as 0.
        counters: int32, what the fused kernel needs to know from step to step: its mail. All
            zero to begin with; they belong to this batch, and the reference passes them through.
    """

    k: Array
    v: Array
    lengths: Array
    counters: Array

    @classmethod
    @own_settings()
    def create(
        cls, config: ModelConfig, batch: int, capacity: int, dtype: Any = jnp.bfloat16
    ) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` positions each.

        Args:
            config: the model's.
            batch: B; a fused step takes up to 8.
            capacity: S, positions for a prompt and what follows it.
            dtype: of keys and values: the model's.

        Returns:
            The cache, on the default device; it takes `4 * L * B * K * S * H` bytes in bfloat16.

        Raises:
            ValueError: batch or capacity is not positive.
        """
        if batch < 1 or capacity < 1:
            raise ValueError(
                f"A cache needs a positive batch and capacity, got {batch} and {capacity}."
            )
        shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
        return _zeros(shape, jnp.dtype(dtype), mail_words(step_dims(config, batch, capacity)))

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        """S, the positions each sequence has room for."""
        return self.k.shape[3]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: Any, words: int) -> KVCache:
    """One program, where each array would be two of its own: that counts when a process starts."""
    return KVCache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        lengths=jnp.zeros(shape[1:2], jnp.int32),
        counters=jnp.zeros((words,), jnp.int32),
    )


_MAKE = "Make the cache with KVCache.create(model.config, batch, capacity, model.dtype)."


def _dtype(array: Any) -> Any:
    """The dtype of an array; of anything else, as a list, the name of its kind."""
    return getattr(array, "dtype", None) or type(array).__name__


def check_cache(cache: KVCache, config: ModelConfig, dtype: Any) -> None:
    """Refuses a cache that was not made for this model.

    Shapes and dtypes are always known. Lengths are looked at where they are no tracers; on a
    device, this waits for them.

    Args:
        cache: the cache.
        config: the model's.
        dtype: of the model's weights.

    Raises:
        ValueError: a shape is another model's, or a length is negative.
        TypeError: a dtype is another.
    """
    c, keys = config, np.shape(cache.k)
    if len(keys) != 5 or (keys[0], keys[2], keys[4]) != (c.num_layers, c.num_kv_heads, c.head_dim):
        raise ValueError(
            f"The cache of {c.name} holds keys [layers, batch, key heads, capacity, head size] = "
            f"[{c.num_layers}, B, {c.num_kv_heads}, S, {c.head_dim}]; got {list(keys)}. {_MAKE}"
        )
    if (values := np.shape(cache.v)) != keys:
        raise ValueError(
            f"A cache holds as many values as keys, {list(keys)}; got values {list(values)}. "
            f"{_MAKE}"
        )
    for stored in (cache.k, cache.v):
        if (found := _dtype(stored)) != dtype:
            raise TypeError(f"Cache and weights share a dtype, got {found} and {dtype}. {_MAKE}")
    batch, words = keys[1], mail_words(step_dims(c, keys[1], keys[3]))
    for name, array, shape in (
        ("lengths", cache.lengths, (batch,)),
        ("counters", cache.counters, (words,)),
    ):
        if np.shape(array) != shape:
            raise ValueError(
                f"The cache of {c.name} for {batch} sequences has {name} of shape {list(shape)}; "
                f"got {list(np.shape(array))}. {_MAKE}"
            )
        if (found := _dtype(array)) != jnp.int32:
            raise TypeError(f"A cache's {name} are int32, got {found}. {_MAKE}")
    traced = isinstance(cache.lengths, Tracer)
    if not traced and getattr(cache.lengths, "is_fully_addressable", True):
        lengths = np.asarray(cache.lengths)
        if negative := np.flatnonzero(lengths < 0).tolist():
            raise ValueError(
                f"Lengths of a cache are 0 or more, got {int(lengths[negative[0]])} for sequence "
                f"{negative[0]}. A sequence begins at 0."
            )
