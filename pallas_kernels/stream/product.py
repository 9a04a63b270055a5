"""A tile times its operand, and the sums of the products of some tiles.

Summing up takes a program's warps two meetings. So the products of a tile are put aside, and
summed up for several tiles at once: of a segment that is short, for all.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.program import iota
from pallas_kernels.stream import ptx
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.lanes import column_of, first_input, next_input
from pallas_kernels.stream.operand import Operand, unpacked
from pallas_kernels.stream.plan import COLUMNS, PIECE, Segment, StreamPlan
from pallas_kernels.stream.ring import (
    Turn,
    products_address,
    read_tile,
    slot_address,
    wait_for_tile,
)
from pallas_kernels.stream.tiles import Place

__all__ = ["Outputs", "Sums", "multiply", "outputs_of", "products_shape", "sum_up"]


class Outputs(NamedTuple):
    """What a flush makes: pairs of rows of some groups, for each sequence; int32 `[E]`.

    A pair is a row of a group's first half and the same one of its second half.
    """

    number: Array  # of the group among those that are flushed
    pair: Array  # of the group
    sequence: Array


class Sums(NamedTuple):
    """Dot products of the pairs of `Outputs`, float32 `[E]`."""

    first: Array
    second: Array


def outputs_of(env: StreamEnv, segment: Segment) -> Outputs:
    """What a flush of the segment makes, or the residual that a program owns."""
    plan, bp = env.plan, env.plan.padded_batch
    rows = plan.rows if segment == Segment.EMBED else env.segment(segment).run_rows
    index = iota((plan.flushed(segment) * (rows // 2) * bp,), 0)
    pair = lax.div(index, jnp.int32(bp))
    number = lax.div(pair, jnp.int32(rows // 2))
    return Outputs(number, pair - number * (rows // 2), index & (bp - 1))


def products_shape(plan: StreamPlan) -> tuple[int, int, int, int]:
    """Of the products put aside in interpret mode, float32: programs, tiles, rows, sequences."""
    down = plan.segments[Segment.DOWN]
    return plan.programs, plan.flush * down.run, plan.rows, plan.padded_batch


def _pitch(env: StreamEnv, segment: Array) -> Array:
    """Bytes from a row of the tile to the next, where it is not the down projection's."""
    d = env.dims
    if d.attn_dim == d.model_dim:
        return jnp.int32(2 * d.model_dim)
    is_attn = segment == Segment.ATTN_OUT
    return jnp.where(is_attn, jnp.int32(2 * d.attn_dim), jnp.int32(2 * d.model_dim))


def multiply(env: StreamEnv, turn: Turn, index: Array, place: Place, operand: Operand) -> None:
    """Waits for the program's `index`-th tile, multiplies it, and puts the products aside.

    Args:
        env: the program's view.
        turn: the tile's turn.
        index: int32 scalar.
        place: the tile's.
        operand: of its segment.
    """
    wait_for_tile(env, turn)

    def product(segment: Segment, pitch: Array) -> Array:
        plan, part = env.plan, env.segment(segment)
        words = operand[: part.pieces * PIECE // 2]
        if env.interpret:
            _interpreted(env, index, place, pitch, part.rows, part.pieces, words)
            return index
        thread = iota((plan.threads,), 0)
        warp, column = lax.shift_right_logical(thread, 5), column_of(plan)
        if plan.chunked:
            where = (warp * COLUMNS + column) * (4 * part.rows)
        else:
            where = (warp * part.rows + column) * (4 * COLUMNS) + (thread & 3) * 8
        return ptx.multiply_tile(
            slot_address(env, turn) + 2 * first_input(plan, part.pieces),
            jnp.full((plan.threads,), pitch),
            words,
            products_address(env, turn) + place.slot * plan.products_bytes(segment) + where,
            rows=part.rows,
            step=2 * next_input(plan),
            chunked=plan.chunked,
            threads=32 * plan.product_warps,
        )

    down = env.segment(Segment.DOWN)
    lax.cond(
        place.segment == Segment.DOWN,
        lambda: product(Segment.DOWN, jnp.int32(2 * down.width)),
        lambda: product(Segment.QKV, _pitch(env, place.segment)),
    )


def sum_up(env: StreamEnv, turn: Turn, segment: Segment, outputs: Outputs) -> Sums:
    """Sums up the products of the tiles of a flush.

    All threads have put theirs aside: a barrier stands before. Another must stand behind.
    """
    plan, part = env.plan, env.segment(segment)

    def of(row: Array) -> Array:
        tile = outputs.number
        if part.run > 1:  # a group's rows are those of several tiles
            inside = lax.div(row, jnp.int32(part.rows))
            tile, row = tile * part.run + inside, row - inside * part.rows
        if env.interpret:
            return plgpu.load(env["products"].at[env.program, tile, row, outputs.sequence])
        at = products_address(env, turn) + tile * plan.products_bytes(segment)
        if plan.chunked:
            at += 4 * row
            return ptx.sum_shared(at, COLUMNS * plan.product_warps, 4 * part.rows)
        at += 4 * (row * COLUMNS + outputs.sequence)
        return ptx.sum_shared(at, plan.product_warps, 4 * COLUMNS * part.rows)

    return Sums(of(outputs.pair), of(outputs.pair + part.run_rows // 2))


def _interpreted(
    env: StreamEnv,
    index: Array,
    place: Place,
    pitch: Array,
    rows: int,
    pieces: int,
    words: Operand,
) -> None:
    """Puts a tile's sums where `sum_up` finds them."""
    plan = env.plan
    values = jnp.stack([x for word in words for x in unpacked(word)])  # [8 * pieces, T]
    inputs = jnp.stack(
        [
            first_input(plan, pieces) + q * next_input(plan) + j
            for q in range(pieces)
            for j in range(PIECE)
        ]
    )
    weights = read_tile(env, index, jnp.arange(rows)[:, None, None] * pitch + 2 * inputs[None])
    products = (weights.astype(jnp.float32) * values).sum(axis=1)  # [rows, T]
    if plan.chunked:
        sums = products.sum(axis=1)[:, None]
    else:
        sums = products.reshape(rows, plan.num_warps, COLUMNS, 4).sum(axis=(1, 3))
    row, b = iota(sums.shape, 0), iota(sums.shape, 1)
    plgpu.store(env["products"].at[env.program, place.slot, row, b], sums)
