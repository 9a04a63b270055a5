"""The residual stream between blocks: what writes it and how its readers normalise it.

The writer of a residual stores three things: the float32 residual, its product with the
next norm's weights as a bfloat16 operand, and the sum of its squares. RMSNorm's division
by the root mean square is a factor of the whole vector, so readers apply it after their
mat-vec; the norm needs no pass and no synchronisation of its own.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.env import Env
from pallas_kernels.matvec import iota

__all__ = ["load_residual", "rms_scale", "store_operand", "store_residual"]


def store_operand(ref, values: Array, rows: Array, depth: int, padded_batch: int) -> None:
    """Stores activations `[R, Bp]` of the elements `rows` `[R]` as part of an operand."""
    r, bp = values.shape
    element = jnp.broadcast_to(rows[:, None], (r, bp))
    row = lax.div(element, jnp.int32(depth)) * padded_batch + iota((r, bp), 1)
    column = lax.rem(element, jnp.int32(depth))
    plgpu.store(ref.at[row, column], values.astype(jnp.bfloat16))


def load_residual(env: Env, rows: Array) -> Array:
    """The residual of the elements `rows` `[R]`: float32 `[R, Bp]`, 0 in padding columns."""
    shape = (rows.shape[0], env.plan.padded_batch)
    b = iota(shape, 1)
    element = jnp.broadcast_to(rows[:, None], shape)
    return plgpu.load(env["x"].at[b, element], mask=b < env.dims.batch, other=0.0)


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
