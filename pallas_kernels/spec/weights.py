"""The weights of one layer as numbers: what integers and scales stand for."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.dims import WORD_SHIFTS, DecodeWeights
from pallas_kernels.stream.plan import Segment, StreamPlan

__all__ = ["bias_of", "matrix_of", "norm_weight", "product"]


def matrix_of(plan: StreamPlan, weights: DecodeWeights, segment: Segment, layer: Array) -> Array:
    """The segment's matrix in a layer, float32 `[out, in]`; the head's in any.

    int8: a scale a row, or one a group of inputs, times the integer. int4: of 0 to 15, less 8 or
    less the group's zero point, times the group's scale; or times the scale plus its minimum.
    """
    stored, name = plan.segments[segment].stored, segment.name.lower()
    integers = _at(getattr(weights, name), segment, layer)
    if stored.bits == 16:
        return integers.astype(jnp.float32)
    if stored.bits == 4:
        integers = (integers[..., None] >> jnp.array(WORD_SHIFTS)) & 15
        integers = integers.reshape(integers.shape[0], -1)
    numbers = integers.astype(jnp.float32)
    scale = _at(getattr(weights, f"{name}_scale"), segment, layer).astype(jnp.float32)
    if (groups := stored.groups) is None:
        return numbers * scale[:, None]
    scale = jnp.repeat(scale, groups.size, axis=1)  # `[out, in]`, or `[out, in, 2]`
    if groups.offset == "minimum":
        return numbers * scale[..., 0] + scale[..., 1]
    if groups.offset == "zero":
        return (numbers - scale[..., 1]) * scale[..., 0]
    return (numbers - (8 if stored.bits == 4 else 0)) * scale


def product(inputs: Array, matrix: Array) -> Array:
    """`inputs [C, in]` times `matrix [out, in]`, summed in float32: `[C, out]`."""
    return jnp.einsum("ci,oi->co", inputs, matrix, precision="highest")


def norm_weight(
    plan: StreamPlan, weights: DecodeWeights, name: str, layer: Array | None = None
) -> Array | None:
    """What a norm multiplies by, float32 `[D]` or `[H]`; None where the model has no such norm."""
    norm = getattr(weights, name)
    if norm is None:
        return None
    norm = norm if layer is None else norm[layer]
    return norm.astype(jnp.float32) + plan.dims.features.norm_offset


def bias_of(weights: DecodeWeights, name: str, layer: Array) -> Array | float:
    """A projection's bias in a layer, float32 `[out]`; 0 where it has none."""
    bias = getattr(weights, name)
    return 0.0 if bias is None else bias[layer].astype(jnp.float32)


def _at(array: Array, segment: Segment, layer: Array) -> Array:
    return array if segment == Segment.HEAD else array[layer]
