"""A segment's operand: collected from the exchange, normalised where it is a residual."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.stream import access, ptx
from pallas_kernels.stream.env import StreamEnv, select
from pallas_kernels.stream.exchange_order import word_in_exchange
from pallas_kernels.stream.half2 import PLAIN, RESIDUAL, Format
from pallas_kernels.stream.lanes import (
    column_of,
    distances,
    first_input,
    multiplies,
    next_input,
    piece_step,
    place_of_offset,
    waits,
)
from pallas_kernels.stream.layout import SharedLayout, offset_pitch
from pallas_kernels.stream.plan import COLUMNS, PIECE, PRODUCT, Segment, SegmentPlan, StreamPlan
from pallas_kernels.stream.ring import fed_otherwise
from pallas_kernels.stream.tiles import Place

__all__ = [
    "Operand",
    "collect_inputs",
    "collect_operand",
    "copy_of_hidden",
    "inputs_of",
    "mean_squares",
    "no_operand",
    "pieces_there",
]

# Two bfloat16 of 1.
_ONES = 0x3F803F80
# Activations of a thread that make code so long that two of its kind would not be kept at hand.
_MANY = 128


class Operand(NamedTuple):
    """What each thread holds of a span's activations.

    Attributes:
        words: int32 `[T]` each: two bfloat16, or digits as `ptx.pack_digits` has them.
        scale: of digits, float32 `[T]`; None where no matrix is quantized.
    """

    words: tuple[Array, ...]
    scale: Array | None


def _most_words(env: StreamEnv) -> int:
    return max(p.pieces for p in env.plan.segments.values()) * PIECE // 2


def no_operand(env: StreamEnv) -> Operand:
    """Before the first is collected."""
    shape = (env.plan.threads,)
    words = (jnp.zeros(shape, jnp.int32),) * _most_words(env)
    return Operand(words, jnp.zeros(shape, jnp.float32) if env.plan.quantized else None)


def _packed(first: Array, second: Array) -> Array:
    """Two float32 `[T]`, rounded to bfloat16, as one int32."""
    low, high = (
        lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.int16).astype(jnp.int32)
        for x in (first, second)
    )
    return (low & 0xFFFF) | lax.shift_left(high, 16)


def inputs_of(part: SegmentPlan, operand: Operand) -> list[Array]:
    """A segment's operand as numbers, for interpret mode: float32 `[T]`, inputs in order."""
    words = operand.words[: part.pieces * PIECE // 2]
    if part.bits == 16:
        return [x for word in words for x in _unpacked(word)]
    assert operand.scale is not None
    halved = part.held != part.grain
    return ptx.unpack_digits(words, operand.scale, part.bits, halved=halved, held=part.held)


def _unpacked(word: Array) -> tuple[Array, Array]:
    """The two numbers of a word of two bfloat16, float32."""
    low, high = lax.shift_left(word, 16), word & ~0xFFFF
    return (
        lax.bitcast_convert_type(low, jnp.float32),
        lax.bitcast_convert_type(high, jnp.float32),
    )


def pieces_there(plan: StreamPlan, part: SegmentPlan, left: Array) -> Array:
    """Of so many inputs from each thread's first on, the pieces that it has: int32."""
    step = next_input(plan, part)
    if part.grain == PIECE:  # a read is a piece
        return jnp.clip(lax.div(left + (step - 1), jnp.int32(step)), 0, part.pieces)
    left = jnp.maximum(left, 0)
    lines = lax.div(left, jnp.int32(step))
    a_read = part.held // PIECE
    size = piece_step(plan, part)
    rest = lax.div(left - lines * step + (size - 1), jnp.int32(size))
    return jnp.minimum(lines * a_read + jnp.minimum(rest, a_read), part.pieces)


def _norm_weights(
    env: StreamEnv, part: SegmentPlan, segment: Array, layer: Array
) -> tuple[list[Array], Array | None]:
    """A residual's norm's weights of each thread's inputs, and whether it is normed: None if it is.

    Two bfloat16 a word; 0 beyond the row; of a single sequence, ones where it is not normed.
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
        words = [_packed(*values[i : i + 2]) for i in range(0, len(values), 2)]
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
    """What the residual is handed over in multiples of."""
    return RESIDUAL.unit if plan.half2 else 1.0


def mean_squares(env: StreamEnv, values: list[Array]) -> Array:
    """Mean square of each thread's own sequence, whose residual all threads hold: float32 `[T]`.

    Before the next time, a barrier must stand.

    Args:
        env: the program's view.
        values: float32 `[T]` each, as the residual was handed over.
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


def collect_inputs(
    env: StreamEnv,
    part: SegmentPlan,
    start: Array | int,
    width: Array,
    tag: Array,
    form: Format,
    before: Array | int = 0,
) -> list[Array]:
    """Waits for a span of activations.

    Args:
        env: the program's view.
        part: a segment that has such an operand.
        start: word of the exchange with which the activations begin.
        width: int32 scalar, inputs of the span; 0 to wait for none.
        tag: they carry.
        form: of the numbers, where a word has two.
        before: activations of a sequence before the span.

    Returns:
        Float32 `[T]`, 8 a piece; 0 beyond the span and for padding sequences.
    """
    plan = env.plan
    first = first_input(plan, part)
    left, own = width - first, 0
    if not plan.chunked:
        column = column_of(plan)
        left = jnp.where(column < plan.dims.columns, left, 0)
        own = jnp.minimum(column, plan.dims.columns - 1)
    there = pieces_there(plan, part, left)
    offset = start + word_in_exchange(plan, part, own, before + first)
    places = [word_in_exchange(plan, part, 0, place) for place in distances(plan, part)]
    half2 = form if plan.half2 else None
    collect = functools.partial(env.exchange.collect_pieces, offset, places, tag, half2=half2)
    if plan.product_warps == plan.num_warps:
        return collect(there)
    values = collect(jnp.where(waits(plan), there, 0))
    return [jnp.where(multiplies(plan), value, 0.0) for value in values]


def _pack(env: StreamEnv, part: SegmentPlan, values: list[Array]) -> Operand:
    """Activations as the segment's weights want them."""
    scale = jnp.zeros_like(values[0]) if env.plan.quantized else None
    if part.bits == 16:
        words = [_packed(*values[i : i + 2]) for i in range(0, len(values), 2)]
    else:
        halved = part.held != part.grain
        how = {"halved": halved, "held": part.held, "interpret": env.interpret}
        words, scale = ptx.pack_digits(values, part.bits, **how)
        _sum_groups(env, part, words)
    # Pallas lets no plain constant out of a branch.
    rest = [words[0] * 0] * (_most_words(env) - len(words))
    return Operand((*words, *rest), scale)


def _sum_groups(env: StreamEnv, part: SegmentPlan, words: list[Array]) -> None:
    """Puts the sums of each group's digits where products find them, if weights have an offset.

    They are the same for all rows of the matrix. Each warp makes those that it uses.
    """
    plan = env.plan
    if part.grouping is None or part.grouping.offset is None or env.interpret:
        return
    start, size = env.shared + SharedLayout.of(plan).offsets, offset_pitch(plan)
    ptx.sum_groups(
        place_of_offset(plan, part, start, size),
        words,
        ptx.GroupSums(
            reads=part.reads,
            by_sixteen=part.bits == 4,
            chunked=plan.chunked,
            fine=part.fine,
            threads=32 * plan.product_warps,
            products=part.grouping.size // PRODUCT,
        ),
    )


class _Wanted(NamedTuple):
    """What is waited for: scalars, int32 but for `is_down`."""

    first: Place
    layer: Array  # of the norm
    tag: Array
    is_down: Array
    before: Array  # hidden activations before the program's span
    hidden: Array  # those of the span


def _wanted(env: StreamEnv, first: Place) -> _Wanted:
    is_head = first.segment == Segment.HEAD
    tag = jnp.where(is_head, env.head_tag, env.tag(first.layer))
    layer = jnp.minimum(first.layer, env.dims.num_layers - 1)
    down = env.segment(Segment.DOWN)
    is_down = first.segment == Segment.DOWN
    before = first.split * down.width
    hidden = jnp.minimum(down.width, down.inner - before)
    return _Wanted(first, layer, tag, is_down, before, hidden)


def copy_of_hidden(env: StreamEnv) -> Array:
    """Where the hidden activations begin that this program reads, int32."""
    at = env.exchange.layout
    if env.plan.tuning.hidden_copies == 1:
        return jnp.int32(at.ffw)
    return jnp.where(env.program & 1 == 0, jnp.int32(at.ffw), jnp.int32(at.ffw_copy))


def _of_attention(env: StreamEnv, wanted: _Wanted) -> Operand:
    """Attention's output."""
    attn = env.segment(Segment.ATTN_OUT)
    width = jnp.where(wanted.first.real, jnp.int32(attn.inner), 0)
    start = env.exchange.layout.attn
    return _pack(env, attn, collect_inputs(env, attn, start, width, wanted.tag, PLAIN))


def _of_hidden(env: StreamEnv, wanted: _Wanted) -> Operand:
    """The hidden activations of the program's span."""
    down, start = env.segment(Segment.DOWN), copy_of_hidden(env)
    width = jnp.where(wanted.first.real, wanted.hidden, 0)
    # This wait is a short one: tiles of the ring would queue behind what goes to the L2 cache.
    quiet = fed_otherwise(env, l2_tiles=0)
    values = collect_inputs(quiet, down, start, width, wanted.tag, PLAIN, wanted.before)
    return _pack(env, down, values)


def _of_either(env: StreamEnv, wanted: _Wanted) -> Operand:
    """Attention's output or hidden activations, by the same code."""
    at, is_down = env.exchange.layout, wanted.is_down
    attn, down = env.segment(Segment.ATTN_OUT), env.segment(Segment.DOWN)
    start = jnp.where(is_down, copy_of_hidden(env), jnp.int32(at.attn))
    inner = jnp.where(is_down, jnp.int32(down.inner), jnp.int32(attn.inner))
    width = jnp.where(wanted.first.real, jnp.where(is_down, wanted.hidden, inner), 0)
    skip = jnp.where(is_down, wanted.before, 0)
    quiet = fed_otherwise(env, l2_tiles=0)
    return _pack(env, attn, collect_inputs(quiet, attn, start, width, wanted.tag, PLAIN, skip))


def _of_residual(env: StreamEnv, wanted: _Wanted, part: SegmentPlan) -> Operand:
    """The residual, normed; of a single sequence perhaps attention's output, as it is.

    Args:
        env: the program's view.
        wanted: what is waited for.
        part: the segment's plan, or that of another with the same kind of operand.
    """
    plan, d, at, segment = env.plan, env.dims, env.exchange.layout, wanted.first.segment
    is_attn = segment == Segment.ATTN_OUT
    # Asked for before the residual is waited for.
    weights, is_normed = _norm_weights(env, part, segment, wanted.layer)
    if plan.chunked:  # attention's output may be meant: what is done to it besides is little
        start = select(segment, [at.x_in, at.attn, at.x_mid, at.x_in, at.x_head])
        inner = jnp.where(is_attn, jnp.int32(d.attn_dim), jnp.int32(d.model_dim))
    else:
        start = select(segment, [at.x_in, at.x_in, at.x_mid, at.x_in, at.x_head])
        inner = jnp.int32(d.model_dim)
    width = jnp.where(wanted.first.real, inner, 0)
    x = collect_inputs(env, part, start, width, wanted.tag, RESIDUAL)
    scale = lax.rsqrt(mean_squares(env, x) + d.norm_eps)
    if is_normed is not None:
        scale = jnp.where(is_normed, scale, 1.0)
    if (unit := unit_of_residual(plan)) != 1:
        scale *= unit
    by = [weight for word in weights for weight in _unpacked(word)]
    if (offset := env.features.norm_offset) != 0:
        # Ones stay ones.
        more = offset if is_normed is None else is_normed.astype(jnp.float32) * offset
        by = [weight + more for weight in by]
    if is_normed is not None and not plan.chunked:
        by = [jnp.where(is_normed, weight, 1.0) for weight in by]
    if part.bits == 16:
        return _pack(env, part, [v * scale * w for v, w in zip(x, by, strict=True)])
    operand = _pack(env, part, [v * w for v, w in zip(x, by, strict=True)])
    assert operand.scale is not None
    return operand._replace(scale=operand.scale * scale)


def collect_operand(env: StreamEnv, first: Place) -> Operand:
    """Waits for the activations of the segment that begins with the tile `first`.

    RMSNorm is that of the reference, and so is its rounding to bfloat16; digits have its scale in
    theirs.
    """
    plan, wanted = env.plan, _wanted(env, first)
    attn, down = env.segment(Segment.ATTN_OUT), env.segment(Segment.DOWN)
    # Those of the residual, by what their weights want.
    kinds: dict[tuple[bool | int, ...], SegmentPlan] = {}
    for one in sorted(plan.segments):
        if one != Segment.DOWN and (plan.chunked or one != Segment.ATTN_OUT):
            kinds.setdefault(plan.segments[one].operand, plan.segments[one])
    residual = [functools.partial(_of_residual, env, wanted, part) for part in kinds.values()]

    def kind_of(one: Segment) -> int:
        wanted = plan.segments[one].operand
        return list(kinds).index(wanted) if one != Segment.DOWN else 0

    of_hidden = functools.partial(_of_hidden, env, wanted)
    if plan.chunked:
        number = select(first.segment, [kind_of(s) for s in sorted(plan.segments)])
        of_other = residual[0] if len(kinds) == 1 else lambda: lax.switch(number, residual)
        return lax.cond(wanted.is_down, of_hidden, of_other)
    # Of several sequences the code is long, and a program goes through all of it in every layer:
    # it is shared, or made for its purpose.
    alike = (down.operand, down.reads) == (attn.operand, attn.reads)
    if alike and attn.pieces * PIECE >= _MANY:
        plain = [functools.partial(_of_either, env, wanted)]
    else:
        plain = [of_hidden, functools.partial(_of_attention, env, wanted)]

    def way_of(one: Segment) -> int:
        if one == Segment.DOWN:
            return 0
        return len(plain) - 1 if one == Segment.ATTN_OUT else len(plain) + kind_of(one)

    way = select(first.segment, [way_of(s) for s in sorted(plan.segments)])
    return lax.switch(way, [*plain, *residual])
