"""Products of many tokens with a layer's matrix, for the packed prefill."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from ffjax.config import ModelConfig
from ffjax.model import LayerAt, Product
from ffjax.rounding import expand

__all__ = ["rounded_products"]


def rounded_products(config: ModelConfig, dtype) -> Product:
    """Products that are rounded to the model's dtype as they are written.

    They are summed in float32, as the reference's are, which rounds them in its next operation:
    the numbers are the same, and half of the bytes are never written. Where something is added or
    multiplied before that rounding, a bias or the scales of int8 rows, they stay float32.

    Args:
        config: the model's.
        dtype: of its weights.
    """

    def product(at: LayerAt, x: Array, name: str) -> Array:
        weight, scale = at.weights[name], at.weights.get(f"{name}_scale")
        format = config.weights.quantized.get(name)
        whole = jnp.float32 if name == "qkv" and config.qkv_bias else dtype
        if format is not None and scale is not None:
            if format.group_size is None:
                return _product(x, weight.astype(dtype), dtype, jnp.float32) * scale
            weight = expand(weight, scale, format, dtype)
        return _product(x, weight, dtype, whole)

    return product


def _product(x: Array, weight: Array, dtype, result) -> Array:
    """`x[..., in] @ weight[out, in].T`, inputs of `dtype`."""
    return jnp.einsum(
        "...i,oi->...o",
        x.astype(dtype),
        weight,
        # Without "highest" a GPU would round float32 operands to tf32.
        precision=lax.Precision.HIGHEST,
        preferred_element_type=result,
    )
