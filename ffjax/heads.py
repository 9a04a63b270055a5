"""Heads of a size that the fused kernel has not, made wider by elements that are zero."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ffjax.config import ModelConfig
from ffjax.model import Transformer
from ffjax.settings import own_settings
from pallas_kernels.support import HEAD_DIMS

__all__ = ["widen_heads", "widened_config"]


def widened_config(config: ModelConfig, head_dim: int | None = None) -> ModelConfig:
    """The configuration of a model whose heads have more elements, the new ones zero.

    Args:
        config: of the model before.
        head_dim: H, elements of a head; None: the least that the fused kernel has.

    Raises:
        ValueError: heads are as large already, or the size is odd or larger than the kernel's.
        NotImplementedError: matrices are quantized, or heads are normed.
    """
    c = config
    if head_dim is None:
        head_dim = next((size for size in HEAD_DIMS if size > c.head_dim), None)
    if head_dim is None or head_dim <= c.head_dim or head_dim % 2:
        raise ValueError(
            f"Heads are made wider, to an even number of elements: those of {c.name} have "
            f"{c.head_dim}, got {head_dim}. The fused kernel has heads of "
            f"{', '.join(map(str, HEAD_DIMS))}."
        )
    if c.weights.quantized:
        raise NotImplementedError(
            f"Heads are made wider before matrices are quantized; those of {c.name} are "
            f"({c.weights}). Start from the model that they were made of."
        )
    if c.qk_norm is not None:
        raise NotImplementedError(
            f"The queries and keys of {c.name} are normed (qk_norm={c.qk_norm!r}), and a norm "
            "counts the new elements. Use the model as it is, with implementation='xla'."
        )
    return dataclasses.replace(
        c,
        head_dim=head_dim,
        rotary_pairs=c.head_dim // 2 if c.rotary_pairs is None else c.rotary_pairs,
        attn_scale=1 / math.sqrt(c.head_dim) if c.attn_scale is None else c.attn_scale,
    )


@own_settings()
def widen_heads(model: Transformer, head_dim: int | None = None) -> Transformer:
    """The same model with wider heads, for the fused kernel: it has 32, 64, 128 and 256 elements.

    The new elements of queries, keys and values are zero, whatever a model is fed, and the output
    projection has zeros for them. So logits are the same but for the order of sums. Phi 3 mini's
    heads of 96 become 128: its layers' weights take 11% more bytes, and its cache a third more.

    Args:
        model: the model. What is not widened is shared with the one that is returned.
        head_dim: H, elements of a head; None: the least of the kernel's that is larger.

    Returns:
        A model like any other: `ffjax.save` keeps it, and `ffjax.quantize` takes it.

    Raises:
        ValueError: heads are as large already, or the size is odd or larger than the kernel's.
        NotImplementedError: matrices are quantized, or queries and keys are normed.
    """
    old, new = model.config, widened_config(model.config, head_dim)

    def wide_rows(rows: Array) -> Array:
        """`[L, heads * H, ...]` with zeros after each half of a head."""
        layers, _, *rest = rows.shape
        halves = rows.reshape(layers, -1, 2, old.head_dim // 2, *rest)
        room = [(0, 0)] * halves.ndim
        room[3] = (0, (new.head_dim - old.head_dim) // 2)
        return jnp.pad(halves, room).reshape(layers, -1, *rest)

    def wide_columns(matrix: Array) -> Array:
        return jnp.swapaxes(wide_rows(jnp.swapaxes(matrix, 1, 2)), 1, 2)

    change = {"qkv": wide_rows, "qkv_bias": wide_rows, "attn_out": wide_columns}
    graph, state = nnx.split(model)
    made = nnx.merge(graph, state)
    made.config = new
    for name, widen in change.items():
        if (param := getattr(made.layers, name, None)) is not None:
            setattr(made.layers, name, nnx.Param(jax.jit(widen)(param[...])))
    return made
