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
from pallas_kernels.stream.exchange_layout import exchange_words

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
        counters: int32, what programs of the fused kernel exchange, from step to step. All
            zero to begin with; they belong to this batch, and the reference passes them through.
        wide_counters: the same for steps of several tokens a sequence; None where the cache was not
            made for any.
    """

    k: Array
    v: Array
    lengths: Array
    counters: Array
    wide_counters: Array | None = None

    @classmethod
    @own_settings()
    def create(
        cls,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: Any = jnp.bfloat16,
        *,
        tokens: int = 1,
    ) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` positions each.

        Args:
            config: the model's.
            batch: B; a fused step takes up to 8.
            capacity: S, positions for a prompt and what follows it.
            dtype: of keys and values: the model's.
            tokens: T: fused steps with this cache take one token of each sequence, or T.

        Returns:
            The cache, on the default device; it takes `4 * L * B * K * S * H` bytes in bfloat16.

        Raises:
            ValueError: batch, capacity or tokens is not positive.
        """
        if batch < 1 or capacity < 1:
            raise ValueError(
                f"A cache needs a positive batch and capacity, got {batch} and {capacity}."
            )
        if tokens < 1:
            raise ValueError(f"A step takes 1 token of a sequence or more, got tokens={tokens}.")
        shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
        words = exchange_words(step_dims(config, batch, capacity))
        wide = exchange_words(step_dims(config, batch, capacity, tokens)) if tokens > 1 else None
        return _zeros(shape, jnp.dtype(dtype), words, wide)

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        """S, the positions each sequence has room for."""
        return self.k.shape[3]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _zeros(shape: tuple[int, ...], dtype: Any, words: int, wide: int | None) -> KVCache:
    """One program, where each array would be two of its own: that counts when a process starts."""
    return KVCache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        lengths=jnp.zeros(shape[1:2], jnp.int32),
        counters=jnp.zeros((words,), jnp.int32),
        wide_counters=None if wide is None else jnp.zeros((wide,), jnp.int32),
    )


_MAKE = "Make the cache with KVCache.create(model.config, batch, capacity, model.dtype)."


def _dtype(array: Any) -> Any:
    """The dtype of an array; of anything else, as a list, the name of its kind."""
    return getattr(array, "dtype", None) or type(array).__name__


def check_cache(cache: KVCache, config: ModelConfig, dtype: Any, tokens: int = 1) -> None:
    """Refuses a cache that was not made for this model.

    Shapes and dtypes are always known. Lengths are looked at where they are no tracers; on a
    device, this waits for them.

    Args:
        cache: the cache.
        config: the model's.
        dtype: of the model's weights.
        tokens: T, of each sequence, of a step that needs the cache's counters.

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
    batch, words = keys[1], exchange_words(step_dims(c, keys[1], keys[3]))
    arrays: list[tuple[str, Any, tuple[int, ...]]] = [
        ("lengths", cache.lengths, (batch,)),
        ("counters", cache.counters, (words,)),
    ]
    if tokens > 1:
        wide = exchange_words(step_dims(c, batch, keys[3], tokens))
        found = None if cache.wide_counters is None else np.shape(cache.wide_counters)
        if found != (wide,):
            made = "for steps of one token" if found is None else "for another number of tokens"
            raise ValueError(
                f"A fused step of {tokens} tokens of each of {batch} sequences needs a cache made "
                f"for it; this one is made {made}. Make it with KVCache.create("
                f"model.config, batch, capacity, model.dtype, tokens={tokens})."
            )
        arrays.append(("wide_counters", cache.wide_counters, (wide,)))
    for name, array, shape in arrays:
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
