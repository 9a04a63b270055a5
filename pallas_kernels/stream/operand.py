"""A segment's operand: collected from the mail, normalised where it is a residual."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.stream import ptx
from pallas_kernels.stream.env import StreamEnv, select
from pallas_kernels.stream.lanes import column_of, first_input, multiplies, next_input, waits
from pallas_kernels.stream.plan import COLUMNS, PIECE, Segment
from pallas_kernels.stream.tiles import Place

__all__ = [
    "Operand",
    "collect_inputs",
    "collect_operand",
    "mean_squares",
    "no_operand",
    "unpacked",
]

# Two bfloat16 of 1.
_ONES = 0x3F803F80
# What each thread holds of a span's activations: int32 `[T]` each, two bfloat16.
Operand = tuple[Array, ...]


def _most_words(env: StreamEnv) -> int:
    return max(p.pieces for p in env.plan.segments.values()) * PIECE // 2


def no_operand(env: StreamEnv) -> Operand:
    """Before the first is collected."""
    return (jnp.zeros((env.plan.threads,), jnp.int32),) * _most_words(env)


def _packed(first: Array, second: Array) -> Array:
    """Two float32 `[T]`, rounded to bfloat16, as one int32."""
    low, high = (
        lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.int16).astype(jnp.int32)
        for x in (first, second)
    )
    return (low & 0xFFFF) | lax.shift_left(high, 16)


def unpacked(word: Array) -> tuple[Array, Array]:
    """The two numbers of a word of an operand, float32."""
    low, high = lax.shift_left(word, 16), word & ~0xFFFF
    return (
        lax.bitcast_convert_type(low, jnp.float32),
        lax.bitcast_convert_type(high, jnp.float32),
    )


def _norm_pieces(env: StreamEnv, name: str, pieces: int, *index: Array) -> list[Array]:
    """A norm's weights of each thread's inputs, two bfloat16 a word; 0 beyond the row."""
    plan, ref = env.plan, env[name]
    first, step, size = first_input(plan, pieces), next_input(plan), plan.dims.model_dim
    if env.interpret:
        elements = [first + q * step + j for q in range(pieces) for j in range(PIECE)]
        values = [
            plgpu.load(ref.at[(*index, jnp.minimum(x, size - 1))], mask=x < size, other=0.0)
            for x in elements
        ]
        pairs = zip(values[::2], values[1::2], strict=True)
        return [_packed(*(x.astype(jnp.float32) for x in pair)) for pair in pairs]
    there = jnp.clip(lax.div(size - first + (step - 1), jnp.int32(step)), 0, pieces)
    row = index[0] * size if index else 0
    return ptx.load_pieces(ref, row + first, step, pieces, there)


def mean_squares(env: StreamEnv, values: list[Array]) -> Array:
    """Mean square of each thread's own sequence, whose residual all threads hold: `[T]`."""
    plan = env.plan
    squares = values[0] * values[0]
    for x in values[1:]:
        squares += x * x
    if plan.chunked:
        total = jnp.broadcast_to(jnp.sum(squares), squares.shape)
    else:
        cube = (plan.num_warps, COLUMNS, 4)
        each = squares.reshape(cube).sum(axis=2).sum(axis=0)
        total = jnp.broadcast_to(each[None, :, None], cube).reshape(squares.shape)
    return total / plan.dims.model_dim


def collect_inputs(
    env: StreamEnv, pieces: int, start: Array | int, row: Array | int, width: Array, tag: Array
) -> list[Array]:
    """Waits for a span of activations.

    Args:
        env: the program's view.
        pieces: of each thread.
        start: word of the mail with which the first sequence's span begins.
        row: words from a sequence to the next.
        width: int32 scalar, inputs of the span; 0 to wait for none.
        tag: they carry.

    Returns:
        Float32 `[T]`, 8 a piece; 0 beyond the span and for padding sequences.
    """
    plan = env.plan
    first, step = first_input(plan, pieces), next_input(plan)
    left = width - first
    if not plan.chunked:
        column = column_of(plan)
        left = jnp.where(column < plan.dims.batch, left, 0)
        start = start + jnp.minimum(column, plan.dims.batch - 1) * row
    # Spans are whole pieces.
    there = jnp.clip(lax.div(left + (step - 1), jnp.int32(step)), 0, pieces)
    if plan.product_warps == plan.num_warps:
        return env.mail.collect_pieces(start + first, step, pieces, tag, there)
    there = jnp.where(waits(plan), there, 0)
    values = env.mail.collect_pieces(start + first, step, pieces, tag, there)
    return [jnp.where(multiplies(plan), value, 0.0) for value in values]


def collect_operand(env: StreamEnv, first: Place) -> Operand:
    """Waits for the activations of the segment that begins with the tile `first`.

    RMSNorm and its rounding to bfloat16 are those of the reference.
    """
    plan, d = env.plan, env.dims
    at, down = env.mail.layout, env.segment(Segment.DOWN)
    segment = first.segment
    layer = jnp.minimum(first.layer, d.num_layers - 1)
    tag = env.tag(first.layer)

    def pack(values: list[Array]) -> Operand:
        words = [_packed(*values[i : i + 2]) for i in range(0, len(values), 2)]
        # Pallas lets no plain constant out of a branch.
        return (*words, *[words[0] * 0] * (_most_words(env) - len(words)))

    def of_hidden() -> Operand:
        column = first.split * down.width
        width = jnp.where(first.real, jnp.minimum(down.width, down.inner - column), 0)
        start = at.ffw + column
        return pack(collect_inputs(env, down.pieces, start, down.inner, width, tag))

    def of_residual() -> Operand:
        pieces = plan.segments[Segment.QKV].pieces
        is_attn = segment == Segment.ATTN_OUT

        def of(name: str, *index: Array) -> Callable[[], Operand]:
            return lambda: tuple(_norm_pieces(env, name, pieces, *index))

        def ones() -> Operand:
            return (jnp.full((plan.threads,), _ONES),) * (pieces * PIECE // 2)

        before = env.features.pre_norm
        ways = [
            of("attn_norm", layer) if before else ones,
            ones,
            of("mlp_norm", layer) if before else ones,
            of("final_norm"),
        ]
        # Asked for before the residual is waited for.
        weights = lax.switch(jnp.minimum(segment, 3), ways)
        start = select(segment, [at.x_in, at.attn, at.x_mid, at.x_in, at.x_in])
        inner = jnp.where(is_attn, jnp.int32(d.attn_dim), jnp.int32(d.model_dim))
        width = jnp.where(first.real, inner, 0)
        x = collect_inputs(env, pieces, start, inner, width, tag)
        scale = lax.rsqrt(mean_squares(env, x) + d.norm_eps)
        is_normed = segment == Segment.HEAD
        if env.features.pre_norm:
            is_normed |= (segment == Segment.QKV) | (segment == Segment.GATE_UP)
        scale = jnp.where(is_normed, scale, 1.0)
        by = [weight for word in weights for weight in unpacked(word)]
        if (offset := env.features.norm_offset) != 0:
            # The attention's output is not normed, and its ones stay ones.
            by = [weight + is_normed.astype(jnp.float32) * offset for weight in by]
        return pack([value * scale * weight for value, weight in zip(x, by, strict=True)])

    return lax.cond(segment == Segment.DOWN, of_hidden, of_residual)
