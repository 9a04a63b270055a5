"""The residual stream: the embedding that starts it, and the projections added to it.

Program p owns groups p, p + P, p + 2P and so on of the residual's elements. It keeps them in
registers, in float32, for the whole step, and hands copies to whoever normalises them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.dims import next_power_of_2
from pallas_kernels.stream import access
from pallas_kernels.stream.activations import collect_inputs
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.exchange_order import word_in_exchange
from pallas_kernels.stream.fragment_layout import piece_step
from pallas_kernels.stream.half2 import RESIDUAL
from pallas_kernels.stream.norms import mean_squares
from pallas_kernels.stream.plan import COLUMNS, Segment
from pallas_kernels.stream.product import Outputs, Sums, outputs_of, rows_of
from pallas_kernels.stream.state import State
from pallas_kernels.stream.tiles import Flush, Place

__all__ = ["add_block", "close_block", "finish_projection", "leave_embed"]


class _Elements(NamedTuple):
    """Elements of the residual that this program owns, int32 `[E]`."""

    first: Array
    second: Array
    column: Array


def _elements(env: StreamEnv) -> _Elements:
    outputs = outputs_of(env, Segment.EMBED)
    group = env.program + outputs.number * env.plan.programs
    first, second = rows_of(env, Segment.EMBED, outputs.pair, env.plan.rows, group)
    return _Elements(first, second, outputs.column)


def _publish(
    env: StreamEnv,
    residual: Sums,
    start: Array | int,
    tag: Array,
    readers: Sequence[tuple[Array | bool, Segment]],
) -> None:
    """Hands elements over; the reader is the last one whose condition holds."""
    d, own = env.dims, _elements(env)

    def word_of(element: Array) -> Array:
        parts = [env.segment(segment) for _, segment in readers]
        word = word_in_exchange(env.plan, parts[0], own.column, element)
        if len({(part.held, piece_step(env.plan, part)) for part in parts}) > 1:
            for (condition, _), part in zip(readers[1:], parts[1:], strict=True):
                other = word_in_exchange(env.plan, part, own.column, element)
                word = jnp.where(condition, other, word)
        return start + word

    if env.plan.half2:
        real = (own.first < d.model_dim) & (own.column < d.columns)
        env.exchange.publish_half2(word_of(own.first), *residual, RESIDUAL, tag, real)
        return
    for element, values in zip(own[:2], residual, strict=True):
        real = (element < d.model_dim) & (own.column < d.columns)
        env.exchange.publish(word_of(element), values, tag, real)


def leave_embed(env: StreamEnv, state: State) -> State:
    """x[c] = embed[tokens[c]]. Ids outside the vocabulary are clamped."""
    d, own = env.dims, _elements(env)
    column = jnp.minimum(own.column, d.columns - 1)
    token = jnp.clip(access.load(env["tokens"].at[column]), 0, d.vocab_size - 1)

    def of(element: Array) -> Array:
        row = env["embed"].at[token, jnp.minimum(element, d.model_dim - 1)]
        x = access.load(row, mask=element < d.model_dim, other=0.0).astype(jnp.float32)
        return x if env.features.embed_scale == 1 else x * env.features.embed_scale

    residual = Sums(of(own.first), of(own.second))
    _publish(env, residual, env.exchange.layout.x_in, env.tag(0), [(True, Segment.QKV)])
    if 0 in env.hidden_layers:
        _store_hidden(env, residual, env.hidden_layers.index(0))
    return state._replace(residual=residual)


def _store_hidden(env: StreamEnv, residual: Sums, place: Array | int) -> None:
    """Stores this program's elements of one of the hidden states that the step returns.

    Args:
        env: what every part is given.
        residual: the elements.
        place: which of `hidden_layers`.
    """
    d, own = env.dims, _elements(env)
    fits = env.positions(own.column) < d.capacity
    for element, values in zip(own[:2], residual, strict=True):
        real = (element < d.model_dim) & (own.column < d.columns)
        values = jnp.where(fits, values, jnp.nan)
        access.store(env["hidden"].at[own.column, place, element], values, mask=real)


def _keep_hidden(env: StreamEnv, residual: Sums, is_down: Array, layer: Array) -> None:
    """Stores the residual after a layer, if the step is to return it."""
    place = jnp.int32(-1)
    for number, wanted in enumerate(env.hidden_layers):
        place = jnp.where(is_down & (layer + 1 == wanted), jnp.int32(number), place)
    lax.cond(place >= 0, lambda: _store_hidden(env, residual, place), lambda: None)


def finish_projection(
    env: StreamEnv, segment: Segment, flush: Flush, outputs: Outputs, sums: Sums, state: State
) -> State:
    """Keeps sums for the residual, or hands partial sums to the owner."""
    d, part = env.dims, env.segment(segment)
    if part.splits == 1:
        return state._replace(block=sums)
    elements = rows_of(env, segment, outputs.pair, part.rows, flush.group(outputs.number))
    column, real = outputs.column, flush.real(outputs.number)
    for element, values in zip(elements, sums, strict=True):
        pair = (column * d.model_dim + element) * part.splits + flush.split
        there = real & (element < d.model_dim) & (column < d.columns)
        at = env.exchange.layout.partial + 2 * pair
        env.exchange.publish_pair(at, values, env.tag(flush.layer), there)
    return state


def _collect_squares(env: StreamEnv, start: Array | int, tag: Array) -> Array:
    """Waits for all of a block's output; its mean square of each column, float32 `[8]` or `[1]`."""
    plan, d = env.plan, env.dims
    # A program that owns nothing needs nothing.
    owns = env.program < env.segment(Segment.ATTN_OUT).groups
    width = jnp.where(owns, jnp.int32(d.model_dim), 0)
    values = collect_inputs(env, env.segment(Segment.QKV), start, width, tag, RESIDUAL)
    squares = mean_squares(env, values)
    if not (env.interpret or plan.chunked):
        access.meet()  # the next activations may be normed too
    if plan.chunked:
        return (jnp.sum(squares) / plan.threads)[None]
    return squares.reshape(plan.num_warps, COLUMNS, 4).sum(axis=2).sum(axis=0) / (
        4 * plan.num_warps
    )


def close_block(env: StreamEnv, place: Place, state: State) -> State:
    """Completes this program's elements of a block's output, and hands them over to be normed."""
    layout, tag = env.exchange.layout, env.tag(place.layer)
    splits = env.segment(Segment.DOWN).splits

    def add_partial_sums():
        own = _elements(env)
        shape = (*own.first.shape, next_power_of_2(splits))
        split, column = env.iota(shape, 1), own.column[:, None]

        def wanted(element: Array) -> tuple[Array, Array]:
            element = element[:, None]
            real = (element < env.dims.model_dim) & (column < env.dims.columns) & (split < splits)
            pair = (column * env.dims.model_dim + element) * splits + split
            return layout.partial + 2 * pair, real

        both = env.exchange.collect_pairs([wanted(own.first), wanted(own.second)], tag)
        sums = (lax.bitcast_convert_type(bits, jnp.float32).sum(axis=1) for bits in both)
        return state._replace(block=Sums(*sums))

    is_down = place.segment == Segment.DOWN
    if splits > 1:
        state = lax.cond(is_down, add_partial_sums, lambda: state)
    if env.features.attn_out_bias or env.features.mlp_bias:
        state = state._replace(block=_biased(env, place.layer, is_down, state.block))
    if env.features.post_norm:
        start = jnp.where(is_down, jnp.int32(layout.ffw_block), jnp.int32(layout.attn_block))
        _publish(env, state.block, start, tag, [(True, Segment.QKV)])
    return state


def _biased(env: StreamEnv, layer: Array, is_down: Array, block: Sums) -> Sums:
    """A block's output with the bias of its projection, where that has one."""
    features, own = env.features, _elements(env)

    def of(name: str, there: bool, element: Array) -> Array:
        if not there:
            return jnp.zeros(element.shape, jnp.float32)
        return env[name][layer, element].astype(jnp.float32)

    def bias(element: Array) -> Array:
        element = jnp.minimum(element, env.dims.model_dim - 1)
        return lax.cond(
            is_down,
            lambda: of("down_bias", features.mlp_bias, element),
            lambda: of("attn_out_bias", features.attn_out_bias, element),
        )

    return Sums(block.first + bias(own.first), block.second + bias(own.second))


def add_block(env: StreamEnv, place: Place, state: State) -> State:
    """Adds a block's output to the residual, and hands the residual to who reads it next."""
    d, block, layout = env.dims, state.block, env.exchange.layout
    is_down, tag = place.segment == Segment.DOWN, env.tag(place.layer)
    if env.features.post_norm:
        own = _elements(env)
        start = jnp.where(is_down, jnp.int32(layout.ffw_block), jnp.int32(layout.attn_block))
        each = lax.rsqrt(_collect_squares(env, start, tag) + d.norm_eps)
        pairs = (own.first.shape[0] // each.shape[0], *each.shape)
        scale = jnp.broadcast_to(each[None, :], pairs).reshape(own.first.shape)

        def normed(values: Array, element: Array) -> Array:
            element = jnp.minimum(element, d.model_dim - 1)
            weight = lax.cond(
                is_down,
                lambda: env.norm_weight("mlp_post_norm", place.layer, element),
                lambda: env.norm_weight("attn_post_norm", place.layer, element),
            )
            return values * scale * weight

        block = Sums(normed(block.first, own.first), normed(block.second, own.second))
    by = env.features.residual_scale
    residual = Sums(
        *(x + (y if by == 1 else y * by) for x, y in zip(state.residual, block, strict=True))
    )
    to_head = is_down & (place.layer == d.num_layers - 1)
    start = jnp.where(is_down, jnp.int32(layout.x_in), jnp.int32(layout.x_mid))
    start = jnp.where(to_head, jnp.int32(layout.x_head), start)
    tag = jnp.where(to_head, env.head_tag, jnp.where(is_down, tag + 1, tag))
    readers = [(True, Segment.GATE_UP), (is_down, Segment.QKV), (to_head, Segment.HEAD)]
    _publish(env, residual, start, tag, readers)
    if env.hidden_layers:  # once others have what they wait for
        _keep_hidden(env, residual, is_down, place.layer)
    return state._replace(residual=residual)
