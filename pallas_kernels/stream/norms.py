"""What RMSNorm of the residual takes: the norm's weights, and mean squares.

Which norm it is follows from the segment whose activations are collected: that of the attention
block, of the feed-forward block, or of the head. The code is one for all: of the three arrays each
thread chooses an address (`ptx.Choice`), not a branch.

A thread loads the weights of the inputs that it holds. Of few inputs they are loaded before the
residual is polled (`norm_weights`), so that they come meanwhile, and wait in registers. Of wide
rows of several sequences there are no registers for that: they are asked for into the L2 cache
before (`ask_for_norm_row`), and loaded where they are multiplied (`norm_row`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.stream import access, ptx
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.exchange import Held
from pallas_kernels.stream.fragment_layout import (
    column_of,
    distances,
    first_input,
    next_input,
    pieces_there,
)
from pallas_kernels.stream.fragments import packed
from pallas_kernels.stream.half2 import RESIDUAL
from pallas_kernels.stream.layout import SharedLayout
from pallas_kernels.stream.plan import COLUMNS, PIECE, Segment, SegmentPlan, StreamPlan

__all__ = [
    "ask_for_norm_row",
    "mean_of",
    "mean_squares",
    "norm_row",
    "norm_weights",
    "unit_of_residual",
]


class _Row(NamedTuple):
    """Where the weights of a residual's norm lie, of the inputs that threads wait for."""

    refs: list[Any]
    beyond: list[Array]  # see `ptx.Choice`
    offset: Array  # of each thread's first one
    there: Array  # int32 `[threads]`, pieces that it has


def _refs(env: StreamEnv) -> list[Any]:
    """The norms' weights: before both blocks, where there are such, and after all."""
    before = ["attn_norm", "mlp_norm"] if env.features.pre_norm else []
    return [env[name] for name in (*before, "final_norm")]


def _row(
    env: StreamEnv, part: SegmentPlan, segment: Array, layer: Array, first: Array | None = None
) -> _Row:
    """Where the weights of a layer's norm lie, before a segment.

    Args:
        env: the program's view.
        part: the segment's plan, or that of another whose fragments are alike.
        segment: int32 scalar.
        layer: of the norm, int32 scalar.
        first: `first_input`, if that is known.
    """
    first = first_input(env.plan, part) if first is None else first
    size, is_head, before = env.dims.model_dim, segment == Segment.HEAD, env.features.pre_norm
    # The final norm has one row: where nothing else is normed, that is what is read.
    row = (1 - is_head.astype(jnp.int32)) * layer * size if before else 0
    there = pieces_there(env.plan, part, size - first)
    beyond = [segment != Segment.QKV, is_head] if before else []
    conditions = [jnp.broadcast_to(condition, first.shape) for condition in beyond]
    return _Row(_refs(env), conditions, row + first, there)


def ask_for_norm_row(env: StreamEnv, part: SegmentPlan, segment: Array, layer: Array) -> None:
    """Asks for a norm's weights into the L2 cache.

    For compiled kernels, and several sequences, all of which need the same weights: of the reads of
    a row, the threads of each column ask for every eighth.
    """
    plan = env.plan
    row, column = _row(env, part, segment, layer), column_of(plan)
    step, pieces = next_input(plan, part), part.held // PIECE
    reads = range(0, part.reads, COLUMNS)
    ptx.prefetch_pieces(
        ptx.Choice(row.refs, row.beyond, row.offset + column * step),
        row.there - column * pieces,
        [read * step for read in reads],
        [read * pieces for read in reads],
    )


def norm_row(env: StreamEnv, part: SegmentPlan, segment: Array, layer: Array) -> ptx.NormRow:
    """A norm's weights, to be loaded when they are wanted: for compiled kernels, several sequences.

    They are ones where the residual is not normed.
    """
    plan, row = env.plan, _row(env, part, segment, layer)
    there, more = row.there, None
    if env.features.pre_norm and plan.dims.model_dim == plan.span_of(part):
        there = None  # every thread has all of its pieces
    if (offset := env.features.norm_offset) != 0:
        more = jnp.full(row.there.shape, offset, jnp.float32)
    if there is not None and not env.features.pre_norm:
        is_head = segment == Segment.HEAD
        there = jnp.where(is_head, there, 0)
        more = more if more is None else jnp.where(is_head, more, 0.0)
    address = env.shared + SharedLayout.of(plan).squares
    places = distances(plan, part)
    weights = ptx.Choice(row.refs, row.beyond, row.offset)
    return ptx.NormRow(weights, there, places, more, address, plan.num_warps)


def norm_weights(
    env: StreamEnv, part: SegmentPlan, segment: Array, layer: Array
) -> tuple[list[Array], Array | None]:
    """Norm weights for each thread's inputs, and whether to apply the norm (None: always).

    Args:
        env: the program's view.
        part: plan of a segment whose fragments are alike.
        segment: int32 scalar, which segment the activations are for: it picks the norm.
        layer: int32 scalar, the norm's.

    Returns:
        The weights, int32 `[threads]` each: two bfloat16 a word, 0 beyond the row. For a single
        sequence, ones where the norm is not applied. And a bool scalar, or None.
    """
    plan, first = env.plan, first_input(env.plan, part)
    is_head, before = segment == Segment.HEAD, env.features.pre_norm
    is_normed = is_head
    if before:
        is_normed |= (segment == Segment.QKV) | (segment == Segment.GATE_UP)
    if env.interpret:
        words = _interpreted(env, part, segment, layer, first)
    else:
        row = _row(env, part, segment, layer, first)
        places = distances(plan, part)
        words = ptx.load_pieces(row.refs, row.beyond, row.offset, places, row.there)
    if not plan.chunked:  # attention's output is collected elsewhere
        return words, None if before else is_head
    return [jnp.where(is_normed, word, jnp.int32(ptx.ONES)) for word in words], is_normed


def _interpreted(
    env: StreamEnv, part: SegmentPlan, segment: Array, layer: Array, first: Array
) -> list[Array]:
    """What `ptx.load_pieces` loads, by loads of the norm that it is."""
    refs, size = _refs(env), env.dims.model_dim
    elements = [first + x + j for x in distances(env.plan, part) for j in range(PIECE)]

    def read(ref: Any, *index: Array) -> Callable[[], tuple[Array, ...]]:
        where = [(*index, jnp.minimum(x, size - 1)) for x in elements]
        return lambda: tuple(
            access.load(ref.at[at], mask=x < size, other=0.0).astype(jnp.float32)
            for at, x in zip(where, elements, strict=True)
        )

    ways = [*(read(ref, layer) for ref in refs[:-1]), read(refs[-1])]
    is_head = segment == Segment.HEAD
    number = jnp.where(is_head, 2, jnp.where(segment == Segment.QKV, 0, 1))
    # A model without norms before its blocks has one way.
    values = lax.switch(number if env.features.pre_norm else jnp.int32(0) * segment, ways)
    return [packed(*values[i : i + 2]) for i in range(0, len(values), 2)]


def unit_of_residual(plan: StreamPlan) -> float:
    """The unit of the residual in the exchange: what `collect_inputs` gives, times this, is x."""
    return RESIDUAL.unit if plan.half2 else 1.0


def mean_squares(env: StreamEnv, values: list[Array] | Held) -> Array:
    """Mean square of each thread's own sequence: float32 `[threads]`.

    The threads together hold the whole residual. Sums of several sequences go through shared
    memory: a barrier of the program must stand before the next call.

    Args:
        env: the program's view.
        values: float32 `[threads]` each, as the residual was handed over; or it as it came.
    """
    plan = env.plan
    # Few numbers a thread, of one sequence, are no faster that way.
    if isinstance(values, Held) or not (env.interpret or plan.chunked):
        some, form = (values.words, values.form) if isinstance(values, Held) else (values, None)
        address = env.shared + SharedLayout.of(plan).squares
        return mean_of(plan, ptx.sum_squares(address, some, plan.num_warps, form))
    squares = values[0] * values[0]
    for x in values[1:]:
        squares += x * x
    if plan.chunked:
        total = jnp.broadcast_to(jnp.sum(squares), squares.shape)
    else:
        cube = (plan.num_warps, COLUMNS, 4)
        each = squares.reshape(cube).sum(axis=2).sum(axis=0)
        total = jnp.broadcast_to(each[None, :, None], cube).reshape(squares.shape)
    return mean_of(plan, total)


def mean_of(plan: StreamPlan, squares: Array) -> Array:
    """The mean square of the residual, of the sum of its squares as it was handed over."""
    return squares / (plan.dims.model_dim / unit_of_residual(plan) ** 2)
