"""What RMSNorm of the residual takes: the norm's weights, and mean squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.stream import access, ptx
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.fragment_layout import distances, first_input, pieces_there
from pallas_kernels.stream.fragments import packed
from pallas_kernels.stream.half2 import RESIDUAL
from pallas_kernels.stream.layout import SharedLayout
from pallas_kernels.stream.plan import COLUMNS, PIECE, Segment, SegmentPlan, StreamPlan

__all__ = ["mean_squares", "norm_weights", "unit_of_residual"]

# Two bfloat16 of 1.
_ONES = 0x3F803F80


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
    plan, d = env.plan, env.dims
    first, size = first_input(plan, part), d.model_dim
    is_head, before = segment == Segment.HEAD, env.features.pre_norm
    is_normed = is_head
    if before:
        is_normed |= (segment == Segment.QKV) | (segment == Segment.GATE_UP)
    refs = [env["attn_norm"], env["mlp_norm"], env["final_norm"]] if before else [env["final_norm"]]
    if env.interpret:
        elements = [first + x + j for x in distances(plan, part) for j in range(PIECE)]

        def read(ref: Any, *index: Array) -> Callable[[], tuple[Array, ...]]:
            where = [(*index, jnp.minimum(x, size - 1)) for x in elements]
            return lambda: tuple(
                access.load(ref.at[at], mask=x < size, other=0.0).astype(jnp.float32)
                for at, x in zip(where, elements, strict=True)
            )

        ways = [*(read(ref, layer) for ref in refs[:-1]), read(refs[-1])]
        number = jnp.where(is_head, 2, jnp.where(segment == Segment.QKV, 0, 1))
        values = lax.switch(number if before else jnp.int32(0) * segment, ways)
        words = [packed(*values[i : i + 2]) for i in range(0, len(values), 2)]
    else:
        # The final norm has one row: where nothing else is normed, that is what is read.
        row = (1 - is_head.astype(jnp.int32)) * layer * size if before else 0
        there = pieces_there(plan, part, size - first)
        beyond = [segment != Segment.QKV, is_head] if before else []
        conditions = [jnp.broadcast_to(condition, first.shape) for condition in beyond]
        words = ptx.load_pieces(refs, conditions, row + first, distances(plan, part), there)
    if not plan.chunked:  # attention's output is collected elsewhere
        return words, None if before else is_head
    return [jnp.where(is_normed, word, jnp.int32(_ONES)) for word in words], is_normed


def unit_of_residual(plan: StreamPlan) -> float:
    """The unit of the residual in the exchange: what `collect_inputs` gives, times this, is x."""
    return RESIDUAL.unit if plan.half2 else 1.0


def mean_squares(env: StreamEnv, values: list[Array]) -> Array:
    """Mean square of each thread's own sequence: float32 `[threads]`.

    The threads together hold the whole residual. Sums of several sequences go through shared
    memory: a barrier of the program must stand before the next call.

    Args:
        env: the program's view.
        values: float32 `[threads]` each, as the residual was handed over.
    """
    plan = env.plan
    count = plan.dims.model_dim / unit_of_residual(plan) ** 2
    if not (env.interpret or plan.chunked):  # few numbers a thread are no faster that way
        address = env.shared + SharedLayout.of(plan).squares
        return ptx.sum_squares(address, values, plan.num_warps) / count
    squares = values[0] * values[0]
    for x in values[1:]:
        squares += x * x
    if plan.chunked:
        total = jnp.broadcast_to(jnp.sum(squares), squares.shape)
    else:
        cube = (plan.num_warps, COLUMNS, 4)
        each = squares.reshape(cube).sum(axis=2).sum(axis=0)
        total = jnp.broadcast_to(each[None, :, None], cube).reshape(squares.shape)
    return total / count
