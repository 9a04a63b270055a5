"""The stream: which tile is the i-th, how it is loaded, multiplied and summed."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.program import iota
from pallas_kernels.stream import ptx
from pallas_kernels.stream.env import StreamEnv, select
from pallas_kernels.stream.plan import LAYER_SEGMENTS, Segment

__all__ = ["Place", "load_weights", "locate", "place_of", "prefetch_weights", "tile_sums"]

_WEIGHTS = {
    Segment.QKV: "w_qkv",
    Segment.ATTN_OUT: "w_attn_out",
    Segment.GATE_UP: "w_gate_up",
    Segment.DOWN: "w_down",
    Segment.HEAD: "w_head",
}


class Place(NamedTuple):
    """Where in the step a tile stands: scalars, int32 and bool."""

    segment: Array
    layer: Array  # of the segment; the head's and the embedding's are L and 0
    number: Array  # of the tile among this program's of the segment
    group: Array  # of rows
    split: Array  # which part of the inputs
    real: Array  # whether there is such a group: else the tile is empty
    last: Array  # whether it is the program's last of the segment


def place_of(env: StreamEnv, segment: Array, layer: Array, number: Array) -> Place:
    """The place of this program's `number`-th tile of a segment."""
    splits, teams = env.of_segment(segment, "splits"), env.of_segment(segment, "teams")
    groups, tiles = env.of_segment(segment, "groups"), env.of_segment(segment, "tiles")
    team = lax.div(env.program, splits)
    group = number * teams + team
    no_weights = segment == Segment.EMBED
    return Place(
        segment=segment,
        layer=layer,
        number=number,
        group=group,
        split=env.program - team * splits,
        # A program that no team has room for has no work.
        real=(group < groups) & (team < teams) & ~no_weights,
        last=(number == tiles - 1) | no_weights,
    )


def locate(env: StreamEnv, index: Array) -> Place:
    """The place of this program's `index`-th tile of the whole step."""
    plan = env.plan
    in_layers = index - 1  # the embedding's comes first
    layer = lax.div(in_layers, jnp.int32(plan.layer_tiles))
    number = in_layers - layer * plan.layer_tiles
    is_embed, is_head = index == 0, layer >= plan.dims.num_layers
    segment, start = jnp.int32(0), jnp.int32(0)
    end = 0
    for s in LAYER_SEGMENTS[:-1]:
        end += env.segment(s).tiles
        beyond = number >= end
        segment = jnp.where(beyond, jnp.int32(s + 1), segment)
        start = jnp.where(beyond, jnp.int32(end), start)
    head_start = jnp.int32(plan.dims.num_layers * plan.layer_tiles)
    segment = jnp.where(is_head, jnp.int32(Segment.HEAD), segment)
    number = jnp.where(is_head, in_layers - head_start, number - start)
    layer = jnp.where(is_head, jnp.int32(plan.dims.num_layers), layer)
    return place_of(
        env,
        jnp.where(is_embed, jnp.int32(Segment.EMBED), segment),
        jnp.where(is_embed, jnp.int32(0), layer),
        jnp.where(is_embed, jnp.int32(0), number),
    )


def group_rows(env: StreamEnv, segment: Array, group: Array, row: Array) -> Array:
    """Row of the segment's matrix that the group's `row`-th is, int32.

    What is combined lies in neighbouring rows of a tile, and so in one warp's registers: the
    two elements that RoPE rotates, a row of the gate and the same one of the up projection.
    """
    d, half = env.dims, env.plan.rows // 2
    pair = group * half + lax.div(row, jnp.int32(2))
    second = lax.rem(row, jnp.int32(2))
    per_head = jnp.int32(d.head_dim // 2)
    head = lax.div(pair, per_head)
    qkv = head * d.head_dim + (pair - head * per_head) + second * (d.head_dim // 2)
    gate_up = pair + second * d.ffw_dim
    plain = group * env.plan.rows + row
    out = jnp.where(segment == Segment.GATE_UP, gate_up, plain)
    return jnp.where(segment == Segment.QKV, qkv, out)


def load_weights(env: StreamEnv, place: Place) -> Array:
    """The tile, bfloat16 `[rows * chunks, depth]`; 0 beyond the matrix."""
    plan = env.plan
    plans = plan.segments.values()
    shape = (plan.rows * plan.chunks, plan.depth)
    matrix_row, piece = iota(shape, 0), iota(shape, 1)
    row = lax.div(matrix_row, jnp.int32(plan.chunks))
    within = lax.rem(matrix_row, jnp.int32(plan.chunks)) * plan.depth + piece
    inner = env.of_segment(place.segment, "inner")
    width = env.of_segment(place.segment, "width")
    column = place.split * width + within
    rows = group_rows(env, place.segment, place.group, row)
    mask = jnp.broadcast_to(place.real, shape)
    if any(p.width != plan.chunks * plan.depth for p in plans):
        mask &= within < width
    if any(p.inner % p.width for p in plans):
        mask &= column < inner
    if any(p.groups * _group_out(env, s) != p.out for s, p in plan.segments.items()):
        mask &= _is_there(env, place, row)
    return ptx.load_tile(
        _weights(env),
        jnp.minimum(place.segment, jnp.int32(Segment.HEAD)),
        jnp.minimum(place.layer, env.dims.num_layers - 1),
        rows,
        column,
        inner,
        mask,
        interpret=env.interpret,
    )


def prefetch_weights(env: StreamEnv, place: Place) -> None:
    """Asks for the tile, so that it is in the L2 cache when it is loaded."""
    inner = env.of_segment(place.segment, "inner")
    width = env.of_segment(place.segment, "width")
    row = iota((env.plan.rows,), 0)
    rows = group_rows(env, place.segment, place.group, row)
    ptx.prefetch_rows(
        _weights(env),
        jnp.minimum(place.segment, jnp.int32(Segment.HEAD)),
        jnp.minimum(place.layer, env.dims.num_layers - 1),
        rows,
        place.split * width,
        inner,
        jnp.minimum(width, inner - place.split * width),
        _is_there(env, place, row) & place.real,
        interpret=env.interpret,
    )


def _weights(env: StreamEnv) -> list[Any]:
    """The arrays in the order of `Segment`."""
    return [env[_WEIGHTS[s]] for s in sorted(_WEIGHTS)]


def _group_out(env: StreamEnv, segment: Segment) -> int:
    """Outputs of a group."""
    return env.plan.rows // 2 if segment == Segment.GATE_UP else env.plan.rows


def _is_there(env: StreamEnv, place: Place, row: Array) -> Array:
    """Whether the group's `row`-th row is one of the matrix; bool."""
    outputs = select(place.segment, [_group_out(env, s) for s in sorted(env.plan.segments)])
    per_output = lax.div(jnp.int32(env.plan.rows), outputs)  # 2 where rows are combined in pairs
    output = place.group * outputs + lax.div(row, per_output)
    return output < env.of_segment(place.segment, "out")


def tile_sums(env: StreamEnv, tile: Array, vectors: Array) -> Array:
    """A tile's dot products with the operand, float32 `[rows, Bp]`.

    Args:
        env: the program's view.
        tile: from `load_weights`.
        vectors: bfloat16 `[columns, depth]`, column c * Bp + b piece c of sequence b.
    """
    plan, bp = env.plan, env.plan.padded_batch
    product = env.dot(tile, vectors, transpose_b=True)
    chunk_of_row = lax.rem(iota(product.shape, 0), jnp.int32(plan.chunks))
    chunk_of_column = lax.div(iota(product.shape, 1), jnp.int32(bp))
    # A select, not a product with a mask: what lies off the diagonal may be NaN.
    wanted = jnp.where(chunk_of_row == chunk_of_column, product, 0.0)
    per_chunk = wanted.reshape(plan.rows * plan.chunks, plan.columns // bp, bp).sum(axis=1)
    return per_chunk.reshape(plan.rows, plan.chunks, bp).sum(axis=1)
