"""Between two segments: collects the next one's activations, normalises them, and packs them.

A program polls the exchange for the words of its next segment's activations. Each thread waits for
those inputs alone that it holds in the products (`fragment_layout`), so no input goes from thread
to thread. It makes the tensor cores' fragments of them, which stay in its registers for all tiles
of the segment.

    next segment    activations           buffer    norm
    qkv             the residual          x_in      attn_norm
    attn_out        attention's output    attn
    gate_up         the residual          x_mid     mlp_norm
    down            hidden activations    ffw
    head            the residual          x_head    final_norm

Of models without norms before their blocks, only the head's activations are normed.

The kernel is one loop over the tiles of all layers. Which segment comes next is a number that is
known when the step runs, and each way to collect is a branch (`lax.switch`). A branch is long: it
loads, polls, and packs dozens of registers a thread. A program runs through all branches in each
layer, so they compete for the instruction cache. Hence segments share a branch where their
fragments are alike (`SegmentPlan.fragment_kind`), and the branch computes with selected numbers:
where its words begin, how many there are, which norm.

RMSNorm computes as the reference does, and rounds to bfloat16 where it does. Where activations
become integers, the norm's scale is multiplied into theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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

# From so many activations a thread on, two branches that collect would not stay in the instruction
# cache side by side.
_MANY = 128

_Branch = Callable[[], Fragments]


# What is waited for


class _Awaited(NamedTuple):
    """What is known of the next segment when the step runs: scalars, int32 but for `is_down`."""

    first: Place  # of the program's first tile of the segment
    layer: Array  # whose norm it is
    tag: Array  # that the words carry
    is_down: Array
    before: Array  # hidden activations before the part that this program multiplies
    hidden: Array  # hidden activations in that part


def _awaited(env: StreamEnv, first: Place) -> _Awaited:
    is_head = first.segment == Segment.HEAD
    tag = jnp.where(is_head, env.head_tag, env.tag(first.layer))
    # The head's layer is L, which has no norms of a layer.
    layer = jnp.minimum(first.layer, env.dims.num_layers - 1)
    down = env.segment(Segment.DOWN)
    is_down = first.segment == Segment.DOWN
    before = first.split * down.width
    hidden = jnp.minimum(down.width, down.inner - before)  # the last part may be shorter
    return _Awaited(first, layer, tag, is_down, before, hidden)


def _inputs_of(awaited: _Awaited, count: Array) -> Array:
    """So many inputs; none where the program has no tile of the segment: it then waits for none."""
    return jnp.where(awaited.first.real, count, 0)


def _start_of_residual(env: StreamEnv, segment: Array) -> Array:
    """Where the residual begins in the exchange, of several sequences."""
    at = env.exchange.layout
    return select(segment, [at.x_in, at.x_in, at.x_mid, at.x_in, at.x_head])


def copy_of_hidden(env: StreamEnv) -> Array:
    """Where the hidden activations begin that this program reads, int32.

    Of two copies, even programs read one and odd programs the other.
    """
    at = env.exchange.layout
    if env.plan.tuning.hidden_copies == 1:
        return jnp.int32(at.ffw)
    return jnp.where(env.program & 1 == 0, jnp.int32(at.ffw), jnp.int32(at.ffw_copy))


# Waiting


def collect_inputs(
    env: StreamEnv,
    part: SegmentPlan,
    start: Array | int,
    width: Array,
    tag: Array,
    form: Format,
    before: Array | int = 0,
) -> list[Array] | Held:
    """Waits until neighbouring activations have come, each thread for its own of them.

    Args:
        env: the program's view.
        part: a segment whose fragments are alike.
        start: word of the exchange with which the buffer begins.
        width: int32 scalar, how many activations; 0 to wait for none.
        tag: they carry.
        form: of the numbers, where a word has two.
        before: activations of each sequence that come first in the buffer.

    Returns:
        Float32 `[threads]`, 8 a piece; 0 beyond `width` and for padding sequences. Or the words
        that they came in: see `StreamPlan.holds_words`.
    """
    plan = env.plan
    first = first_input(plan, part)
    left, own = width - first, 0
    if not plan.chunked:
        # A product has 8 columns. Threads of a padding column wait for nothing, and have a real
        # column's address.
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
    # Of the warps that do not multiply, the one that feeds the ring waits as well: it feeds for as
    # long as it waits. Their fragments are zeros.
    values = collect(jnp.where(waits(plan), there, 0))
    return [jnp.where(multiplies(plan), value, 0.0) for value in values]


# The branches


def _collect_attention(env: StreamEnv, awaited: _Awaited) -> Fragments:
    """Attention's output, for attn_out."""
    attn = env.segment(Segment.ATTN_OUT)
    width = _inputs_of(awaited, jnp.int32(attn.inner))
    start = env.exchange.layout.attn
    return pack(env, attn, collect_inputs(env, attn, start, width, awaited.tag, PLAIN))


def _collect_hidden(env: StreamEnv, awaited: _Awaited) -> Fragments:
    """The program's part of the hidden activations, for down."""
    down, start = env.segment(Segment.DOWN), copy_of_hidden(env)
    width = _inputs_of(awaited, awaited.hidden)
    # This wait is a short one: tiles of the ring would queue behind what goes to the L2 cache.
    quiet = fed_otherwise(env, l2_tiles=0)
    values = collect_inputs(quiet, down, start, width, awaited.tag, PLAIN, awaited.before)
    return pack(env, down, values)


def _collect_either(env: StreamEnv, awaited: _Awaited) -> Fragments:
    """Attention's output or hidden activations: the same branch for both."""
    at, is_down = env.exchange.layout, awaited.is_down
    attn, down = env.segment(Segment.ATTN_OUT), env.segment(Segment.DOWN)
    start = jnp.where(is_down, copy_of_hidden(env), jnp.int32(at.attn))
    inner = jnp.where(is_down, jnp.int32(down.inner), jnp.int32(attn.inner))
    width = _inputs_of(awaited, jnp.where(is_down, awaited.hidden, inner))
    before = jnp.where(is_down, awaited.before, 0)
    quiet = fed_otherwise(env, l2_tiles=0)
    return pack(env, attn, collect_inputs(quiet, attn, start, width, awaited.tag, PLAIN, before))


def _collect_residual(env: StreamEnv, awaited: _Awaited, part: SegmentPlan) -> Fragments:
    """The residual, normed: for qkv, gate_up and the head.

    Of a single sequence, attention's output comes this way, too, with ones in place of the norm's
    weights and scale. A thread has few activations then: multiplying them is little, and saves a
    branch.

    Args:
        env: the program's view.
        awaited: the next segment.
        part: the segment's plan, or that of another whose fragments are alike.
    """
    segment = awaited.first.segment
    is_attn = segment == Segment.ATTN_OUT
    if env.plan.holds_words(part) and not env.interpret:
        return _collect_wide_residual(env, awaited, part)
    # The norm's weights are asked for before the residual is polled: they come meanwhile.
    weights, is_normed = norm_weights(env, part, segment, awaited.layer)
    start, inner = _buffer_of(env, segment, is_attn)
    width = _inputs_of(awaited, inner)
    x = collect_inputs(env, part, start, width, awaited.tag, RESIDUAL)
    assert not isinstance(x, Held), "Rows of few inputs are held as numbers."
    scale = _norm_scale(env, mean_squares(env, x), is_normed)
    by = _multipliers(env, weights, is_normed)
    if part.bits == 16:
        return pack(env, part, [v * scale * w for v, w in zip(x, by, strict=True)])
    # Integers have a scale of their own, and it takes the norm's: one product, not one a value.
    fragments = pack(env, part, [v * w for v, w in zip(x, by, strict=True)])
    assert fragments.scale is not None
    return fragments._replace(scale=fragments.scale * scale)


def _buffer_of(env: StreamEnv, segment: Array, is_attn: Array) -> tuple[Array, Array]:
    """Where what `_collect_residual` collects begins, a word of the exchange; its inputs: int32."""
    d, at = env.dims, env.exchange.layout
    if not env.plan.chunked:
        return _start_of_residual(env, segment), jnp.int32(d.model_dim)
    start = select(segment, [at.x_in, at.attn, at.x_mid, at.x_in, at.x_head])
    return start, jnp.where(is_attn, jnp.int32(d.attn_dim), jnp.int32(d.model_dim))


def _multipliers(env: StreamEnv, words: list[Array], is_normed: Array | None) -> list[Array]:
    """A norm's weights as they multiply, or ones: float32 `[threads]`.

    Args:
        env: the program's view.
        words: from `norm_weights`, two bfloat16 each; of a single sequence ones where nothing is
            normed.
        is_normed: whether it is; None: always.
    """
    weights = [weight for word in words for weight in unpacked(word)]
    if (offset := env.features.norm_offset) != 0:  # as Gemma's, which are stored less 1
        # What stands for no norm stays ones.
        more = offset if is_normed is None else is_normed.astype(jnp.float32) * offset
        weights = [weight + more for weight in weights]
    if is_normed is not None and not env.plan.chunked:
        weights = [jnp.where(is_normed, weight, 1.0) for weight in weights]
    return weights


def _collect_wide_residual(env: StreamEnv, awaited: _Awaited, part: SegmentPlan) -> Fragments:
    """The same where rows are so wide that threads hold words: see `StreamPlan.holds_words`.

    The norm's weights have no registers to wait in, either. They are asked for into the L2 cache
    before the wait, and loaded piece by piece when the words become fragments.
    """
    d, segment = env.dims, awaited.first.segment
    ask_for_norm_row(env, part, segment, awaited.layer)
    width = _inputs_of(awaited, jnp.int32(d.model_dim))
    start = _start_of_residual(env, segment)
    x = collect_inputs(env, part, start, width, awaited.tag, RESIDUAL)
    assert isinstance(x, Held), "Wide rows are held as words."
    is_normed = None if env.features.pre_norm else segment == Segment.HEAD

    def scale_of(squares: Array) -> Array:
        return _norm_scale(env, mean_of(env.plan, squares), is_normed)

    return pack_held(env, part, x, norm_row(env, part, segment, awaited.layer), scale_of)


def _norm_scale(env: StreamEnv, mean: Array, is_normed: Array | None) -> Array:
    """What a norm multiplies by besides its weights: 1 / rms, and the unit of what was collected.

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


# Which branch


def collect_activations(env: StreamEnv, first: Place) -> Fragments:
    """Waits for the activations of the segment that begins with the tile `first`."""
    awaited = _awaited(env, first)
    ways = _ways_of_one if env.plan.chunked else _ways_of_several
    return ways(env, awaited, _kinds_of_residual(env))


def _kinds_of_residual(env: StreamEnv) -> list[SegmentPlan]:
    """Of the segments that `_collect_residual` collects for, one of each kind of fragments.

    Formats of weights differ from matrix to matrix, and so do fragments: there is a branch a kind.
    """
    kinds: dict[tuple[int, ...], SegmentPlan] = {}
    for segment, part in sorted(env.plan.segments.items()):
        is_normed = segment not in (Segment.ATTN_OUT, Segment.DOWN)
        if is_normed or (env.plan.chunked and segment == Segment.ATTN_OUT):
            kinds.setdefault(part.fragment_kind, part)
    return list(kinds.values())


def _number_of_kind(env: StreamEnv, kinds: list[SegmentPlan], segment: Segment) -> int:
    return [one.fragment_kind for one in kinds].index(env.segment(segment).fragment_kind)


def _ways_of_one(env: StreamEnv, awaited: _Awaited, kinds: list[SegmentPlan]) -> Fragments:
    """Of one sequence: hidden activations have a branch, and all else one a kind."""
    hidden = functools.partial(_collect_hidden, env, awaited)
    residual = [functools.partial(_collect_residual, env, awaited, part) for part in kinds]
    numbers = [
        _number_of_kind(env, kinds, segment) if segment != Segment.DOWN else 0
        for segment in sorted(env.plan.segments)
    ]
    number = select(awaited.first.segment, numbers)
    other = residual[0] if len(kinds) == 1 else lambda: lax.switch(number, residual)
    return lax.cond(awaited.is_down, hidden, other)


def _ways_of_several(env: StreamEnv, awaited: _Awaited, kinds: list[SegmentPlan]) -> Fragments:
    """Of several: what is not normed has one branch or two, and the residual one a kind."""
    hidden: _Branch = functools.partial(_collect_hidden, env, awaited)
    attention: _Branch = functools.partial(_collect_attention, env, awaited)
    plain = [hidden, attention]
    attn, down = env.segment(Segment.ATTN_OUT), env.segment(Segment.DOWN)
    alike = (down.fragment_kind, down.reads) == (attn.fragment_kind, attn.reads)
    if alike and attn.pieces * PIECE >= _MANY:
        plain = [functools.partial(_collect_either, env, awaited)]
    residual = [functools.partial(_collect_residual, env, awaited, part) for part in kinds]

    def number_of(segment: Segment) -> int:
        if segment == Segment.DOWN:
            return 0
        if segment == Segment.ATTN_OUT:
            return len(plain) - 1
        return len(plain) + _number_of_kind(env, kinds, segment)

    number = select(awaited.first.segment, [number_of(s) for s in sorted(env.plan.segments)])
    return lax.switch(number, [*plain, *residual])
