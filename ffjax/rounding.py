"""Rounds matrices to integers with scales, and multiplies them out again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from ffjax.formats import WeightFormat
from ffjax.packing import INPUTS_A_WORD, ZERO, pack, unpack

__all__ = [
    "all_finite",
    "as_stored",
    "best_scales",
    "expand",
    "grouped_weights",
    "in_groups",
    "nearest",
    "not_finite",
    "random_matrix",
    "round_matrix",
]

# int4: which integer the weight of largest magnitude in a group may become, before what lies
# beyond -8 to 7 is cut off. Negative: it becomes the one integer that has no counterpart, which
# is why scales have signs. On the shipped model in groups of 128, the best of these leaves 88% of
# the squared error that -8 alone does, and 68% of that of 7 alone.
_EXTREMES = (-8, -7.5, -7, -6.5, -8.5, -9, -9.5, -10, 7, 6.5, 6, 7.5, 8, 8.5)

# Parts of the range from a group's least weight to its largest one that its integers may cover.
_NARROWER = (1, 0.96, 0.92, 0.88, 0.84, 0.8)

# The least scale: a subnormal number is 0 to most devices. The largest product, which bfloat16
# can hold; and the largest scale of int8 whose products float32 can.
_LEAST = float(jnp.finfo(jnp.float32).tiny)
_LARGEST = float(jnp.finfo(jnp.bfloat16).max)
_LARGEST_INT8_SCALE = float(jnp.finfo(jnp.float32).max) / 127 * (1 - 2**-22)


def round_matrix(weight: Array, format: WeightFormat) -> tuple[Array, Array]:
    """The integers and scales that stand for a matrix.

    int8: the largest magnitude of a row, or group, becomes 127; no weight is off by more than
    half a scale.
    int4: of a group's scales that let its largest magnitude become one of several integers, the
    one of least squared error; a weight is off by more than half a scale only where it lies
    beyond the integers' range. With a second number, of several ranges from the group's least
    weight to its largest one and narrower, the one of least squared error. No scale but 0 is below
    2^-126, the least that arithmetic on devices knows (2^-14 of float16, whose smaller numbers
    have fewer bits), and no product beyond what the weights' dtypes can hold.

    Args:
        weight: `[out, in]`, finite.
        format: what to round to.

    Returns:
        Integers, int8 `[out, in]` or of int4 int32 `[out, in / 8]`; and scales, of the format's
        dtype and shape: `[out]`, `[out, in / group_size]` or `[out, in / group_size, 2]`.

    Raises:
        ValueError: the inputs are not whole groups.
    """
    if (reason := format.why_not(weight.shape[-1])) is not None:
        raise ValueError(reason)
    groups = in_groups(weight.astype(jnp.float32), format)
    scale = best_scales(groups, format)
    return as_stored(nearest(groups, scale, format), scale, format)


@jax.jit  # one program, that a large array's flags need not exist
def all_finite(array: Array) -> Array:
    """Whether all numbers of an array are finite, bool `[]`: those that can be rounded."""
    return jnp.isfinite(array).all()


def not_finite(what: str) -> ValueError:
    """The error of a matrix that cannot be rounded.

    Args:
        what: it is.
    """
    return ValueError(
        f"Integers stand for finite numbers only, and {what} holds others. Is the model damaged?"
    )


def in_groups(weight: Array, format: WeightFormat) -> Array:
    """`[..., in]` as `[..., n, group]`: the weights that share a scale; a whole row where n = 1."""
    size = weight.shape[-1] if format.group_size is None else format.group_size
    return weight.reshape(*weight.shape[:-1], -1, size)


def best_scales(groups: Array, format: WeightFormat, matters: Array | None = None) -> Array:
    """What `round_matrix` chooses for each group, float32 `[out, n]`, or `[out, n, 2]`; see there.

    Args:
        groups: float32 `[out, n, group]`, finite.
        format: what to round to.
        matters: float32 `[n, group]`: what the squared error of each weight is multiplied with, of
            int4; the largest is near 1. None: all are alike.
    """
    candidate, which = _candidates(groups, format)
    if len(which) == 1:
        return candidate(jnp.float32(which[0]))
    unit = _unit(jnp.abs(groups).max(axis=-1))

    def tried(best: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], None]:
        scale = candidate(x)
        made = grouped_weights(nearest(groups, scale, format), scale, format)
        square = jnp.square((groups - made) * unit)
        error = (square if matters is None else square * matters).sum(axis=-1)
        fits = (jnp.abs(made) <= _LARGEST).all(axis=-1)
        better = fits & (error < best[0])
        chosen = better if scale.ndim == better.ndim else better[..., None]
        return (jnp.where(better, error, best[0]), jnp.where(chosen, scale, best[1])), None

    shape = jax.eval_shape(candidate, jnp.float32(1)).shape
    start = jnp.full(groups.shape[:-1], jnp.inf), jnp.zeros(shape)
    # One candidate after the other, for the memory.
    (_, scale), _ = lax.scan(tried, start, jnp.array(which, jnp.float32))
    return scale


def nearest(groups: Array, scale: Array, format: WeightFormat) -> Array:
    """The integers, as they are stored, that stand for the numbers nearest to the weights.

    Args:
        groups: float32 `[..., n, group]`.
        scale: float32 `[..., n]`, with a second number `[..., n, 2]`.
        format: how they are stored.

    Returns:
        float32, whole numbers, the shape of the groups; 0 for what a scale of 0 stands for.
    """
    if format.bits == 8:
        return _nearest(groups, scale[..., None], -127, 127)
    if format.offset is None:
        return _nearest(groups, scale[..., None], -ZERO, 15 - ZERO) + ZERO
    step, second = scale[..., 0, None], scale[..., 1, None]
    if format.offset == "zero":
        return jnp.clip(_nearest(groups, step, -15, 15) + second, 0, 15)
    return _nearest(groups - second, step, 0, 15)


def as_stored(numbers: Array, scale: Array, format: WeightFormat) -> tuple[Array, Array]:
    """Integers `[out, n, group]` and scales as `round_matrix` returns them."""
    integers, scale = numbers.reshape(len(numbers), -1), scale.astype(format.scale_dtype)
    if format.group_size is None:
        scale = scale[:, 0]
    return pack(integers) if format.bits == 4 else integers.astype(jnp.int8), scale


def expand(integers: Array, scale: Array, format: WeightFormat, dtype) -> Array:
    """The matrix that integers and scales stand for: their products, and minima added to them.

    Args:
        integers: `[..., out, in]`, or packed `[..., out, in / 8]`.
        scale: `[..., out]`, or `[..., out, in / group_size]`, or with a second number of each
            group `[..., out, in / group_size, 2]`.
        format: how they are stored.
        dtype: to which the weights are rounded, once they are computed in float32; there all
            products of groups are exact, a scale of 11 bits at most times an integer of 9, and
            what a minimum is added to is rounded once.

    Returns:
        `[..., out, in]`.
    """
    if format.group_size is None:
        weight = integers.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]
        return _rounded(weight, dtype).astype(dtype)
    numbers = unpack(integers) if format.bits == 4 else integers
    grouped = numbers.reshape(*numbers.shape[:-1], -1, format.group_size)
    weight = grouped_weights(grouped, scale, format)
    return _rounded(weight.reshape(numbers.shape), dtype).astype(dtype)


def grouped_weights(integers: Array, scale: Array, format: WeightFormat) -> Array:
    """What the integers of groups stand for.

    Args:
        integers: `[..., in / group_size, group_size]`: of int4 0 to 15, of int8 themselves.
        scale: `[..., in / group_size]`, or with a second number `[..., in / group_size, 2]`.
        format: how they are stored; one that has groups.

    Returns:
        float32, the shape of the integers.
    """
    numbers, scale = integers.astype(jnp.float32), scale.astype(jnp.float32)
    if format.offset is None:
        zero = ZERO if format.bits == 4 else 0
        return (numbers - zero) * scale[..., None]
    scale, second = scale[..., 0, None], scale[..., 1, None]
    if format.offset == "zero":
        return (numbers - second) * scale
    return numbers * scale + second


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
    dtype = jnp.dtype(format.scale_dtype)
    groups = () if format.group_size is None else (inputs // format.group_size,)
    signs = 1.0
    if format.bits == 8:
        integers = jax.random.randint(rngs.params(), shape, -127, 128, jnp.int8)
        deviation = math.sqrt((255**2 - 1) / 12)
    else:
        words = jax.random.bits(rngs.params(), (*rows, inputs // INPUTS_A_WORD), jnp.uint32)
        integers = lax.bitcast_convert_type(words, jnp.int32)
        deviation = math.sqrt((16**2 - 1) / 12)
        # -8 to 7 average -1/2, which scales of both signs hide.
        signs = jax.random.rademacher(rngs.params(), (*rows, *groups), jnp.float32)
    second = None
    if format.offset is not None:  # integers of 4 to 11 stand for 0
        second = jax.random.randint(rngs.params(), (*rows, *groups), 4, 12).astype(jnp.float32)
        deviation = math.sqrt(deviation**2 + (8**2 - 1) / 12)
    spread = jax.random.uniform(rngs.params(), (*rows, *groups), minval=0.5, maxval=1.5)
    scale = signs * spread / (deviation * math.sqrt(inputs))
    if second is not None:
        second = second if format.offset == "zero" else -second * scale
        scale = jnp.stack([scale, second], axis=-1)
    return integers, scale.astype(dtype)


def _nearest(weight: Array, scale: Array, least: int, most: int) -> Array:
    """The integers nearest to weight / scale, float32; 0 where the scale is 0."""
    return jnp.clip(jnp.round(weight / jnp.where(scale == 0, 1, scale)), least, most)


def _no_less(scale: Array, largest: Array, least: float | None = None) -> Array:
    """The scale, or the least there is with its sign: 0 stands for a largest magnitude of 0 alone.

    Devices take anything smaller for 0.
    """
    bound = _LEAST if least is None else least
    smallest = jnp.where(scale < 0, -bound, bound)
    return jnp.where((largest != 0) & (jnp.abs(scale) < bound), smallest, scale)


def _held(scale: Array, largest: Array, dtype: Any) -> Array:
    """The scale as the dtype holds it, float32; `_no_less` says what becomes of the least ones."""
    info = jnp.finfo(dtype)
    scale = jnp.clip(_rounded(scale, dtype), float(info.min), float(info.max))
    return _no_less(scale, largest, max(float(info.tiny), _LEAST))


def _unit(largest: Array) -> Array:
    """In units of which errors are compared: a power of two near the largest magnitude, inverted.

    Squares of what is far from 1 are infinite or 0; in such units nothing else changes.
    """
    exponent = jnp.clip(jnp.frexp(largest)[1], -125, 126)[..., None]
    return jnp.ldexp(jnp.float32(1), -exponent)


_Candidates = tuple[Callable[[Array], Array], tuple[float, ...]]


def _candidates(groups: Array, format: WeightFormat) -> _Candidates:
    """Scales of `[out, n, group]` as a function of a number, and the numbers to try."""
    if format.bits == 4:
        return _ranges(groups, format) if format.offset else _extremes(groups, format)
    largest = jnp.abs(groups).max(axis=-1)
    if format.group_size is not None:
        return lambda x: _held(largest / x, largest, jnp.dtype(format.scale_dtype)), (127,)
    return lambda x: jnp.minimum(_no_less(largest / x, largest), _LARGEST_INT8_SCALE), (127,)


def _extremes(groups: Array, format: WeightFormat) -> _Candidates:
    """Those of int4 without a second number: which integer the largest magnitude becomes."""
    at = jnp.abs(groups).argmax(axis=-1, keepdims=True)
    largest = jnp.take_along_axis(groups, at, axis=-1)[..., 0]
    return lambda x: _held(largest / x, largest, jnp.dtype(format.scale_dtype)), _EXTREMES


def _ranges(groups: Array, format: WeightFormat) -> _Candidates:
    """Those of int4 with a second number: which part of the group's range is covered."""
    least, most = groups.min(axis=-1), groups.max(axis=-1)
    dtype = jnp.dtype(format.scale_dtype)
    if format.offset == "zero":  # whose range has 0 in it
        least, most = jnp.minimum(least, 0), jnp.maximum(most, 0)

    def candidate(narrower: Array) -> Array:
        low, high = least * narrower, most * narrower
        scale = _held(high / 15 - low / 15, high - low, dtype)
        if format.offset == "zero":
            second = jnp.clip(jnp.round(-low / jnp.where(scale == 0, 1, scale)), 0, 15)
        else:
            second = jnp.clip(_rounded(low, dtype), -_most(dtype), _most(dtype))
        return jnp.stack([scale, second], axis=-1)

    return candidate, _NARROWER


def _most(dtype: Any) -> float:
    return float(jnp.finfo(dtype).max)


def _rounded(x: Array, dtype) -> Array:
    """float32 rounded to what `dtype` can hold. XLA may leave out a cast there and back."""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
