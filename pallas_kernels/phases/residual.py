"""The residual stream between blocks: what writes it and how its readers normalise it.

The writer of a residual stores three things: the float32 residual, its product with the
next norm's weights as a bfloat16 operand, and the sum of its squares. RMSNorm's division
by the root mean square is a factor of the whole vector, so readers apply it after their
mat-vec; the norm needs no pass and no synchronisation of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dims import ceil_div, next_power_of_2
from pallas_kernels.env import Env, Wait
from pallas_kernels.matvec import PREFETCH, RowStream
from pallas_kernels.plan import Tile
from pallas_kernels.program import iota

__all__ = [
    "add_to_residual",
    "residual_stream",
    "rms_scale",
    "store_operand",
    "store_residual",
]


def store_operand(ref, values: Array, rows: Array, depth: int, padded_batch: int) -> None:
    """Stores activations `[R, Bp]` of the elements `rows` `[R]` as part of an operand."""
    r, bp = values.shape
    element = jnp.broadcast_to(rows[:, None], (r, bp))
    row = lax.div(element, jnp.int32(depth)) * padded_batch + iota((r, bp), 1)
    column = lax.rem(element, jnp.int32(depth))
    plgpu.store(ref.at[row, column], values.astype(jnp.bfloat16))


def residual_stream(env: Env, weight: Any, layer: Array, tile: Tile, operand: Any) -> RowStream:
    """The mat-vec of a projection whose sums are added to the residual."""

    def rows_of(group):
        return group * tile.rows + iota((tile.rows,), 0)

    groups = env.dims.model_dim // tile.rows
    return RowStream(env, weight, layer, groups, rows_of, tile, operand)


def add_to_residual(
    env: Env, stream: RowStream, wait: Wait, norm_weight_of: Callable[[Array], Array]
) -> None:
    """x[b] += weight @ activations[b], and what the next norm's readers need of it.

    This program owns the same elements of the residual whenever it is written. They, and
    the norm's weights, are loaded before the wait.

    Args:
        env: the program's view.
        stream: from `residual_stream`.
        wait: waits for the activations.
        norm_weight_of: loads the weights of the norm that reads the residual next.
    """
    rows_in_group, bp = stream.tile.rows, env.plan.padded_batch
    owned = next_power_of_2(ceil_div(stream.groups, env.plan.programs))
    shape = (owned, rows_in_group, bp)
    element = stream.group(iota(shape, 0)) * rows_in_group + iota(shape, 1)
    b = iota(shape, 2)
    there = (element < env.dims.model_dim) & (b < env.dims.batch)
    residual = plgpu.load(env["x"].at[b, element], mask=there, other=0.0)
    plane = (owned, rows_in_group)
    element = stream.group(iota(plane, 0)) * rows_in_group + iota(plane, 1)
    norm = norm_weight_of(jnp.minimum(element, env.dims.model_dim - 1)).astype(jnp.float32)
    prefetched = stream.prefetch(PREFETCH)
    wait()

    def finish(j, group, sums, carry):
        x = jnp.sum(jnp.where(iota(shape, 0) == j, residual, 0.0), axis=0) + sums
        norm_weight = jnp.sum(jnp.where(iota(plane, 0) == j, norm, 0.0), axis=0)
        store_residual(env, group, stream.rows_of(group), x, norm_weight)
        return carry

    stream.run(finish, prefetched=prefetched)


def store_residual(env: Env, group: Array, rows: Array, x: Array, norm_weight: Array) -> None:
    """Stores the residual `[R, Bp]` of the elements `rows` and what readers derive from it.

    Args:
        env: the program's view.
        group: number of the group of rows.
        rows: int32 `[R]`.
        x: float32 `[R, Bp]`.
        norm_weight: `[R]`, weights of the norm that reads it next.
    """
    b = iota(x.shape, 1)
    element = jnp.broadcast_to(rows[:, None], x.shape)
    plgpu.store(env["x"].at[b, element], x, mask=b < env.dims.batch)
    weighted = x * norm_weight.astype(jnp.float32)[:, None]
    bp = env.plan.padded_batch
    store_operand(env["x_operand"], weighted, rows, env.plan.qkv.depth, bp)
    env["x_squares"][group, :] = jnp.sum(x * x, axis=0)


def rms_scale(env: Env) -> Array:
    """`1 / sqrt(mean(x²) + eps)` of each sequence's residual: float32 `[Bp]`."""
    groups = env.dims.model_dim // env.plan.down.rows
    shape = env["x_squares"].shape
    if shape[0] == groups:
        squares = env["x_squares"][...]
    else:
        squares = plgpu.load(env["x_squares"], mask=iota(shape, 0) < groups, other=0.0)
    return lax.rsqrt(jnp.sum(squares, axis=0) / env.dims.model_dim + env.dims.norm_eps)
