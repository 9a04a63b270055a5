"""Rounds matrices to integers with scales, and multiplies them out again."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from ffjax.formats import WeightFormat
from ffjax.packing import INPUTS_A_WORD, ZERO, pack, unpack

__all__ = ["expand", "random_matrix", "round_matrix"]

# int4: which integer the weight of largest magnitude in a group may become, before what lies
# beyond -8 to 7 is cut off. Negative: it becomes the one integer that has no counterpart, which
# is why scales have signs. On the shipped model in groups of 128, the best of these leaves 88% of
# the squared error that -8 alone does, and 68% of that of 7 alone.
_EXTREMES = (-8, -7.5, -7, -6.5, -8.5, -9, -9.5, -10, 7, 6.5, 6, 7.5, 8, 8.5)

# The least scale: a subnormal number is 0 to most devices. The largest product, which bfloat16
# can hold; and the largest scale of int8 whose products float32 can.
_LEAST = float(jnp.finfo(jnp.float32).tiny)
_LARGEST = float(jnp.finfo(jnp.bfloat16).max)
_LARGEST_INT8_SCALE = float(jnp.finfo(jnp.float32).max) / 127 * (1 - 2**-22)


def round_matrix(weight: Array, format: WeightFormat) -> tuple[Array, Array]:
    """The integers and scales that stand for a matrix.

    int8: the largest magnitude of a row becomes 127; no weight is off by more than half a scale.
    int4: of a group's scales that let its largest magnitude become one of several integers, the
    one of least squared error; a weight is off by more than half a scale only where it lies
    beyond the integers' range. No scale but 0 is below 2^-126, the least that arithmetic on
    devices knows, and no product beyond what the weights' dtypes can hold.

    Args:
        weight: `[out, in]`, finite.
        format: what to round to.

    Returns:
        Of int8, int8 `[out, in]` and float32 `[out]`; of int4, int32 `[out, in / 8]` and
        bfloat16 `[out, in / group_size]`.

    Raises:
        ValueError: the inputs are not whole groups.
    """
    if (reason := format.why_not(weight.shape[-1])) is not None:
        raise ValueError(reason)
    weight = weight.astype(jnp.float32)
    if format.group_size is None:
        largest = jnp.abs(weight).max(axis=-1)
        scale = jnp.minimum(_no_less(largest / 127, largest), _LARGEST_INT8_SCALE)
        integers = _nearest(weight, scale[..., None], -127, 127)
        return integers.astype(jnp.int8), scale
    groups = weight.reshape(weight.shape[0], -1, format.group_size)  # [out, in / group, group]
    scale = _least_error(groups)
    integers = _nearest(groups, scale[..., None], -ZERO, 15 - ZERO) + ZERO
    return pack(integers.reshape(weight.shape)), scale.astype(jnp.bfloat16)


def expand(integers: Array, scale: Array, format: WeightFormat, dtype) -> Array:
    """The matrix that integers and scales stand for: their products.

    Args:
        integers: `[..., out, in]`, or packed `[..., out, in / 8]`.
        scale: `[..., out]`, or `[..., out, in / group_size]`.
        format: how they are stored.
        dtype: to which the products are rounded, once they are computed in float32; there
            those of int4 are exact, a scale of 8 bits times an integer of 4.

    Returns:
        `[..., out, in]`.
    """
    scale = scale.astype(jnp.float32)
    if format.group_size is None:
        weight = integers.astype(jnp.float32) * scale[..., None]
    else:
        numbers = (unpack(integers) - jnp.int8(ZERO)).astype(jnp.float32)
        groups = numbers.reshape(*scale.shape, format.group_size)
        weight = (groups * scale[..., None]).reshape(numbers.shape)
    return _rounded(weight, dtype).astype(dtype)


def random_matrix(
    rngs: nnx.Rngs, shape: tuple[int, ...], format: WeightFormat
) -> tuple[Array, Array]:
    """Random integers and scales, whose products have a standard deviation of about 1/sqrt(in).

    Integers are drawn evenly, scales within half of their mean to either side: a step that
    takes another row's scale is found out.

    Args:
        rngs: drawn from as "params".
        shape: `[..., out, in]`.
        format: what to make.

    Returns:
        Integers and scales, as `round_matrix` does.
    """
    *rows, inputs = shape
    if format.group_size is None:
        integers = jax.random.randint(rngs.params(), shape, -127, 128, jnp.int8)
        deviation, groups, dtype = math.sqrt((255**2 - 1) / 12), (), jnp.float32
        signs = 1.0
    else:
        words = jax.random.bits(rngs.params(), (*rows, inputs // INPUTS_A_WORD), jnp.uint32)
        integers = lax.bitcast_convert_type(words, jnp.int32)
        deviation, groups = math.sqrt((16**2 - 1) / 12), (inputs // format.group_size,)
        dtype = jnp.bfloat16
        # -8 to 7 average -1/2, which scales of both signs hide.
        signs = jax.random.rademacher(rngs.params(), (*rows, *groups), jnp.float32)
    spread = jax.random.uniform(rngs.params(), (*rows, *groups), minval=0.5, maxval=1.5)
    scale = signs * spread / (deviation * math.sqrt(inputs))
    return integers, scale.astype(dtype)


def _nearest(weight: Array, scale: Array, least: int, most: int) -> Array:
    """The integers nearest to weight / scale, float32; 0 where the scale is 0."""
    return jnp.clip(jnp.round(weight / jnp.where(scale == 0, 1, scale)), least, most)


def _no_less(scale: Array, largest: Array) -> Array:
    """The scale, or the least there is with its sign: 0 stands for a largest magnitude of 0 alone.

    Devices take anything smaller for 0.
    """
    least = jnp.where(scale < 0, -_LEAST, _LEAST)
    return jnp.where((largest != 0) & (jnp.abs(scale) < _LEAST), least, scale)


def _least_error(groups: Array) -> Array:
    """The best scale of each of `[out, n, group]`: float32 `[out, n]` that bfloat16 can hold."""
    at = jnp.abs(groups).argmax(axis=-1, keepdims=True)
    largest = jnp.take_along_axis(groups, at, axis=-1)[..., 0]
    # Squares of what is far from 1 are infinite or 0: errors are compared in units of a power of
    # two near the largest magnitude, in which nothing else changes.
    exponent = jnp.clip(jnp.frexp(largest)[1], -125, 126)[..., None]
    unit = jnp.ldexp(jnp.float32(1), -exponent)

    def tried(best: tuple[Array, Array], extreme: Array) -> tuple[tuple[Array, Array], None]:
        scale = _no_less(_rounded(largest / extreme, jnp.bfloat16), largest)
        product = _nearest(groups, scale[..., None], -ZERO, 15 - ZERO) * scale[..., None]
        fits = (jnp.abs(product) <= _LARGEST).all(axis=-1)
        error = jnp.square((groups - product) * unit).sum(axis=-1)
        better = fits & (error < best[0])
        return (jnp.where(better, error, best[0]), jnp.where(better, scale, best[1])), None

    start = jnp.full(largest.shape, jnp.inf), jnp.zeros(largest.shape)
    (_, scale), _ = lax.scan(tried, start, jnp.array(_EXTREMES, jnp.float32))
    return scale


def _rounded(x: Array, dtype) -> Array:
    """float32 rounded to what `dtype` can hold. XLA may leave out a cast there and back."""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
