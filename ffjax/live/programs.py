"""What runs on the device for a live batch: a sequence enters, is fed, and all take steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ffjax.cache import KVCache
from ffjax.decode import Implementation
from ffjax.dims import step_dims
from ffjax.live.state import LiveState, empty_state, entered
from ffjax.loop import Made, decode_block
from ffjax.parcel import Layout
from ffjax.prefill.first import first_token
from ffjax.prefill.packed import feed
from ffjax.prefill.packing import PackedChunk
from ffjax.programs import Programs
from ffjax.reproducible import compiler_options
from ffjax.sampling.rows import Stages
from ffjax.speculation.block import Going, plain_block, speculative_block
from ffjax.speculation.source import Source
from pallas_kernels.gpu import Gpu
from pallas_kernels.stream.exchange_layout import exchange_words

__all__ = ["LivePrograms", "PaddedChunk", "live_programs"]


class PaddedChunk(NamedTuple):
    """Tokens of one sequence, for the reference.

    Attributes:
        tokens: int32 `[1, P]`.
        count: int32 `[1]`, how many count.
    """

    tokens: Any
    count: Any


def _feed_packed(
    graphdef: Any,
    weights: Any,
    state: LiveState,
    chunk: PackedChunk,
    row: Array,
    *,
    gpu: Gpu,
) -> LiveState:
    """Feeds some tokens of a sequence."""
    model = graphdef.merged(weights)
    cache, last = feed(model, state.cache, state.last, chunk, gpu)
    return state._replace(cache=cache, last=last)


def _feed_padded(
    graphdef: Any, weights: Any, state: LiveState, chunk: PaddedChunk, row: Array
) -> LiveState:
    """The same, by the reference, on the sequence's own part of the cache.

    It leaves what the final norm returns; the other leaves what it is given.
    """
    model = graphdef.merged(weights)
    cache = state.cache
    own = KVCache(
        lax.dynamic_slice_in_dim(cache.k, row, 1, axis=1),
        lax.dynamic_slice_in_dim(cache.v, row, 1, axis=1),
        lax.dynamic_slice_in_dim(cache.lengths, row, 1),
        jnp.zeros((exchange_words(step_dims(model.config, 1, cache.capacity)),), jnp.int32),
    )
    hidden, own = model.last_hidden_state(chunk.tokens, own, num_tokens=chunk.count, last_only=True)
    cache = dataclasses.replace(
        cache,
        k=lax.dynamic_update_slice_in_dim(cache.k, own.k, row, axis=1),
        v=lax.dynamic_update_slice_in_dim(cache.v, own.v, row, axis=1),
        lengths=lax.dynamic_update_slice_in_dim(cache.lengths, own.lengths, row, axis=0),
    )
    return state._replace(cache=cache, last=state.last.at[row].set(hidden[0]))


def _fed_a_parcel(feed: Callable[..., LiveState]) -> Callable[..., LiveState]:
    """The same of a chunk and a row that are sent as one array."""

    def fed(
        graphdef: Any,
        weights: Any,
        state: LiveState,
        words: Array,
        *,
        layout: Layout,
        **static: Any,
    ) -> LiveState:
        return feed(graphdef, weights, state, *layout.opened(words), **static)

    fed.__name__ = feed.__name__
    return fed


def _entered(state: LiveState, words: Array, prompt: Array, *, layout: Layout) -> LiveState:
    """A sequence enters; of its arrays, all but the prompt are sent as one."""
    return entered(state, layout.opened(words)._replace(prompt=prompt))


def _choose_first(
    graphdef: Any, weights: Any, state: LiveState, row: Array, *, stages: Stages, normed: bool
) -> tuple[LiveState, Made]:
    """Chooses the first token of a sequence whose prompt has been fed.

    Args:
        graphdef: the model's structure.
        weights: its weights.
        state: the batch.
        row: int32, which sequence.
        stages: how the token is chosen.
        normed: whether what was left of the prompt is after the final norm.
    """
    model = graphdef.merged(weights)

    def own(arrays: Any) -> Any:
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, row, 1), arrays)

    last = own(state.last)
    logits = model.logits(last) if normed else model.logits_of(last)
    choice = first_token(logits, own(state.rows), own(state.history), stages)
    token = state.token.at[row].set(choice.token[0])
    return state._replace(token=token, length=state.length.at[row].set(1)), Made.of(choice)


def _decode(
    graphdef: Any,
    weights: Any,
    state: LiveState,
    running: Array,
    *,
    steps: int,
    stages: Stages,
    implementation: Implementation,
) -> tuple[LiveState, Made]:
    """Runs a block of steps of the sequences that run, bool `[B]`.

    The others take steps too, whose keys and values lie beyond what they hold, and end where they
    began.
    """
    before = state.cache.lengths
    history = state.history if stages.remembers else None
    cache, token, length, history, made = decode_block(
        graphdef,
        weights,
        state.cache,
        state.token,
        state.length,
        state.rows,
        history,
        steps=steps,
        stages=stages,
        implementation=implementation,
        running=running,
    )
    lengths = jnp.where(running, cache.lengths, before)
    state = state._replace(
        cache=dataclasses.replace(cache, lengths=lengths),
        token=jnp.where(running, token, state.token),
        length=jnp.where(running, length, state.length),
        history=state.history if history is None else history,
    )
    return state, made


def _speculate(
    graphdef: Any,
    weights: Any,
    state: LiveState,
    running: Array,
    draft: Any,
    *,
    steps: int,
    stages: Stages,
    implementation: Implementation,
    source: Source,
    drafts: bool,
) -> tuple[LiveState, Made]:
    """Runs a block of steps that speculate, or of plain ones in their place, as `_decode`.

    A draft model's steps go over all sequences, too. Of one that does not run they feed the last
    token again that its cache is to hold after them, and what is of no use.

    Args:
        graphdef: the model's structure.
        weights: its weights.
        state: the batch.
        running: bool `[B]`, which sequences take part.
        draft: the draft model's weights; None without one.
        steps: of the block.
        stages: how tokens are chosen.
        implementation: of the steps.
        source: where drafts come from.
        drafts: whether steps take drafts.
    """
    assert state.known is not None and state.bounds is not None, "the batch speculates"
    before = state.cache.lengths
    # Where a sequence does not run, it has all its tokens.
    bounds = state.bounds._replace(ends=jnp.where(running, state.bounds.ends, before))
    history = state.history if stages.remembers else None
    held = None if state.draft is None else state.draft.cache
    block = speculative_block if drafts else plain_block
    going, made = block(
        graphdef,
        weights,
        Going(state.cache, state.known, state.token, history, held),
        bounds,
        state.rows,
        draft,
        steps=steps,
        stages=stages,
        implementation=implementation,
        source=source,
    )
    length = going.cache.lengths - bounds.begins
    state = state._replace(
        cache=going.cache,
        token=jnp.where(running, going.token, state.token),
        length=jnp.where(running, length, state.length),
        history=state.history if going.history is None else going.history,
        known=jnp.where(running[:, None], going.known, state.known),
    )
    if state.draft is not None:
        behind = state.draft._replace(cache=going.state).behind(going.cache.lengths)
        state = state._replace(draft=behind)
    return state, made


class LivePrograms(NamedTuple):
    """The programs for a device."""

    start: Any
    enter: Any
    feed_packed: Programs
    feed_padded: Programs
    choose_first: Programs
    decode: Programs
    speculate: Programs


@functools.cache
def live_programs(device: Any) -> LivePrograms:
    """The programs for a device: XLA's options depend on it."""
    options = compiler_options(device)

    def kept(function: Any, *static: str) -> Programs:
        jitted = jax.jit(
            function,
            static_argnames=("graphdef", *static),
            donate_argnames=("state",),
            compiler_options=options,
        )
        return Programs(jitted)

    return LivePrograms(
        start=jax.jit(empty_state, static_argnums=(0, 1, 2, 3, 4, 5, 6), compiler_options=options),
        enter=jax.jit(
            _entered,
            static_argnames="layout",
            donate_argnames=("state",),
            compiler_options=options,
        ),
        feed_packed=kept(_fed_a_parcel(_feed_packed), "gpu", "layout"),
        feed_padded=kept(_fed_a_parcel(_feed_padded), "layout"),
        choose_first=kept(_choose_first, "stages", "normed"),
        decode=kept(_decode, "steps", "stages", "implementation"),
        speculate=kept(_speculate, "steps", "stages", "implementation", "source", "drafts"),
    )
