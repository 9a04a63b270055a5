"""GPTQ (Frantar et al., arXiv 2210.17323): rounds a matrix with the errors already made in mind.

A matrix W `[out, in]` takes inputs X whose sums of products H = X X^T, `[in, in]`, are known. Its
inputs are rounded one after the other, and what the rounding of one leaves is made up for by the
weights of those still to come, such that ||(W - Q) X||^2 is least. With H^-1 = U^T U, U upper
triangular, an input i that is off by e takes e * U[i, j] / U[i, i] from each later weight j: the
paper's equation 3, in the form of its algorithm 1.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import solve_triangular

from ffjax.formats import WeightFormat
from ffjax.rounding import (
    as_stored,
    best_scales,
    grouped_weights,
    in_groups,
    nearest,
)

__all__ = ["BLOCK", "Factor", "Order", "factor", "round_calibrated", "shifted"]

BLOCK = 128
"""Inputs whose errors reach those after them in one product: the paper's lazy updates."""

Order = Literal["stored", "largest"]
"""In which order inputs are rounded: as they are stored, or those first that matter most."""

_HIGHEST = lax.Precision.HIGHEST
# Of the most that an input counts. Not 0: where a group has no other inputs, its scale is theirs.
_NEXT_TO_NOTHING = 1e-12


class Factor(NamedTuple):
    """What a matrix needs to know of its inputs.

    Attributes:
        upper: U of H^-1 = U^T U, H being damped, its inputs in order: upper triangular, float32
            `[in, in]`.
        order: which input is rounded when: int32 `[in]`; None: as they are stored.
        unit: float32, what H was divided by before.
        matters: float32 `[in]`, in the same order: how much the squared error of each input counts
            that later ones cannot make up for, 1 / U[i, i]^2. An input that was 0 all along counts
            next to nothing, where others are.
        sound: bool, whether float32 has such a U.
    """

    upper: Array
    order: Array | None
    unit: Array
    matters: Array
    sound: Array


def factor(hessian: Array, dampening: Array | float, order: Order = "stored") -> Factor:
    """Decomposes the inverse of the sums of products of a matrix's inputs.

    H = R R^T with R upper triangular, a Cholesky decomposition from the last input to the first,
    and U = R^-1. H itself is never inverted: errors grow with the square root of its condition,
    which dampening holds below in / dampening, so that float32 does.

    Args:
        hessian: H, the sums of products of inputs, float32 `[in, in]`. An input that was 0 all
            along has zeros there: it makes up for nothing, and its weights are rounded as they are.
        dampening: this part of the mean of the diagonal is added to the diagonal.
        order: "largest": inputs with the largest sum of squares come first.

    Returns:
        The factor; see `sound` there.
    """
    places = jnp.argsort(-jnp.diagonal(hessian)) if order == "largest" else None
    if places is not None:
        hessian = hessian[places][:, places]
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    damped = diagonal + dampening * jnp.mean(diagonal)
    # A diagonal of equal numbers becomes exactly 1: there is nothing to choose between inputs.
    unit = jnp.where(dead.all(), 1, damped.max())
    eye = jnp.eye(len(hessian), dtype=jnp.float32)
    scaled = jnp.where(eye == 1, jnp.where(dead, 1, damped / unit), hessian / unit)
    lower = lax.linalg.cholesky(scaled[::-1, ::-1], symmetrize_input=False)
    upper = solve_triangular(lower[::-1, ::-1], eye, lower=False)
    matters = 1 / jnp.square(jnp.diagonal(upper))
    matters = jnp.where(dead & ~dead.all(), _NEXT_TO_NOTHING * matters.max(), matters)
    return Factor(upper, places, unit, matters, jnp.isfinite(upper).all())


def shifted(weight: Array, missed: Array, made: Factor) -> Array:
    """The weights that come nearest to W X', X' being what inputs X were without any rounding.

    W' = W + W (X' - X) X^T H^-1, the least squares of ||W' X - W X'||: GPTAQ (Li et al., arXiv
    2504.02692) in closed form, before any weight is rounded.

    Args:
        weight: W `[out, in]`.
        missed: (X' - X) X^T, float32 `[in, in]`.
        made: of X X^T, damped.

    Returns:
        float32 `[out, in]`.
    """
    weight = weight.astype(jnp.float32)
    product = functools.partial(jnp.matmul, precision=_HIGHEST)
    change = product(weight, missed / made.unit)
    if made.order is not None:
        change = change[:, made.order]
    change = product(product(change, made.upper.T), made.upper)
    return weight + _in_place(change.T, made).T


class _Made(NamedTuple):
    """What was made of the inputs of a block, or of a group.

    Attributes:
        numbers: their integers, float32 `[n, out]`.
        errors: what their weights are off by, over U[i, i], float32 `[n, out]`.
    """

    numbers: Array
    errors: Array


def _columns(block: Array, upper: Array, scales: Array, format: WeightFormat) -> _Made:
    """Rounds inputs one after the other.

    Args:
        block: their weights, float32 `[n, out]`.
        upper: U of these inputs, `[n, n]`.
        scales: of each, float32 `[n, out]`, with a second number `[n, out, 2]`.
        format: what to round to.
    """

    def one(left: Array, at: tuple[Array, Array, Array]) -> tuple[Array, _Made]:
        i, row, scale = at
        weight = lax.dynamic_index_in_dim(left, i, keepdims=False)[:, None]  # [out, 1]
        number = nearest(weight, scale, format)
        error = ((weight - grouped_weights(number, scale, format)) / row[i])[:, 0]
        # U is 0 for those that were rounded before.
        return left - row[:, None] * error, _Made(number[:, 0], error)

    _, made = lax.scan(one, block, (jnp.arange(len(block)), upper, scales))
    return made


def _groups(
    block: Array, upper: Array, matters: Array, format: WeightFormat
) -> tuple[_Made, Array]:
    """Rounds the groups of a block, each with the scale that is best when its turn comes.

    Args:
        block: the weights, float32 `[n, out]`.
        upper: U of these inputs, `[n, n]`.
        matters: of these, `[n]`; see `Factor`.
        format: what to round to.

    Returns:
        What was made of the block, and the scales `[n / group, out]`, or `[n / group, out, 2]`.
    """
    size = format.group_size
    assert size is not None

    def one(left: Array, at: tuple[Array, Array, Array]) -> tuple[Array, tuple[_Made, Array]]:
        k, rows, matters = at
        group = lax.dynamic_slice_in_dim(left, k * size, size)
        own = lax.dynamic_slice_in_dim(rows, k * size, size, axis=1)
        scale = best_scales(group.T[:, None], format, matters[None])[:, 0]
        made = _columns(group, own, jnp.broadcast_to(scale, (size, *scale.shape)), format)
        return left - _spread(rows, made.errors), (made, scale)

    rows = upper.reshape(-1, size, len(block))
    each = jnp.arange(len(rows)), rows, matters.reshape(-1, size)
    _, (made, scales) = lax.scan(one, block, each)
    return _Made(*(x.reshape(block.shape) for x in made)), scales


def _spread(upper: Array, errors: Array) -> Array:
    """What errors `[i, out]` take from the weights `[j, out]`, given U `[i, j]`."""
    return jnp.einsum("ij,io->jo", upper, errors, precision=_HIGHEST)


def round_calibrated(weight: Array, made: Factor, format: WeightFormat) -> tuple[Array, Array]:
    """The integers and scales that stand for a matrix, given what it is multiplied with.

    Each scale is the one of `round_matrix`'s candidates that leaves the least error, each input's
    counted by what later inputs cannot make up for, 1 / U[i, i]^2. Where inputs are rounded in
    another order than they are stored, and of int8 with a scale a row, scales are those of the
    weights as they are given; else those of a group as the groups before have left it.

    Args:
        weight: `[out, in]`, finite.
        made: of the sums of products of its inputs.
        format: what to round to; inputs are whole groups.

    Returns:
        Integers and scales, as `round_matrix` does. Where U is the identity, exactly what it does.
    """
    out, inputs = weight.shape
    weight, size = weight.astype(jnp.float32), format.group_size or inputs
    blocks = -(-inputs // BLOCK)
    more = blocks * BLOCK - inputs  # inputs after the others, whose weights are 0
    behind = jnp.diag((jnp.arange(blocks * BLOCK) >= inputs).astype(jnp.float32))
    rows = (jnp.pad(made.upper, (0, more)) + behind).reshape(blocks, BLOCK, -1)
    matters = jnp.pad(made.matters, (0, more), constant_values=1).reshape(blocks, BLOCK)
    left, each, scales = weight.T, None, None
    if made.order is not None or format.group_size is None:
        stored = _in_place(made.matters, made).reshape(-1, size)
        scales = best_scales(in_groups(weight, format), format, stored)
        each = jnp.repeat(scales.swapaxes(0, 1), size, axis=0)  # of each input
        if made.order is not None:
            left, each = left[made.order], each[made.order]
        each = jnp.pad(each, [(0, more), *[(0, 0)] * (each.ndim - 1)])
        each = each.reshape(blocks, BLOCK, *each.shape[1:])

    def block(
        left: Array, at: tuple[Array, Array, Array, Array | None]
    ) -> tuple[Array, tuple[Array, Array | None]]:
        k, rows, matters, each = at
        here = lax.dynamic_slice_in_dim(left, k * BLOCK, BLOCK)
        own = lax.dynamic_slice_in_dim(rows, k * BLOCK, BLOCK, axis=1)
        if each is None:
            made, found = _groups(here, own, matters, format)
        else:
            made, found = _columns(here, own, each, format), None
        return left - _spread(rows, made.errors), (made.numbers, found)

    start = jnp.pad(left, ((0, more), (0, 0)))
    _, (numbers, found) = lax.scan(block, start, (jnp.arange(blocks), rows, matters, each))
    if found is not None:
        scales = found.reshape(-1, *found.shape[2:])[: inputs // size].swapaxes(0, 1)
    numbers = _in_place(numbers.reshape(-1, out)[:inputs], made)
    assert scales is not None
    return as_stored(in_groups(numbers.T, format), scales, format)


def _in_place(of_inputs: Array, made: Factor) -> Array:
    """`[in, ...]`, in the order in which inputs are rounded, as they are stored."""
    if made.order is None:
        return of_inputs
    return jnp.zeros_like(of_inputs).at[made.order].set(of_inputs)
