"""Attention over the live cache, the new position included.

Work is dealt out in parts: a part is one sequence, one key/value head with the G query
heads that share it, and one span of positions. Softmax is taken online over the tiles of a
span (Milakov and Gimelshein, arXiv 1805.02867). Where a head has several parts, each hands
over its weighted values, their sum and its maximum, and one program combines them in order.

A program loads the first tile of its span before it waits for the queries: all but the new
position lie in the cache already. The new one, which comes with the queries, is added by the
head's last part. All parts are done before any is combined, so that no two programs ever
wait for each other.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dims import next_power_of_2
from pallas_kernels.program import iota
from pallas_kernels.stream import ptx
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.segments.heads import collect_heads

__all__ = ["attend_parts", "combine_parts", "prefetch_parts"]

# Tensor cores multiply at least 16 rows: the G query heads are padded to as many.
QUERY_ROWS = 16
# Stands for minus infinity: it survives a subtraction from itself.
LOWEST = -1e30
# Pairs of one piece while parts are combined.
COMBINE_TILE = 1024


class _Part(NamedTuple):
    """One part: scalars, int32."""

    sequence: Array  # b
    head: Array  # of K
    number: Array  # which of the head's parts
    parts: Array  # how many it has
    position: Array  # the new one
    start: Array  # first cached position of the span
    stop: Array  # one past its last cached position


class _Extent(NamedTuple):
    """What one sequence's query sees of the cache in a layer: scalars, int32."""

    first: Array  # first position seen
    live: Array  # how many, the new one not counted


def _ceil_div(a: Array, b: Array | int) -> Array:
    return lax.div(a + (b - 1), jnp.asarray(b, jnp.int32))


def _extents(env: StreamEnv, layer: Array) -> list[_Extent]:
    """Of each sequence. A full cache's new position is not stored."""
    live = [jnp.minimum(length, env.dims.capacity) for length in env.lengths]
    if (window := env.features.window) is None:
        return [_Extent(jnp.int32(0), n) for n in live]
    local = env.is_local(layer)
    first = [jnp.where(local, jnp.maximum(n - (window - 1), 0), jnp.int32(0)) for n in live]
    return [_Extent(start, n - start) for start, n in zip(first, live, strict=True)]


def _span(env: StreamEnv, count: Array) -> Array:
    """Positions of a span, where `count` positions and the new one are seen."""
    cut = env.plan.attention
    equal = _ceil_div(_ceil_div(count + 1, cut.max_splits), cut.block) * cut.block
    return jnp.maximum(equal, cut.min_span)


def _parts_of(env: StreamEnv, extent: _Extent) -> Array:
    """Parts of one head of a sequence."""
    return _ceil_div(extent.live + 1, _span(env, extent.live))


def _part(env: StreamEnv, extents: list[_Extent], number: Array) -> _Part:
    """The `number`-th part of the layer: sequences in order, then spans, then heads."""
    heads = env.dims.num_kv_heads
    offset = before = sequence = first = count = jnp.int32(0)
    for b, extent in enumerate(extents):
        here = number >= offset
        before = jnp.where(here, offset, before)
        sequence = jnp.where(here, b, sequence)
        first = jnp.where(here, extent.first, first)
        count = jnp.where(here, extent.live, count)
        offset = offset + _parts_of(env, extent) * heads
    within = number - before
    index = lax.div(within, jnp.int32(heads))
    span = _span(env, count)
    start = first + index * span
    return _Part(
        sequence=sequence,
        head=within - index * heads,
        number=index,
        parts=_parts_of(env, _Extent(first, count)),
        position=first + count,
        start=start,
        stop=jnp.minimum(start + span, first + count),
    )


def _load_tile(env: StreamEnv, layer: Array, part: _Part, i: Array) -> tuple[Array, Array]:
    """Keys and values of the i-th tile of the part's span, `[block, H]`; 0 beyond it."""
    shape = (env.plan.attention.block, env.dims.head_dim)
    position = part.start + i * shape[0] + iota(shape, 0)
    live = position < part.stop
    where = (layer, part.sequence, part.head, position, iota(shape, 1))
    keys = plgpu.load(env["k"].at[where], mask=live, other=0.0)
    values = plgpu.load(env["v"].at[where], mask=live, other=0.0)
    return keys, values


def _attend(
    env: StreamEnv, layer: Array, part: _Part, first_tile: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    """Softmax attention over the part's span.

    Returns:
        Maximum `[16]` of the scores in base 2, sum `[16]` of the weights, and
        weighted values `[16, H]`, float32; padding rows hold copies.
    """
    block, cap = env.plan.attention.block, env.features.attn_softcap
    has_new = part.number == part.parts - 1
    q, key, value = collect_heads(
        env, layer, part.sequence, part.head, part.position, has_new, QUERY_ROWS
    )

    def capped(scores):
        return scores if cap is None else (cap * math.log2(math.e)) * jnp.tanh(scores)

    top = jnp.where(has_new, capped(jnp.sum(q * key, axis=1)), LOWEST)
    nothing = jnp.zeros((QUERY_ROWS,), jnp.float32)
    total = jnp.where(has_new, jnp.ones_like(nothing), nothing)

    def step(i, state):
        keys, values, top, total, out = state
        ahead = _load_tile(env, layer, part, i + 1)  # in flight while this tile is used
        scores = capped(env.dot_split(q, keys, transpose_b=True))  # [16, block]
        seen = part.start + i * block + iota(scores.shape, 1) < part.stop
        scores = jnp.where(seen, scores, LOWEST)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.where(seen, jnp.exp2(scores - new_top[:, None]), 0.0)
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=1)
        out = out * shrink[:, None] + env.dot_split(weights, values)
        return (*ahead, new_top, total, out)

    tiles = _ceil_div(part.stop - part.start, block)
    state = (*first_tile, top, total, value)
    _, _, top, total, out = lax.fori_loop(jnp.int32(0), tiles, step, state)
    return top, total, out


def _publish_heads(
    env: StreamEnv, tag: Array, sequence: Array, head: Array, g: Array, element: Array, out: Array
) -> None:
    """Hands finished heads to the output projection."""
    d = env.dims
    i = (head * d.q_per_kv + g) * d.head_dim + element
    at = env.mail.layout.attn + sequence * d.attn_dim + i
    env.mail.publish(at, out, tag, g < d.q_per_kv)


def _pair_at(env: StreamEnv, slot: Array, number: Array, g: Array, item: Array | int) -> Array:
    """Offset of a pair of `parts`; items 0 to H - 1 are values, then come sum and maximum."""
    d = env.dims
    row = (slot * env.plan.attention.max_splits + number) * d.q_per_kv + g
    return env.mail.layout.parts + 2 * (row * (d.head_dim + 2) + item)


def _hand_over_part(
    env: StreamEnv, tag: Array, part: _Part, top: Array, total: Array, out: Array
) -> None:
    d, mail = env.dims, env.mail
    slot = part.sequence * d.num_kv_heads + part.head
    g, element = iota(out.shape, 0), iota(out.shape, 1)
    mail.publish_pair(_pair_at(env, slot, part.number, g, element), out, tag, g < d.q_per_kv)
    row = iota((QUERY_ROWS,), 0)
    real = row < d.q_per_kv
    mail.publish_pair(_pair_at(env, slot, part.number, row, d.head_dim), total, tag, real)
    mail.publish_pair(_pair_at(env, slot, part.number, row, d.head_dim + 1), top, tag, real)


def _combine(env: StreamEnv, tag: Array, sequence: Array, head: Array, parts: Array) -> None:
    """Waits for all parts of a head and combines them, in order."""
    d, splits = env.dims, env.plan.attention.max_splits
    slot = sequence * d.num_kv_heads + head
    group, width = next_power_of_2(d.q_per_kv), d.head_dim
    while splits * group * width > COMBINE_TILE and width > 1:
        width //= 2

    def collect(number, g, item, there):
        bits = env.mail.collect_pair(_pair_at(env, slot, number, g, item), tag, there)
        return lax.bitcast_convert_type(bits, jnp.float32)

    shape = (splits, group)
    number, g = iota(shape, 0), iota(shape, 1)
    there = (number < parts) & (g < d.q_per_kv)
    top = jnp.where(there, collect(number, g, d.head_dim + 1, there), LOWEST)
    total = collect(number, g, d.head_dim, there)
    weight = jnp.where(there, jnp.exp2(top - jnp.max(top, axis=0)[None, :]), 0.0)
    scale = weight / jnp.sum(weight * total, axis=0)[None, :]
    cube, plane = (splits, group, width), (group, width)
    number, g = iota(cube, 0), iota(cube, 1)
    there = (number < parts) & (g < d.q_per_kv)

    def piece(i, carry):
        first = i * width
        out = collect(number, g, first + iota(cube, 2), there)
        out = jnp.sum(jnp.where(there, out * scale[:, :, None], 0.0), axis=0)
        element = first + iota(plane, 1)
        _publish_heads(env, tag, sequence, head, iota(plane, 0), element, out)
        return carry

    lax.fori_loop(jnp.int32(0), jnp.int32(d.head_dim // width), piece, jnp.int32(0))


def attend_parts(env: StreamEnv, layer: Array) -> None:
    """This program's parts of the layer's attention; heads of one part are then finished."""
    d, tag = env.dims, env.tag(layer)
    extents = _extents(env, layer)
    counts = [_parts_of(env, extent) * d.num_kv_heads for extent in extents]

    def part_step(j, carry):
        part = _part(env, extents, env.program + j * env.plan.programs)
        first_tile = _load_tile(env, layer, part, jnp.int32(0))
        top, total, out = _attend(env, layer, part, first_tile)

        def publish():
            g, element = iota(out.shape, 0), iota(out.shape, 1)
            finished = out / total[:, None]
            _publish_heads(env, tag, part.sequence, part.head, g, element, finished)

        lax.cond(
            part.parts == 1,
            publish,
            lambda: _hand_over_part(env, tag, part, top, total, out),
        )
        return carry

    mine = env.share(sum(counts[1:], counts[0]))
    lax.fori_loop(jnp.int32(0), mine, part_step, jnp.int32(0))


def prefetch_parts(env: StreamEnv, layer: Array) -> None:
    """Asks for the first keys and values of this program's first part of a layer's attention.

    They are wanted two segments later, and memory would answer too slowly then.
    """
    d = env.dims
    if env.interpret or d.head_dim % 8 or d.cache_elements >= 2**31:
        return
    extents = _extents(env, layer)
    counts = [_parts_of(env, extent) * d.num_kv_heads for extent in extents]
    part = _part(env, extents, env.program)
    has_part = env.program < sum(counts[1:], counts[0])
    has_part &= layer < d.num_layers
    span = jnp.clip(part.stop - part.start, 0, 2 * env.plan.attention.block)
    size = jnp.where(has_part, span * (2 * d.head_dim), 0)
    row = (layer * d.batch + part.sequence) * d.num_kv_heads + part.head
    offset = (row * d.capacity + part.start) * d.head_dim
    ptx.prefetch(env["k"], offset, size)
    ptx.prefetch(env["v"], offset, size)


def combine_parts(env: StreamEnv, layer: Array) -> None:
    """Finishes this program's heads of several parts."""
    d, tag, extents = env.dims, env.tag(layer), _extents(env, layer)

    def head_step(j, carry):
        slot = env.program + j * env.plan.programs
        sequence = lax.div(slot, jnp.int32(d.num_kv_heads))
        parts = jnp.int32(0)
        for b, extent in enumerate(extents):
            parts = jnp.where(sequence == b, _parts_of(env, extent), parts)

        @pl.when(parts > 1)
        def _():
            _combine(env, tag, sequence, slot - sequence * d.num_kv_heads, parts)

        return carry

    heads = env.share(d.batch * d.num_kv_heads)
    lax.fori_loop(jnp.int32(0), heads, head_step, jnp.int32(0))
