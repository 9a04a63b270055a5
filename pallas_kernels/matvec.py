"""Streams a weight matrix through tensor cores against a few activation vectors.

The scheme is `plan`'s: a tile of 8 rows, say, is multiplied as a `[64, depth]` matrix by
the operand's `[8 * Bp, depth]` chunks, and the diagonal of the product is summed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.env import Env
from pallas_kernels.plan import Tile
from pallas_kernels.program import iota

__all__ = ["PREFETCH", "RowStream"]

# Tiles a program asks for before it waits.
PREFETCH = 1

# Elements of bfloat16 in a sector, the least that device memory delivers.
SECTOR = 16


def _spread(rows: Array, tile: Tile, shape: tuple[int, int]) -> Array:
    """Rows `[R]`, each repeated for its chunks and along the second axis of `shape`."""
    row = jnp.broadcast_to(rows[:, None], (tile.rows, tile.chunks)).reshape(-1)
    return jnp.broadcast_to(row[:, None], shape)


def _at(weight: Any, layer: Array | None, row: Array, column: Array) -> Any:
    return weight.at[row, column] if layer is None else weight.at[layer, row, column]


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


@dataclasses.dataclass(frozen=True)
class RowStream:
    """One program's share of a mat-vec `weight @ activations`.

    Attributes:
        env: the program's view.
        weight: ref `[L, out, in]`, or `[out, in]` with layer None.
        layer: int32 scalar, or None.
        groups: how many groups of rows there are, dealt out in turn.
        rows_of: maps a group's number to its row numbers, int32 `[R]`.
        tile: the tile's shape.
        operand: ref of the operand buffer (see `scratch`).
    """

    env: Env
    weight: Any
    layer: Array | None
    groups: int
    rows_of: Callable[[Array], Array]
    tile: Tile
    operand: Any

    def group(self, j: Array | int) -> Array:
        """Number of this program's j-th group."""
        return self.env.program + j * self.env.plan.programs

    def prefetch(self, tiles: int) -> Array:
        """Asks for this program's first tiles, so that they come while it waits.

        Reads one word of every 32-byte sector. Nothing may be done with the words, yet
        they must be used, lest the compiler drop the loads: see `Env.discard`.

        Returns:
            The words, combined: pass them to `run`.
        """
        env, tile = self.env, self.tile
        shape = (tile.rows * tile.chunks, tile.depth // SECTOR)
        words = jnp.zeros(shape, jnp.int16)
        mine = env.share(self.groups) * tile.blocks
        for i in range(tiles):
            j, block = divmod(i, tile.blocks)
            rows = self.rows_of(self.group(j))
            chunk = lax.rem(iota(shape, 0), jnp.int32(tile.chunks))
            column = block * tile.span + chunk * tile.depth + iota(shape, 1) * SECTOR
            row = _spread(rows, tile, shape)
            view = _at(self.weight, self.layer, row, column)
            there = (column < tile.inner) & (i < mine)
            word = plgpu.load(view, mask=there, other=0.0)
            words = words | lax.bitcast_convert_type(word, jnp.int16)
        return words

    def run(
        self,
        finish: Callable[[Array, Array, Array, Any], Any],
        carry: Any = (),
        *,
        prefetched: Array | None = None,
    ) -> Any:
        """Streams the weights, one group of rows after the other.

        Args:
            finish: called as `finish(j, group, sums, carry)` for this program's j-th
                group with float32 `[R, Bp]` sums; stores them, returns the next carry.
            carry: what the first `finish` gets.
            prefetched: what `prefetch` returned.

        Returns:
            The last carry.
        """
        env, tile = self.env, self.tile
        bp = env.plan.padded_batch
        start = jnp.int32(0) if prefetched is None else env.discard(prefetched)
        mine = env.share(self.groups)

        if tile.blocks == 1:
            # The one operand block stays in place for the whole loop.
            vectors = _load_operand(self.operand, jnp.int32(0), tile, bp)

            def group_step(j, carry):
                group = self.group(j)
                weights = self._load(group, jnp.int32(0))
                product = env.dot(weights, vectors, transpose_b=True)
                return finish(j, group, _sum_diagonal(product, tile, bp), carry)

            return lax.fori_loop(start, mine, group_step, carry)

        blocks = jnp.int32(tile.blocks)

        def block_step(i, state):
            partial, carry = state
            j = lax.div(i, blocks)
            block = i - j * blocks
            group = self.group(j)
            weights = self._load(group, block)
            vectors = _load_operand(self.operand, block, tile, bp)
            partial = jnp.where(block == 0, jnp.zeros_like(partial), partial)
            partial = partial + env.dot(weights, vectors, transpose_b=True)
            carry = lax.cond(
                block == blocks - 1,
                lambda: finish(j, group, _sum_diagonal(partial, tile, bp), carry),
                lambda: carry,
            )
            return partial, carry

        partial = jnp.zeros((tile.rows * tile.chunks, tile.chunks * bp), jnp.float32)
        return lax.fori_loop(start, mine * blocks, block_step, (partial, carry))[1]

    def _load(self, group: Array, block: Array) -> Array:
        """A tile of the group's rows as `[R * chunks, depth]`; zero beyond the inputs."""
        tile = self.tile
        shape = (tile.rows * tile.chunks, tile.depth)
        chunk = lax.rem(iota(shape, 0), jnp.int32(tile.chunks))
        column = block * tile.span + chunk * tile.depth + iota(shape, 1)
        row = _spread(self.rows_of(group), tile, shape)
        view = _at(self.weight, self.layer, row, column)
        if not tile.ragged:
            return plgpu.load(view)
        return plgpu.load(view, mask=column < tile.inner, other=0.0)
