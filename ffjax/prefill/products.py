"""Products of a chunk's tokens with a layer's matrix, for the packed prefill."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ffjax.config import ModelConfig
from ffjax.formats import WeightFormat
from ffjax.model import LayerAt, Product
from ffjax.packing import INPUTS_A_WORD, ZERO, planes
from ffjax.rounding import expand, grouped_weights
from pallas_kernels.gpu import INTERPRETER, Gpu
from pallas_kernels.prefill.product import MAX_TOKENS, can_read, multiply, tiling_for

__all__ = ["products_of"]


def products_of(config: ModelConfig, dtype: Any, stacked: dict[str, Array], gpu: Gpu) -> Product:
    """Products that are rounded to the model's dtype as they are written.

    They are summed in float32, as the reference's are, which rounds them in its next operation:
    the numbers are the same, and half of the bytes are never written. Where something is added
    before that rounding, a bias, they stay float32.

    Of few tokens, quantized matrices are multiplied by a kernel that reads the integers
    (`pallas_kernels.prefill.product`). Of many, and where weights are not quantized, cuBLAS
    multiplies; there one matrix of one layer exists as numbers at a time.

    Args:
        config: the model's.
        dtype: of its weights that are not quantized.
        stacked: arrays of all layers.
        gpu: what multiplies; `INTERPRETER`: a CPU, on which kernels are interpreted.
    """
    interpret = gpu == INTERPRETER

    def product(at: LayerAt, x: Array, name: str) -> Array:
        format = config.weights.quantized.get(name)
        result = jnp.float32 if name in config.biased else dtype
        if format is None:
            return _product(x, at.weights[name], dtype, result, interpret=interpret)
        scales, tokens = f"{name}_scale", x.shape[-2]
        few = tokens <= MAX_TOKENS[format.bits] and dtype == jnp.bfloat16
        if few and can_read(weight := stacked[name]):
            tiling = tiling_for(weight.shape[1], tokens, format.bits, gpu)
            args = x[0].astype(dtype), weight, stacked[scales], at.number, tiling
            how = {"dtype": result, "offset": format.offset, "interpret": interpret}
            return multiply(*args, **how)[None]
        weight, scale = at.weights[name], at.weights[scales]
        if format.group_size is None:
            # The row's scale comes after the sum: integers are exact in bfloat16, products are not.
            sums = _product(x, weight.astype(dtype), dtype, jnp.float32, interpret=interpret)
            return (sums * scale).astype(result)
        if format.bits == 8:
            return _product(
                x, expand(weight, scale, format, dtype), dtype, result, interpret=interpret
            )
        x, weight = _by_place(x), _expanded(weight, scale, format, dtype)
        return _product(x, weight, dtype, result, interpret=interpret)

    return product


def _product(x: Array, weight: Array, dtype: Any, result: Any, *, interpret: bool) -> Array:
    """`x[..., in] @ weight[out, in].T`, inputs of `dtype`."""
    x, written = x.astype(dtype), result
    if interpret:  # CPUs have no bfloat16 product of every shape
        x, weight, written = x.astype(jnp.float32), weight.astype(jnp.float32), jnp.float32
    # Without "highest" a GPU would round float32 operands to tf32.
    highest = lax.Precision.HIGHEST
    product = jnp.einsum(
        "...i,oi->...o", x, weight, precision=highest, preferred_element_type=written
    )
    return product.astype(result)


def _by_place(x: Array) -> Array:
    """Inputs `[..., in]` in the order of `_expanded`: by their place in a word, then by words."""
    eights = x.reshape(*x.shape[:-1], -1, INPUTS_A_WORD)
    return jnp.swapaxes(eights, -1, -2).reshape(x.shape)


def _expanded(words: Array, scale: Array, format: WeightFormat, dtype: Any) -> Array:
    """The matrix `[out, in]` of int4 `[out, in / 8]`, its inputs in the order of `_by_place`.

    Each place of all words is written in one go. Put back between their neighbours, the inputs
    would be written one by one, which takes longer than the product of a hundred tokens.
    """
    numbers = planes(words)  # [out, 8, in / 8]
    out, places, _ = numbers.shape
    groups = numbers.reshape(out, places, scale.shape[1], -1)
    if format.offset is None:
        weight = groups.astype(jnp.float32) * scale.astype(jnp.float32)[:, None, :, None]
    else:
        weight = grouped_weights(groups + jnp.int8(ZERO), scale[:, None], format)
    return weight.reshape(out, -1).astype(dtype)
