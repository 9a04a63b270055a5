"""Streams a weight matrix through tensor cores against a few activation vectors.

The scheme is `plan`'s: a tile of 8 rows is multiplied as a `[64, depth]` matrix by the
operand's `[8 * Bp, depth]` chunks, and the diagonal of the product is summed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.env import Env
from pallas_kernels.plan import Tile

__all__ = ["iota", "stream_rows"]


def iota(shape: tuple[int, ...], axis: int) -> Array:
    """int32 indices along `axis`."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _load_weights(ref: Any, layer: Array | None, rows: Array, block: Array, tile: Tile) -> Array:
    """The tile of the given rows `[R]` as `[R * chunks, depth]`; zero beyond the inputs."""
    shape = (tile.rows * tile.chunks, tile.depth)
    chunk = lax.rem(iota(shape, 0), jnp.int32(tile.chunks))
    column = block * tile.span + chunk * tile.depth + iota(shape, 1)
    row = jnp.broadcast_to(rows[:, None], (tile.rows, tile.chunks)).reshape(-1)
    row = jnp.broadcast_to(row[:, None], shape)
    view = ref.at[row, column] if layer is None else ref.at[layer, row, column]
    if not tile.ragged:
        return plgpu.load(view)
    return plgpu.load(view, mask=column < tile.inner, other=0.0)


def _load_operand(ref: Any, block: Array, tile: Tile, padded_batch: int) -> Array:
    """The operand of one block of inputs, `[chunks * Bp, depth]`; zero beyond the inputs."""
    count = tile.chunks * padded_batch
    view = ref.at[pl.ds(block * count, count), :]
    if not tile.ragged:
        return plgpu.load(view)
    shape = (count, tile.depth)
    chunk = lax.div(iota(shape, 0), jnp.int32(padded_batch))
    column = block * tile.span + chunk * tile.depth + iota(shape, 1)
    return plgpu.load(view, mask=column < tile.inner, other=0.0)


def _sum_diagonal(product: Array, tile: Tile, padded_batch: int) -> Array:
    """Sums each row's chunks against their own activations: `[R * C, C * Bp]` to `[R, Bp]`."""
    chunk_of_row = lax.rem(iota(product.shape, 0), jnp.int32(tile.chunks))
    chunk_of_column = lax.div(iota(product.shape, 1), jnp.int32(padded_batch))
    # A select, not a product with a mask: what lies off the diagonal may be NaN.
    wanted = jnp.where(chunk_of_row == chunk_of_column, product, 0.0)
    m = tile.rows * tile.chunks
    per_chunk = wanted.reshape(m, tile.chunks, padded_batch).sum(axis=1)
    return per_chunk.reshape(tile.rows, tile.chunks, padded_batch).sum(axis=1)


def stream_rows(
    env: Env,
    *,
    weight: Any,
    layer: Array | None,
    groups: int,
    rows_of: Callable[[Array], Array],
    tile: Tile,
    operand: Any,
    finish: Callable[[Array, Array, Any], Any],
    carry: Any = (),
) -> Any:
    """Computes this program's share of `weight @ activations`, 8 rows at a time.

    Args:
        env: the program's view.
        weight: ref `[L, out, in]`, or `[out, in]` with layer None.
        layer: int32 scalar, or None.
        groups: how many groups of rows there are.
        rows_of: maps a group's number to its row numbers, int32 `[R]`.
        tile: the tile's shape.
        operand: ref of the operand buffer (see `scratch`).
        finish: called as `finish(group, sums, carry)` with float32 `[R, Bp]` sums;
            stores them and returns the next carry.
        carry: what the first `finish` gets.

    Returns:
        The last carry.
    """
    bp = env.plan.padded_batch
    first, step = env.program, env.plan.programs
    mine = env.share(groups)

    if tile.blocks == 1:
        # The one operand block stays in registers for the whole loop.
        vectors = _load_operand(operand, jnp.int32(0), tile, bp)

        def group_step(j, carry):
            group = first + j * step
            weights = _load_weights(weight, layer, rows_of(group), jnp.int32(0), tile)
            product = env.dot(weights, vectors, transpose_b=True)
            return finish(group, _sum_diagonal(product, tile, bp), carry)

        return lax.fori_loop(jnp.int32(0), mine, group_step, carry)

    blocks = jnp.int32(tile.blocks)

    def block_step(i, state):
        partial, carry = state
        j = lax.div(i, blocks)
        block = i - j * blocks
        group = first + j * step
        weights = _load_weights(weight, layer, rows_of(group), block, tile)
        vectors = _load_operand(operand, block, tile, bp)
        partial = jnp.where(block == 0, jnp.zeros_like(partial), partial)
        partial = partial + env.dot(weights, vectors, transpose_b=True)
        carry = lax.cond(
            block == blocks - 1,
            lambda: finish(group, _sum_diagonal(partial, tile, bp), carry),
            lambda: carry,
        )
        return partial, carry

    partial = jnp.zeros((tile.rows * tile.chunks, tile.chunks * bp), jnp.float32)
    return lax.fori_loop(jnp.int32(0), mine * blocks, block_step, (partial, carry))[1]
