"""The key/value cache: a preallocated pytree that decode steps update in place."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from ffjax.config import ModelConfig
from ffjax.dims import step_dims
from pallas_kernels.stream.mail import mail_words

__all__ = ["KVCache"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions seen so far, one row of S slots a sequence.

    Attributes:
        k: `[L, B, K, S, H]`, keys after RoPE, in the dtype of the weights.
        v: `[L, B, K, S, H]`, values.
        lengths: int32 `[B]`, live positions of each sequence. What lies beyond
            is never read, whatever it holds.
        counters: int32, what the fused kernels need to know from step to step: the
            phased one's counters, the streamed one's mail. All zero to begin with; they
            belong to this batch, and the reference passes them through.
    """

    k: Array
    v: Array
    lengths: Array
    counters: Array

    @classmethod
    def create(cls, config: ModelConfig, batch: int, capacity: int, dtype=jnp.bfloat16) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` positions each.

        Raises:
            ValueError: batch or capacity is not positive.
        """
        if batch < 1 or capacity < 1:
            raise ValueError(
                f"A cache needs a positive batch and capacity, got {batch} and {capacity}."
            )
        shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
        return cls(
            k=jnp.zeros(shape, dtype),
            v=jnp.zeros(shape, dtype),
            lengths=jnp.zeros((batch,), jnp.int32),
            counters=jnp.zeros((mail_words(step_dims(config, batch, capacity)),), jnp.int32),
        )

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        """S, the positions each sequence has room for."""
        return self.k.shape[3]
