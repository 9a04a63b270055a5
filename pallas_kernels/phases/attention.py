"""Attention over the live cache, the new position included.

Work is dealt out in parts: a part is one sequence, one key/value head with the G query
heads that share it, and one span of positions (`plan.AttentionPlan`). Softmax is taken
online over the tiles of a span (Milakov and Gimelshein, arXiv 1805.02867). Where a head
has several parts, each leaves its maximum, sum and weighted values in scratch, and the
part that arrives last combines them in the order of their spans, whoever it is.

A program loads the first tile of its span before it waits for the phase before: all but
the new position lie in the cache already. The new one is added by the head's last part.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dims import next_power_of_2
from pallas_kernels.env import Env, Wait, no_wait
from pallas_kernels.program import iota

__all__ = ["attention"]

# Tensor cores multiply at least 16 rows: the G query heads are padded to as many.
QUERY_ROWS = 16
# Stands for minus infinity: it survives a subtraction from itself.
LOWEST = -1e30
# Float32 words of one tile while parts are combined: 64 registers of 128 threads.
COMBINE_TILE = 8192


class _Part(NamedTuple):
    """One part: scalars, int32."""

    sequence: Array  # b
    head: Array  # of K
    number: Array  # which of the head's parts
    parts: Array  # how many it has
    length: Array  # live positions before this step
    start: Array  # first cached position of the span
    stop: Array  # one past its last cached position


def _cdiv(a: Array, b: int) -> Array:
    return lax.div(a + (b - 1), jnp.int32(b))


def _span(env: Env, length: Array) -> Array:
    """Positions of a span, for a sequence of `length` positions and a new one."""
    cut = env.plan.attention
    equal = _cdiv(_cdiv(length + 1, cut.max_splits), cut.block) * cut.block
    return jnp.maximum(equal, cut.min_span)


def _lengths(env: Env) -> list[Array]:
    """Each sequence's live positions; a full cache's new position is not stored."""
    return [jnp.minimum(length, env.dims.capacity) for length in env.lengths]


def _total_parts(env: Env) -> Array:
    heads = env.dims.num_kv_heads
    counts = [_cdiv_dynamic(n + 1, _span(env, n)) * heads for n in _lengths(env)]
    return sum(counts[1:], counts[0])


def _cdiv_dynamic(a: Array, b: Array) -> Array:
    return lax.div(a + b - 1, b)


def _part(env: Env, number: Array) -> _Part:
    """The `number`-th part of the step: sequences in order, then spans, then heads."""
    heads = env.dims.num_kv_heads
    offset = before = sequence = length = jnp.int32(0)
    for b, n in enumerate(_lengths(env)):
        here = number >= offset
        before = jnp.where(here, offset, before)
        sequence = jnp.where(here, b, sequence)
        length = jnp.where(here, n, length)
        offset = offset + _cdiv_dynamic(n + 1, _span(env, n)) * heads
    within = number - before
    index = lax.div(within, jnp.int32(heads))
    span = _span(env, length)
    start = index * span
    return _Part(
        sequence=sequence,
        head=within - index * heads,
        number=index,
        parts=_cdiv_dynamic(length + 1, span),
        length=length,
        start=start,
        stop=jnp.minimum(start + span, length),
    )


def _load_tile(env: Env, layer: Array, part: _Part, i: Array) -> tuple[Array, Array]:
    """Keys and values of the i-th tile of the part's span, `[block, H]`; 0 beyond it."""
    shape = (env.plan.attention.block, env.dims.head_dim)
    position = part.start + i * shape[0] + iota(shape, 0)
    live = position < part.stop
    where = (layer, part.sequence, part.head, position, iota(shape, 1))
    keys = plgpu.load(env["k"].at[where], mask=live, other=0.0)
    values = plgpu.load(env["v"].at[where], mask=live, other=0.0)
    return keys, values


def _attend(
    env: Env, layer: Array, part: _Part, first_tile: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    """Softmax attention over the part's span.

    Returns:
        Maximum `[16]` of the scores in base 2, sum `[16]` of the weights, and
        weighted values `[16, H]`, float32; padding rows hold copies.
    """
    d, block = env.dims, env.plan.attention.block
    shape = (QUERY_ROWS, d.head_dim)
    # Rows of padding repeat the last head; nobody stores what comes of them.
    head = part.head * d.q_per_kv + jnp.minimum(iota(shape, 0), d.q_per_kv - 1)
    q = plgpu.load(env["q"].at[part.sequence, head * d.head_dim + iota(shape, 1)])
    # The new position, in every row. A full cache has none: its logits are NaN anyway.
    new = (layer, part.sequence, part.head, jnp.minimum(part.length, d.capacity - 1))
    key = plgpu.load(env["k"].at[(*new, iota(shape, 1))]).astype(jnp.float32)
    value = plgpu.load(env["v"].at[(*new, iota(shape, 1))]).astype(jnp.float32)
    has_new = part.number == part.parts - 1
    top = jnp.where(has_new, jnp.sum(q * key, axis=1), LOWEST)
    nothing = jnp.zeros((QUERY_ROWS,), jnp.float32)
    total = jnp.where(has_new, jnp.ones_like(nothing), nothing)
    out = jnp.where(has_new, value, jnp.zeros_like(q))

    def add_tile(i, keys, values, state):
        top, total, out = state
        scores = env.dot_split(q, keys, transpose_b=True)  # [16, block]
        seen = part.start + i * block + iota(scores.shape, 1) < part.stop
        scores = jnp.where(seen, scores, LOWEST)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_top[:, None])
        weights = jnp.where(seen, weights, 0.0)
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=1)
        out = out * shrink[:, None] + env.dot_split(weights, values)
        return new_top, total, out

    def tile_step(i, state):
        return add_tile(i, *_load_tile(env, layer, part, i), state)

    state = add_tile(jnp.int32(0), *first_tile, (top, total, out))
    tiles = _cdiv(part.stop - part.start, block)
    return lax.fori_loop(jnp.int32(1), tiles, tile_step, state)


def _store_heads(env: Env, part: _Part, g: Array, element: Array, out: Array, real: Array) -> None:
    """Stores finished heads as part of the output projection's operand."""
    d, depth = env.dims, env.plan.attn_out.depth
    i = (part.head * d.q_per_kv + g) * d.head_dim + element
    row = lax.div(i, jnp.int32(depth)) * env.plan.padded_batch + part.sequence
    column = lax.rem(i, jnp.int32(depth))
    plgpu.store(env["attn_operand"].at[row, column], out.astype(jnp.bfloat16), mask=real)


def _combine(env: Env, part: _Part, slot: Array) -> None:
    """Combines all parts of a head, in order."""
    d, splits = env.dims, env.plan.attention.max_splits
    group = next_power_of_2(d.q_per_kv)
    width = d.head_dim
    while splits * group * width > COMBINE_TILE:
        width //= 2
    shape = (splits, group)
    split, g = iota(shape, 0), iota(shape, 1)
    there = (split < part.parts) & (g < d.q_per_kv)
    top = plgpu.load(env["part_max"].at[slot, split, g], mask=there, other=LOWEST)
    total = plgpu.load(env["part_sum"].at[slot, split, g], mask=there, other=0.0)
    highest = jnp.max(top, axis=0)
    weight = jnp.exp2(top - highest[None, :])
    weight = jnp.where(there, weight, 0.0)
    scale = weight / jnp.sum(weight * total, axis=0)[None, :]
    cube = (splits, group, width)
    split, g = iota(cube, 0), iota(cube, 1)
    there = (split < part.parts) & (g < d.q_per_kv)
    for first in range(0, d.head_dim, width):
        element = first + iota(cube, 2)
        out = plgpu.load(env["part_out"].at[slot, split, g, element], mask=there, other=0.0)
        out = jnp.sum(out * scale[:, :, None], axis=0)
        plane = (group, width)
        _store_heads(
            env, part, iota(plane, 0), first + iota(plane, 1), out, iota(plane, 0) < d.q_per_kv
        )


def attention(env: Env, layer: Array, wait: Wait = no_wait) -> None:
    """This program's parts of the layer's attention."""
    d = env.dims
    mine = env.share(_total_parts(env))

    def part_of(j):
        return _part(env, env.program + j * env.plan.programs)

    def first_tile(j):
        part = part_of(j)
        # A program without a j-th part loads nothing.
        part = part._replace(stop=jnp.where(j < mine, part.stop, 0))
        return _load_tile(env, layer, part, jnp.int32(0))

    ahead = first_tile(jnp.int32(0))
    wait()

    def part_step(j, tile):
        part = part_of(j)
        top, total, out = _attend(env, layer, part, tile)
        g, element = iota(out.shape, 0), iota(out.shape, 1)
        real = g < d.q_per_kv

        @pl.when(part.parts == 1)
        def _():
            _store_heads(env, part, g, element, out / total[:, None], real)

        @pl.when(part.parts > 1)
        def _():
            slot = part.sequence * d.num_kv_heads + part.head
            row = iota((QUERY_ROWS,), 0)
            in_group = row < d.q_per_kv
            plgpu.store(env["part_max"].at[slot, part.number, row], top, mask=in_group)
            plgpu.store(env["part_sum"].at[slot, part.number, row], total, mask=in_group)
            plgpu.store(env["part_out"].at[slot, part.number, g, element], out, mask=real)
            last = env.sync.last_of_head(slot, part.parts)

            @pl.when(last)
            def _():
                _combine(env, part, slot)

        return first_tile(j + 1)

    lax.fori_loop(jnp.int32(0), mine, part_step, ahead)
