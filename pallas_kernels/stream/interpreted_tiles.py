"""What a tile's copies would bring, for interpret mode: weights times their scales."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.stream import access
from pallas_kernels.stream.descriptors import read_descriptor, scales_of, weights_of
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.plan import Segment, SegmentPlan

__all__ = ["read_tile"]


def read_tile(
    env: StreamEnv, index: Array, part: SegmentPlan, places: Array, inputs: Array
) -> Array:
    """What would lie in the slot of the program's `index`-th tile, for interpret mode.

    Args:
        env: the program's view.
        index: int32 scalar.
        part: the segment's plan, or that of another of the same kind.
        places: int32, bytes from the slot's beginning on.
        inputs: int32, the same shape: inputs from the beginning of a tile's row.

    Returns:
        Weights, float32, times their scales, the same shape; 0 where no copy goes.
    """
    descriptor, layer = read_descriptor(env, index)
    copy = jnp.minimum(lax.div(places, descriptor.pitch), jnp.maximum(descriptor.copies, 1) - 1)
    within = places - copy * descriptor.pitch
    there = (within < descriptor.size) & (descriptor.copies > 0)
    at = (descriptor.begin.low + copy * descriptor.stride) * part.copied + lax.div(
        8 * within, part.bits
    )
    if part.bits == 4:  # a byte holds two
        at += inputs & 1

    def reader(segment: Segment) -> Callable[[], Array]:
        def read():
            if env.segment(segment).bits != part.bits:
                return jnp.zeros(at.shape, jnp.float32)
            return _dequantized(env, segment, layer, at, there)

        return read

    return lax.switch(descriptor.begin.high, [reader(s) for s in sorted(env.plan.segments)])


def _dequantized(env: StreamEnv, segment: Segment, layer: Array, at: Array, there: Array) -> Array:
    """Elements of a layer's matrix, counted as if it were flat."""
    part, ref = env.segment(segment), weights_of(env)[segment]
    inner = jnp.int32(part.inner)
    safe = jnp.clip(at, 0, ref.shape[-2] * part.inner - 1)
    before = () if len(ref.shape) == 2 else (jnp.clip(layer, 0, ref.shape[0] - 1),)
    row, column = lax.div(safe, inner), lax.rem(safe, inner)
    words = lax.div(column, jnp.int32(8)) if part.bits == 4 else column
    weights = access.load(ref.at[(*before, row, words)], mask=there, other=0)
    if part.bits == 16:
        return weights.astype(jnp.float32)
    scales = scales_of(env, segment)
    if (groups := part.grouping) is None:
        return weights.astype(jnp.float32) * access.load(scales.at[(*before, row)])
    at_group = (*before, row, lax.div(column, jnp.int32(groups.size)))

    def number(*which: int) -> Array:
        return access.load(scales.at[(*at_group, *which)]).astype(jnp.float32)

    if part.bits == 8:
        return jnp.where(there, weights.astype(jnp.float32) * number(), 0.0)
    place = column & 7
    # Where in a word of eight each lies: see `ffjax.packing`.
    shift = 4 * (lax.shift_right_logical(place, 1) + 4 * (place & 1))
    integers = (lax.shift_right_logical(weights, shift) & 15).astype(jnp.float32)
    if groups.offset is None:
        made = (integers - 8) * number()
    elif groups.offset == "zero":
        made = (integers - number(1)) * number(0)
    else:
        made = integers * number(0) + number(1)
    return jnp.where(there, made, 0.0)
