"""A segment's activations: collected from the exchange, normed if a residual, and packed."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.stream.env import StreamEnv, select
from pallas_kernels.stream.exchange import Held
from pallas_kernels.stream.exchange_order import word_in_exchange
from pallas_kernels.stream.feeding import fed_otherwise
from pallas_kernels.stream.fragment_layout import (
    column_of,
    distances,
    first_input,
    multiplies,
    pieces_there,
    waits,
)
from pallas_kernels.stream.fragments import Fragments, pack, pack_held, unpacked
from pallas_kernels.stream.half2 import PLAIN, RESIDUAL, Format
from pallas_kernels.stream.norms import (
    ask_for_norm_row,
    mean_of,
    mean_squares,
    norm_row,
    norm_weights,
    unit_of_residual,
)
from pallas_kernels.stream.plan import PIECE, Segment, SegmentPlan
from pallas_kernels.stream.tiles import Place

__all__ = ["collect_activations", "collect_inputs", "copy_of_hidden"]

# Activations of a thread that make code so long that two of its kind would not be kept at hand.
_MANY = 128


def collect_inputs(
    env: StreamEnv,
    part: SegmentPlan,
    start: Array | int,
    width: Array,
    tag: Array,
    form: Format,
    before: Array | int = 0,
) -> list[Array] | Held:
    """Waits for a span of activations.

    Args:
        env: the program's view.
        part: a segment whose fragments are alike.
        start: word of the exchange with which the activations begin.
        width: int32 scalar, inputs of the span; 0 to wait for none.
        tag: they carry.
        form: of the numbers, where a word has two.
        before: activations of a sequence before the span.

    Returns:
        Float32 `[threads]`, 8 a piece; 0 beyond the span and for padding sequences. Or the words
        that they came in: see `StreamPlan.holds_words`.
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
    if plan.holds_words(part) and not env.interpret:
        return env.exchange.hold_pieces(offset, places, tag, there, half2=form)
    half2 = form if plan.half2 else None
    collect = functools.partial(env.exchange.collect_pieces, offset, places, tag, half2=half2)
    if plan.product_warps == plan.num_warps:
        return collect(there)
    values = collect(jnp.where(waits(plan), there, 0))
    return [jnp.where(multiplies(plan), value, 0.0) for value in values]


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


def _of_attention(env: StreamEnv, wanted: _Wanted) -> Fragments:
    """Attention's output."""
    attn = env.segment(Segment.ATTN_OUT)
    width = jnp.where(wanted.first.real, jnp.int32(attn.inner), 0)
    start = env.exchange.layout.attn
    return pack(env, attn, collect_inputs(env, attn, start, width, wanted.tag, PLAIN))


def _of_hidden(env: StreamEnv, wanted: _Wanted) -> Fragments:
    """The hidden activations of the program's span."""
    down, start = env.segment(Segment.DOWN), copy_of_hidden(env)
    width = jnp.where(wanted.first.real, wanted.hidden, 0)
    # This wait is a short one: tiles of the ring would queue behind what goes to the L2 cache.
    quiet = fed_otherwise(env, l2_tiles=0)
    values = collect_inputs(quiet, down, start, width, wanted.tag, PLAIN, wanted.before)
    return pack(env, down, values)


def _of_either(env: StreamEnv, wanted: _Wanted) -> Fragments:
    """Attention's output or hidden activations, by the same code."""
    at, is_down = env.exchange.layout, wanted.is_down
    attn, down = env.segment(Segment.ATTN_OUT), env.segment(Segment.DOWN)
    start = jnp.where(is_down, copy_of_hidden(env), jnp.int32(at.attn))
    inner = jnp.where(is_down, jnp.int32(down.inner), jnp.int32(attn.inner))
    width = jnp.where(wanted.first.real, jnp.where(is_down, wanted.hidden, inner), 0)
    skip = jnp.where(is_down, wanted.before, 0)
    quiet = fed_otherwise(env, l2_tiles=0)
    return pack(env, attn, collect_inputs(quiet, attn, start, width, wanted.tag, PLAIN, skip))


def _of_residual(env: StreamEnv, wanted: _Wanted, part: SegmentPlan) -> Fragments:
    """The residual, normed; of a single sequence perhaps attention's output, as it is.

    Args:
        env: the program's view.
        wanted: what is waited for.
        part: the segment's plan, or that of another whose fragments are alike.
    """
    plan, d, at, segment = env.plan, env.dims, env.exchange.layout, wanted.first.segment
    is_attn = segment == Segment.ATTN_OUT
    if plan.holds_words(part) and not env.interpret:
        return _of_wide_residual(env, wanted, part)
    # Asked for before the residual is waited for.
    weights, is_normed = norm_weights(env, part, segment, wanted.layer)
    if plan.chunked:  # attention's output may be meant: what is done to it besides is little
        start = select(segment, [at.x_in, at.attn, at.x_mid, at.x_in, at.x_head])
        inner = jnp.where(is_attn, jnp.int32(d.attn_dim), jnp.int32(d.model_dim))
    else:
        start = _start_of_residual(env, segment)
        inner = jnp.int32(d.model_dim)
    width = jnp.where(wanted.first.real, inner, 0)
    x = collect_inputs(env, part, start, width, wanted.tag, RESIDUAL)
    assert not isinstance(x, Held), "Rows of few inputs are held as numbers."
    scale = _norm_scale(env, mean_squares(env, x), is_normed)
    by = [weight for word in weights for weight in unpacked(word)]
    if (offset := env.features.norm_offset) != 0:
        # Ones stay ones.
        more = offset if is_normed is None else is_normed.astype(jnp.float32) * offset
        by = [weight + more for weight in by]
    if is_normed is not None and not plan.chunked:
        by = [jnp.where(is_normed, weight, 1.0) for weight in by]
    if part.bits == 16:
        return pack(env, part, [v * scale * w for v, w in zip(x, by, strict=True)])
    fragments = pack(env, part, [v * w for v, w in zip(x, by, strict=True)])
    assert fragments.scale is not None
    return fragments._replace(scale=fragments.scale * scale)


def _of_wide_residual(env: StreamEnv, wanted: _Wanted, part: SegmentPlan) -> Fragments:
    """The same of threads that hold words: the norm's weights have no registers to wait in."""
    d, segment = env.dims, wanted.first.segment
    ask_for_norm_row(env, part, segment, wanted.layer)
    width = jnp.where(wanted.first.real, jnp.int32(d.model_dim), 0)
    start = _start_of_residual(env, segment)
    x = collect_inputs(env, part, start, width, wanted.tag, RESIDUAL)
    assert isinstance(x, Held), "Wide rows are held as words."
    is_normed = None if env.features.pre_norm else segment == Segment.HEAD

    def scale_of(squares: Array) -> Array:
        return _norm_scale(env, mean_of(env.plan, squares), is_normed)

    return pack_held(env, part, x, norm_row(env, part, segment, wanted.layer), scale_of)


def _start_of_residual(env: StreamEnv, segment: Array) -> Array:
    """Where the residual begins in the exchange, of several sequences."""
    at = env.exchange.layout
    return select(segment, [at.x_in, at.x_in, at.x_mid, at.x_in, at.x_head])


def _norm_scale(env: StreamEnv, mean: Array, is_normed: Array | None) -> Array:
    """What a norm multiplies by besides its weights, of what the residual is handed over as.

    Args:
        env: the program's view.
        mean: square of each thread's sequence, float32 `[threads]`.
        is_normed: whether the residual is; None if it always is.
    """
    scale = lax.rsqrt(mean + env.dims.norm_eps)
    if is_normed is not None:
        scale = jnp.where(is_normed, scale, 1.0)
    if (unit := unit_of_residual(env.plan)) != 1:
        scale *= unit
    return scale


def collect_activations(env: StreamEnv, first: Place) -> Fragments:
    """Waits for the activations of the segment that begins with the tile `first`.

    RMSNorm is that of the reference, and so is its rounding to bfloat16; digits have its scale in
    theirs.
    """
    plan, wanted = env.plan, _wanted(env, first)
    attn, down = env.segment(Segment.ATTN_OUT), env.segment(Segment.DOWN)
    # Those of the residual, by what their weights want.
    kinds: dict[tuple[int, ...], SegmentPlan] = {}
    for one in sorted(plan.segments):
        if one != Segment.DOWN and (plan.chunked or one != Segment.ATTN_OUT):
            kinds.setdefault(plan.segments[one].fragment_kind, plan.segments[one])
    residual = [functools.partial(_of_residual, env, wanted, part) for part in kinds.values()]

    def kind_of(one: Segment) -> int:
        wanted = plan.segments[one].fragment_kind
        return list(kinds).index(wanted) if one != Segment.DOWN else 0

    of_hidden = functools.partial(_of_hidden, env, wanted)
    if plan.chunked:
        number = select(first.segment, [kind_of(s) for s in sorted(plan.segments)])
        of_other = residual[0] if len(kinds) == 1 else lambda: lax.switch(number, residual)
        return lax.cond(wanted.is_down, of_hidden, of_other)
    # Of several sequences the code is long, and a program goes through all of it in every layer:
    # it is shared, or made for its purpose.
    alike = (down.fragment_kind, down.reads) == (attn.fragment_kind, attn.reads)
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
