"""The sizes of one fused decode step, and the arrays it is given."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["DecodeWeights", "Dims", "ceil_div", "next_power_of_2"]


def ceil_div(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


class DecodeWeights(NamedTuple):
    """The weights as the model stores them, and the rotary frequencies.

    A tied head is passed as the embedding once more: the same buffer.

    Attributes:
        embed: `[V, D]`.
        attn_norm: `[L, D]`.
        qkv: `[L, (N + 2K) * H, D]`.
        attn_out: `[L, D, N * H]`.
        mlp_norm: `[L, D]`.
        gate_up: `[L, 2F, D]`.
        down: `[L, D, F]`.
        final_norm: `[D]`.
        head: `[V, D]`.
        inv_freq: float32 `[H/2]`, radians a position.
    """

    embed: Array
    attn_norm: Array
    qkv: Array
    attn_out: Array
    mlp_norm: Array
    gate_up: Array
    down: Array
    final_norm: Array
    head: Array
    inv_freq: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dims:
    """Sizes known when the kernel is traced. Letters as in every shape of ffjax.

    Attributes:
        batch: B, the sequences of a step.
        vocab_size: V.
        num_layers: L.
        model_dim: D.
        ffw_dim: F.
        num_heads: N, query heads.
        num_kv_heads: K.
        head_dim: H.
        capacity: S, cache slots a sequence.
        norm_eps: added to the mean square in RMSNorm.
    """

    batch: int
    vocab_size: int
    num_layers: int
    model_dim: int
    ffw_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    capacity: int
    norm_eps: float

    @property
    def q_per_kv(self) -> int:
        """G, the query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def attn_dim(self) -> int:
        """N * H, the width of the attention's output."""
        return self.num_heads * self.head_dim

    @property
    def qkv_dim(self) -> int:
        """(N + 2K) * H, the rows of the fused projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @classmethod
    def of(cls, weights: DecodeWeights, k: Any, norm_eps: float) -> Dims:
        """Reads the sizes off the weights and the key cache `[L, B, K, S, H]`."""
        num_layers, batch, num_kv_heads, capacity, head_dim = k.shape
        vocab_size, model_dim = weights.embed.shape
        return cls(
            batch=batch,
            vocab_size=vocab_size,
            num_layers=num_layers,
            model_dim=model_dim,
            ffw_dim=weights.down.shape[-1],
            num_heads=weights.attn_out.shape[-1] // head_dim,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            capacity=capacity,
            norm_eps=norm_eps,
        )

    def abstract_weights(self, dtype=jnp.bfloat16) -> DecodeWeights:
        """The weights' shapes and dtypes, for tracing without arrays."""
        d, f, n_layers = self.model_dim, self.ffw_dim, self.num_layers

        def spec(*shape: int, dtype=dtype) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype)

        return DecodeWeights(
            embed=spec(self.vocab_size, d),
            attn_norm=spec(n_layers, d),
            qkv=spec(n_layers, self.qkv_dim, d),
            attn_out=spec(n_layers, d, self.attn_dim),
            mlp_norm=spec(n_layers, d),
            gate_up=spec(n_layers, 2 * f, d),
            down=spec(n_layers, d, f),
            final_norm=spec(d),
            head=spec(self.vocab_size, d),
            inv_freq=spec(self.head_dim // 2, dtype=jnp.float32),
        )
