"""Attention over the live cache, the new position included.

Work is dealt out in parts, see `kv_splits`. Softmax is taken online over the tiles of a split
(Milakov and Gimelshein, arXiv 1805.02867), by each of a program's warps over its own positions.
Where a head has several KV splits, each hands over its weighted values, their sum and its maximum,
and the programs combine them in order, each some of the elements of some heads.

New positions, which come with the queries, are added by the head's last split. All parts are
done before any is combined, so that no two programs ever wait for each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.dims import ceil_div, next_power_of_2
from pallas_kernels.stream import access, ptx
from pallas_kernels.stream.cache import attend_split, layer_share
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.exchange_order import word_in_exchange
from pallas_kernels.stream.feeding import feed_ring
from pallas_kernels.stream.half2 import PLAIN, even_and_odd
from pallas_kernels.stream.kv_splits import Part, Share, num_splits_of, part_of
from pallas_kernels.stream.layout import SharedLayout
from pallas_kernels.stream.plan import LOT, Segment
from pallas_kernels.stream.segments.heads import Heads, collect_heads

__all__ = ["attend_parts", "combine_parts", "combining_threads"]

# Stands for minus infinity: it survives a subtraction from itself.
LOWEST = -1e30
# Elements of a head that a program combines at least.
MIN_COMBINED = 8
# Tiles of weights that are asked for when the program's parts are done.
AHEAD = 2
# KV splits that a thread combines at most.
MOST_SPLITS = 8
# Neighbouring elements of what warps have made that a thread joins at once, at most.
MOST_ELEMENTS = 4


class _Made(NamedTuple):
    """What a part makes of its positions; rows beyond its queries are of no use.

    All arrays have one shape: `[threads]`, or interpreted `[rows, H / 2]`. Of each there are
    neighbouring elements of one query.
    """

    row: Array  # which of the part's queries, or of a lot's: int32
    element: Array  # the first of the elements, int32
    there: Array  # bool: other threads have a copy
    top: Array  # maximum of the query's scores in base 2, float32
    total: Array  # sum of its weights, float32
    out: Sequence[Array]  # weighted values of the elements, float32


def _rows(env: StreamEnv) -> int:
    """Queries that a warp attends for, padded."""
    return next_power_of_2(min(env.dims.queries, LOT))


class _Rows(NamedTuple):
    """Whose a part's queries are: int32, and bool."""

    column: Array  # of the step's tokens
    query: Array  # of N heads
    there: Array  # the others are padding


def _rows_of(env: StreamEnv, part: Part, row: Array) -> _Rows:
    d, number = env.dims, part.first_query + row
    if d.tokens == 1:
        return _Rows(part.sequence, part.head * d.q_per_kv + number, number < d.q_per_kv)
    token = lax.div(number, jnp.int32(d.q_per_kv))
    query = part.head * d.q_per_kv + number - token * d.q_per_kv
    there = (number < d.queries) & (row < part.lots * LOT)
    return _Rows(part.sequence * d.tokens + token, query, there)


def _put_heads(env: StreamEnv, heads: Heads, has_new: Array, lot: Array | int = 0) -> None:
    """Queries, as two bfloat16 each, and what is new, to shared memory.

    Args:
        env: the program's view.
        heads: queries, up to `LOT`, or several times as many.
        has_new: bool scalar, whether keys and values are there.
        lot: which of the part's queries the first `LOT` are.
    """
    at = SharedLayout.of(env.plan)
    rows = heads.queries.shape[0]
    row, element = env.iota(heads.queries.shape, 0), env.iota(heads.queries.shape, 1)
    everywhere, is_new = row >= 0, (row < env.dims.tokens) & has_new
    high = heads.queries.astype(jnp.bfloat16)
    low = (heads.queries - high.astype(jnp.float32)).astype(jnp.bfloat16)
    place = env.shared + at.queries + row * at.query_pitch + 2 * element
    if rows > LOT:  # what the bfloat16 leave lies after them, lot by lot
        place += (row & ~(LOT - 1)) * at.query_pitch
    if not isinstance(lot, int):
        place += lot * (2 * LOT * at.query_pitch)
    # Paired, each query has two rows.
    for again in range(0, LOT, min(rows, LOT)):
        ptx.write_halves(place + again * at.query_pitch, high, everywhere)
        ptx.write_halves(place + (LOT + again) * at.query_pitch, low, everywhere)
    size = 2 * env.dims.head_dim
    place = env.shared + at.new + 2 * element
    if env.dims.tokens > 1:
        place += row * size
    ptx.write_halves(place, heads.key.astype(jnp.bfloat16), is_new)
    values = place + env.dims.tokens * size
    ptx.write_halves(values, heads.value.astype(jnp.bfloat16), is_new)


def _attend(env: StreamEnv, layer: Array, share: Share, j: Array, part: Part) -> None:
    """Softmax attention over the part's KV split, by all warps: see `_made_together`."""
    rows, abreast = env.plan.attended_rows, env.plan.attention.abreast
    whose = env, layer, part.sequence, part.head
    start = part.first_query, part.position, part.has_new

    def put_all(rows: int) -> None:
        _put_heads(env, collect_heads(*whose, *start, rows, part.lots), part.has_new)

    if abreast == 1:
        put_all(rows)
    elif env.features.qk_norm is None:
        lax.cond(part.lots == 1, lambda: put_all(rows), lambda: put_all(rows * abreast))
    else:  # what is normed takes many registers

        def put(lot: Array, nothing: Array) -> Array:
            has_new = part.has_new & (lot == 0)
            first = part.first_query + lot * LOT
            heads = collect_heads(*whose, first, part.position, has_new, rows)
            _put_heads(env, heads, has_new, lot)
            return nothing

        lax.fori_loop(jnp.int32(0), jnp.int32(0) + part.lots, put, jnp.int32(0))
    access.meet()
    attend_split(env, layer, share, j)


def _joined(env: StreamEnv, first: Array | int, count: Array | None) -> list[_Made]:
    """What warps have made together of the same queries: a turn of the threads each.

    Args:
        env: the program's view.
        first: the first of them.
        count: how many they are; None: all.
    """
    at, size, threads = SharedLayout.of(env.plan), env.dims.head_dim, env.plan.threads
    rows, thread = _rows(env), env.iota((threads,), 0)
    width = min(max(2, rows * size // threads), MOST_ELEMENTS)
    per_row, put_aside = size // width, env.plan.attended_rows

    def turn(number: int) -> _Made:
        place = thread + number * threads
        row, element = lax.div(place, jnp.int32(per_row)), (place & (per_row - 1)) * width
        there, row = row < rows, row & (rows - 1)
        place = first * put_aside + row
        made = ptx.join_warps(
            env.shared + at.sums + 8 * place,
            env.shared + at.products + place * at.out_pitch + 4 * element,
            count,
            width=width,
            count=env.plan.attention.warps,
            step=8 * put_aside,
            out_step=put_aside * at.out_pitch,
        )
        return _Made(row, element, there, *made)

    return [turn(i) for i in range(ceil_div(rows * per_row, threads))]


def _joined_lot(env: StreamEnv, part: Part, lot: Array) -> list[_Made]:
    """What the warps have made together that attended for the part's `lot`-th queries."""
    cut = env.plan.attention
    each = cut.warps // cut.abreast
    return _joined(env, lot * each, jnp.where(part.lots == 1, jnp.int32(cut.warps), each))


def _load_tile(env: StreamEnv, layer: Array, part: Part, i: Array) -> tuple[Array, Array]:
    """Keys and values of the i-th tile of the part's KV split, `[block, H]`; 0 beyond it."""
    shape = (env.plan.attention.block, env.dims.head_dim)
    position = part.start + i * shape[0] + env.iota(shape, 0)
    live = position < part.stop
    where = (layer, part.sequence, part.head, position, env.iota(shape, 1))
    keys = access.load(env["k"].at[where], mask=live, other=0.0)
    values = access.load(env["v"].at[where], mask=live, other=0.0)
    return keys, values


def _interpreted(env: StreamEnv, layer: Array, part: Part) -> _Made:
    """The same as plain arrays, of all the part's queries at once."""
    rows = env.plan.attended_rows * env.plan.attention.abreast
    start = part.first_query, part.position, part.has_new
    heads = collect_heads(env, layer, part.sequence, part.head, *start, rows, part.lots)
    block, cap = env.plan.attention.block, env.features.attn_softcap
    q, key, value = heads

    def capped(scores):
        return scores if cap is None else (cap * math.log2(math.e)) * jnp.tanh(scores)

    lower = None
    if env.dims.tokens == 1:
        top = jnp.where(part.has_new, capped(jnp.sum(q * key, axis=1)), LOWEST)
        nothing = jnp.zeros(top.shape, jnp.float32)
        total = jnp.where(part.has_new, jnp.ones_like(nothing), nothing)
    else:
        size = q.shape[0], key.shape[0]
        number, new = env.iota(size, 0), env.iota(size, 1)
        token = lax.div(part.first_query + number, jnp.int32(env.dims.q_per_kv))
        seen = part.has_new & (new < env.dims.tokens) & (new <= token)
        if (window := env.features.window) is not None:
            before = jnp.where(env.is_local(layer), jnp.int32(window), env.dims.capacity + LOT)
            seen &= new > token - before
            lower = (part.position + token[:, :1]) - (before - 1)
        scores = jnp.where(seen, capped(env.dot_split(q, key, transpose_b=True)), LOWEST)
        top = jnp.max(scores, axis=1)
        weights = jnp.where(seen, jnp.exp2(scores - top[:, None]), 0.0)
        total = jnp.sum(weights, axis=1)
        value = env.dot_split(weights, value)

    def step(i, state):
        top, total, out = state
        keys, values = _load_tile(env, layer, part, i)
        scores = capped(env.dot_split(q, keys, transpose_b=True))  # [8, block]
        position = part.start + i * block + env.iota(scores.shape, 1)
        seen = position < part.stop
        if lower is not None:
            seen &= position >= lower
        scores = jnp.where(seen, scores, LOWEST)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.where(seen, jnp.exp2(scores - new_top[:, None]), 0.0)
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=1)
        return new_top, total, out * shrink[:, None] + env.dot_split(weights, values)

    tiles = lax.div(part.stop - part.start + (block - 1), jnp.int32(block))
    top, total, out = lax.fori_loop(jnp.int32(0), tiles, step, (top, total, value))
    rows = next_power_of_2(min(env.dims.queries, rows))
    out = out[:rows].reshape(rows, -1, 2)
    shape = out.shape[:2]
    top, total = (jnp.broadcast_to(x[:rows, None], shape) for x in (top, total))
    row, element = env.iota(shape, 0), 2 * env.iota(shape, 1)
    return _Made(row, element, row >= 0, top, total, [out[:, :, 0], out[:, :, 1]])


def _publish_heads(
    env: StreamEnv,
    tag: Array,
    column: Array,
    query: Array,
    element: Array,
    out: Sequence[Array],
    mask: Array,
) -> None:
    """Hands finished heads to the output projection.

    Args:
        env: the program's view.
        tag: the layer's.
        column: int32, any shape: whose a head is.
        query: int32, the same shape: which of N heads.
        element: int32, the same shape: the first of `out`'s, a multiple of how many these are.
        out: float32, the same shape each: up to 4 neighbouring elements, two where words have two.
        mask: bool, the same shape.
    """
    # Up to 4 of them share a load.
    word = word_in_exchange(
        env.plan, env.segment(Segment.ATTN_OUT), column, element + query * env.dims.head_dim
    )
    word += env.exchange.layout.attn
    if not env.plan.half2:
        for number, value in enumerate(out):
            env.exchange.publish(word + number, value, tag, mask)
        return
    for number in range(0, len(out), 2):
        first, second = out[number : number + 2]
        env.exchange.publish_half2(word + number // 2, first, second, PLAIN, tag, mask)


def _finish_heads(env: StreamEnv, tag: Array, rows: _Rows, made: _Made) -> None:
    """Hands over heads of one KV split."""
    out = [values / made.total for values in made.out]
    _publish_heads(env, tag, rows.column, rows.query, made.element, out, rows.there)


def _pair_at(
    env: StreamEnv, column: Array, query: Array, number: Array, item: Array | int
) -> Array:
    """Offset of a pair of `parts`; items 0 to H - 1 are values, then come sum and maximum."""
    d = env.dims
    row = (column * d.num_heads + query) * env.plan.attention.max_splits + number
    return env.exchange.layout.parts + 2 * (row * (d.head_dim + 2) + item)


def _hand_over_part(env: StreamEnv, tag: Array, part: Part, rows: _Rows, made: _Made) -> None:
    """Hands a KV split's numbers to who combines the head."""
    d = env.dims
    first = _pair_at(env, rows.column, rows.query, part.split, 0)

    def hand_over(values: Array, item: Array | int, mask: Array) -> None:
        env.exchange.publish_pair(first + 2 * item, values, tag, mask)

    for number, values in enumerate(made.out):
        hand_over(values, made.element + number, rows.there)
    hand_over(made.total, d.head_dim, rows.there & (made.element == 0))
    hand_over(made.top, d.head_dim + 1, rows.there & (made.element == 0))


def attend_parts(env: StreamEnv, layer: Array) -> None:
    """This program's parts of the layer's attention; heads of one split are then finished."""
    tag, share, abreast = env.tag(layer), layer_share(env, layer), env.plan.attention.abreast

    def part_step(j, carry):
        part = part_of(env, layer, share, j)
        if env.interpret:
            hand_over_made(part, [_interpreted(env, layer, part)])
            return carry
        _attend(env, layer, share, j, part)
        if abreast == 1:
            made = _joined(env, 0, None)
            access.meet()  # products will be put there, and the next part's queries
            hand_over_made(part, made)
            return carry

        def of_lot(lot: Array, nothing: Array) -> Array:
            hand_over_made(part, _joined_lot(env, part, lot), lot)
            return nothing

        lax.fori_loop(jnp.int32(0), jnp.int32(0) + part.lots, of_lot, jnp.int32(0))
        access.meet()  # products will be put there, and the next part's queries
        return carry

    def hand_over_made(part: Part, turns: list[_Made], lot: Array | int = 0) -> None:
        for made in turns:
            row = made.row if isinstance(lot, int) else lot * LOT + made.row
            rows = _rows_of(env, part, row)
            rows = rows._replace(there=rows.there & made.there)
            finish = functools.partial(_finish_heads, env, tag, rows, made)
            hand_over = functools.partial(_hand_over_part, env, tag, part, rows, made)
            lax.cond(part.num_splits == 1, finish, hand_over)

    lax.fori_loop(jnp.int32(0), share.parts, part_step, jnp.int32(0))

    @pl.when((share.parts > 0) | share.combines)
    def _():
        # No tile has been asked for meanwhile. Memory has nothing more to do for the layer's keys
        # and values, and what comes of them takes a hand-over, or two.
        for _ in range(AHEAD):
            feed_ring(env)


def combine_parts(env: StreamEnv, layer: Array) -> None:
    """Finishes this program's elements of heads of several KV splits."""
    d, tag, share = env.dims, env.tag(layer), layer_share(env, layer)
    heads, splits = d.columns * d.num_heads, env.plan.attention.max_splits
    width = next_power_of_2(ceil_div(heads * d.head_dim, env.plan.programs))
    width = min(max(width, MIN_COMBINED), d.head_dim)
    width = min(width, env.plan.threads, MOST_SPLITS * env.plan.threads // splits)
    pieces = d.head_dim // width
    combine = _combine_interpreted if env.interpret else _combine

    def step(j, carry):
        number = env.program + j * env.plan.programs
        head = lax.div(number, jnp.int32(pieces))
        first = (number - head * pieces) * width
        column = lax.div(head, jnp.int32(d.num_heads))
        query = head - column * d.num_heads
        num_splits = num_splits_of(env, layer, env.sequence_and_token(column)[0])

        @pl.when(num_splits > 1)
        def _():
            combine(env, tag, column, query, first, num_splits, width)

        return carry

    @pl.when(share.combines)
    def _():
        lax.fori_loop(jnp.int32(0), env.share(heads * pieces), step, jnp.int32(0))


def combining_threads(
    thread: Array, width: int, splits: int, most: int = 32
) -> tuple[int, Array, Array]:
    """Which of a program's threads combine which splits of which of `width` elements.

    At most `most` threads have the same one.

    Args:
        thread: int32 `[threads]`, each thread's number.
        width: elements, a power of two.
        splits: the most KV splits of a head, a power of two.
        most: as above.

    Returns:
        How many threads have an element, neighbours apart by `32 / lanes`; of each thread the first
        split, the others being `lanes` apart; and its element, which may lie beyond `width`.
    """
    lanes = min(most, splits, thread.shape[0] // width)
    elements, lane = jnp.int32(32 // lanes), thread & 31
    number = lax.div(lane, elements)
    return lanes, number, lax.div(thread, jnp.int32(32)) * elements + (lane - number * elements)


def _publish_combined(
    env: StreamEnv,
    tag: Array,
    column: Array,
    query: Array,
    element: Array,
    out: Array,
    mask: Array,
) -> None:
    """As `_publish_heads` of an array whose neighbours are neighbouring elements."""
    if not env.plan.half2:
        _publish_heads(env, tag, column, query, element, [out], mask)
        return
    element, mask = (even_and_odd(x)[0] for x in (element, mask.astype(jnp.int32)))
    _publish_heads(env, tag, column, query, element, even_and_odd(out), mask != 0)


def _combine(
    env: StreamEnv,
    tag: Array,
    column: Array,
    query: Array,
    first: Array,
    num_splits: Array,
    width: int,
) -> None:
    """Waits for all splits of some elements of a head, and combines them in order.

    An element's threads belong to one warp, so that nothing goes through shared memory. Threads
    beyond the elements have some of them again.
    """
    splits, size = env.plan.attention.max_splits, env.dims.head_dim
    most = 16 if env.plan.half2 else 32  # a warp has both of two neighbours
    thread = env.iota((env.plan.threads,), 0)
    lanes, number, within = combining_threads(thread, width, splits, most)
    element = first + (within & (width - 1))
    out = env.exchange.combine(
        _pair_at(env, column, query, number, element),
        _pair_at(env, column, query, number, size),
        lax.div(num_splits - number + (lanes - 1), jnp.int32(lanes)),
        tag,
        count=splits // lanes,
        lanes=lanes,
        step=lanes * 2 * (size + 2),
    )
    mask = (number == 0) & (within < width)
    _publish_combined(env, tag, column, query, element, out, mask)


def _combine_interpreted(
    env: StreamEnv,
    tag: Array,
    column: Array,
    query: Array,
    first: Array,
    num_splits: Array,
    width: int,
) -> None:
    """The same as plain arrays."""
    shape, size = (env.plan.attention.max_splits, width), env.dims.head_dim
    number, element = env.iota(shape, 0), first + env.iota(shape, 1)
    there = number < num_splits
    wanted = [
        (_pair_at(env, column, query, number, item), there)
        for item in (number * 0 + (size + 1), number * 0 + size, element)
    ]
    top, total, out = (
        lax.bitcast_convert_type(bits, jnp.float32)
        for bits in env.exchange.collect_pairs(wanted, tag)
    )
    top = jnp.where(there, top, LOWEST)
    weight = jnp.where(there, jnp.exp2(top - jnp.max(top, axis=0)[None, :]), 0.0)
    out = jnp.sum(jnp.where(there, out * weight, 0.0), axis=0) / jnp.sum(weight * total, axis=0)
    element = first + env.iota(out.shape, 0)
    _publish_combined(env, tag, column, query, element, out, element >= 0)
