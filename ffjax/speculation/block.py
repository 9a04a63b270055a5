"""A block of steps that speculate, on the device.

A step in which a sequence has a draft takes T tokens of each sequence, any other one token. Which
of the two it is, is decided on the device, before each step, which costs time: where nothing
repeats, the host orders blocks of plain steps, and the device looks for a draft after each. (One
program with a choice between both would copy the cache: XLA does, of a loop within a branch.) With
a source that always has drafts there is nothing to decide.
Sequences move on at their own pace; one that has all its tokens stays where it is.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ffjax.cache import KVCache
from ffjax.decode import Implementation, decode_step
from ffjax.loop import NO_TOKEN, Made, decode_block
from ffjax.sampling.choose import Before, Choice, choose, empty_board
from ffjax.sampling.draw import sequence_keys, step_keys
from ffjax.sampling.history import History, said
from ffjax.sampling.rows import EVERY_TOKEN, Processor, Rows, Stages
from ffjax.speculation.accept import kept_tokens
from ffjax.speculation.source import Choosing, Source

__all__ = ["Bounds", "Going", "plain_block", "speculative_block"]


class Going(NamedTuple):
    """What goes from block to block.

    Attributes:
        cache: the cache.
        known: int32 `[B, S]`, the tokens of prompt and answer; what lies after is anybody's.
        token: int32 `[B]`, chosen but not yet fed.
        history: what came before `token`; None where no stage asks.
        state: of the source of drafts.
    """

    cache: KVCache
    known: Array
    token: Array
    history: History | None
    state: Any = None


class Bounds(NamedTuple):
    """Between which lengths of its cache a sequence gets its tokens.

    Attributes:
        begins: int32 `[B]`, the length less the tokens that the answer has.
        ends: int32 `[B]`, the length at which it has all of them: there it stays.
    """

    begins: Any
    ends: Any


class _Looked(NamedTuple):
    """What a step has chosen.

    Attributes:
        cache: with all that was fed; its lengths are not those that count.
        made: of each sequence T tokens, and their log-probabilities.
        boards: of the choice of one token a sequence, and of T.
    """

    cache: KVCache
    made: Made
    boards: tuple[Array | None, Array | None]


def _at_each(processor: Processor, tokens: int) -> Processor:
    """A caller's processor, which takes rows `[B]`, on rows `[B * T]`: position by position."""

    def split(array: Array) -> Array:
        return array.reshape(-1, tokens, *array.shape[1:])

    def processed(logits: Array, before: Before) -> Array:
        columns, each = split(logits), jax.tree.map(split, before)
        out = [
            processor(columns[:, t], jax.tree.map(lambda a, t=t: a[:, t], each))
            for t in range(tokens)
        ]
        return jnp.stack(out, axis=1).reshape(logits.shape)

    return processed


def _all_said(history: History, fed: Array) -> History:
    """With some more tokens in each answer, int32 `[B, T]`; one that is none is dropped."""
    rows = jnp.arange(len(fed))[:, None]
    return history._replace(counts=history.counts.at[rows, fed].add(1, mode="drop"))


def _histories(history: History, fed: Array) -> History:
    """What came before each of the tokens that follow `fed` `[B, T]`: of rows `[B * T]`."""
    tokens = fed.shape[1]
    order = jnp.arange(tokens)
    # Row t holds the tokens up to the t-th.
    held = jnp.where(order <= order[:, None], fed[:, None], EVERY_TOKEN)
    each = History(*(jnp.repeat(a, tokens, axis=0) for a in history))
    return _all_said(each, held.reshape(-1, tokens))


def _padded(array: Array, tokens: int) -> Array:
    """An array `[B, ...]` as `[B, T, ...]`, whose first is this and whose others are noughts."""
    room = [(0, 0), (0, tokens - 1), *((0, 0),) * (array.ndim - 1)]
    return jnp.pad(array[:, None], room)


class _Found(NamedTuple):
    """What a source has found.

    Attributes:
        drafts: int32 `[B, T - 1]`.
        counts: int32 `[B]`, how many of them count.
        state: of the source.
    """

    drafts: Array
    counts: Array
    state: Any

    @property
    def any(self) -> Array:
        """Whether there is a draft."""
        return functools.reduce(operator.or_, (count > 0 for count in self.counts))


def _look(
    source: Source,
    weights: Any,
    known: Array,
    lengths: Array,
    state: Any,
    bounds: Bounds,
    choosing: Choosing | None = None,
) -> _Found:
    """Drafts of what comes next.

    Args:
        source: where drafts come from.
        weights: its arrays.
        known: the tokens.
        lengths: int32 `[B]`, of the cache: a token less is fed than is known.
        state: of the source.
        bounds: one that has all its tokens has no use for drafts.
        choosing: how tokens are chosen.
    """
    drafts, counts, state = source.drafts(known, lengths + 1, weights, state, choosing)
    return _Found(drafts, jnp.where(lengths < bounds.ends, counts, 0), state)


def _written(known: Array, going: Going) -> Array:
    """What is known, with the token that is not fed yet: the prefill's is not written down."""
    at = jnp.arange(len(known)), going.cache.lengths
    return known.at[at].set(going.token, mode="drop")


def _gone(source: Source, weights: Any, going: Going, made: Made, bounds: Bounds) -> Made:
    """What a block returns of what its steps have made: also whether there is a draft after it."""
    if source.always:
        return made._replace(drafted=jnp.ones((), bool))
    cache, known, *_, state = going
    found = _look(source, weights, known, cache.lengths, state, bounds)
    return made._replace(drafted=found.any)


def plain_block(
    graphdef: Any,
    state: Any,
    going: Going,
    bounds: Bounds,
    rows: Rows,
    weights: Any,
    *,
    steps: int,
    stages: Stages,
    implementation: Implementation,
    source: Source,
) -> tuple[Going, Made]:
    """Runs a block of plain steps, and looks for a draft after them.

    Arguments and results are those of `speculative_block`, but tokens are int32 `[steps, B, 1]`.
    """
    start, ahead = going.cache.lengths, jnp.arange(steps)
    number = start - bounds.begins
    how: Any = {"steps": steps, "stages": stages, "implementation": implementation}
    how |= {"running": start < bounds.ends}
    cache, _, _, history, made = decode_block(
        graphdef, state, going.cache, going.token, number, rows, going.history, **how
    )
    lengths = jnp.minimum(start + steps, bounds.ends)
    counted = ahead < (lengths - start)[:, None]
    at = jnp.where(counted, start[:, None] + 1 + ahead, going.known.shape[1])
    every = jnp.arange(len(start))[:, None]
    known = _written(going.known, going).at[every, at].set(made.tokens.T, mode="drop")
    made = made._replace(tokens=jnp.where(counted.T, made.tokens, NO_TOKEN))
    made = jax.tree.map(lambda a: a[:, :, None], made)
    cache = dataclasses.replace(cache, lengths=lengths)
    token = known[jnp.arange(len(known)), lengths]
    gone = Going(cache, known, token, history, going.state)
    return gone, _gone(source, weights, gone, made, bounds)


def speculative_block(
    graphdef: Any,
    state: Any,
    going: Going,
    bounds: Bounds,
    rows: Rows,
    weights: Any,
    *,
    steps: int,
    stages: Stages,
    implementation: Implementation,
    source: Source,
) -> tuple[Going, Made]:
    """Runs a block of steps.

    Args:
        graphdef: the model's structure.
        state: its weights.
        going: where the sequences are.
        bounds: where they begin and end.
        rows: how tokens are chosen.
        weights: arrays of the source.
        steps: of the block.
        stages: how tokens are chosen.
        implementation: of the steps.
        source: where drafts come from.

    Returns:
        Where the sequences are then, and what was made: tokens int32 `[steps, B, T]`, NO_TOKEN
        where a step has made less than T; `drafted` tells whether there is a draft to go on with.
    """
    model = graphdef.merged(state)
    tokens = source.tokens
    assert tokens is not None, "T is chosen for a batch"
    batch, capacity = going.known.shape
    every, order = jnp.arange(batch), jnp.arange(tokens)
    start = going.cache.lengths
    # What may be drawn by, all at once: one by one, each would cost a launch or more.
    keys: Any = None
    if stages.draws:
        own, number = sequence_keys(rows.seeds), start - bounds.begins
        keys = jax.vmap(lambda ahead: step_keys(own, number + ahead))(jnp.arange(steps * tokens))
    wide_rows = jax.tree.map(lambda a: jnp.repeat(a, tokens, axis=0), rows)
    processors = tuple(_at_each(one, tokens) for one in stages.processors)
    wide_stages = dataclasses.replace(stages, processors=processors)
    step = functools.partial(decode_step, model, implementation=implementation)

    def one(cache: KVCache, fed: Array, history: History | None, boards: Any) -> _Looked:
        at = cache.lengths
        mine = None if keys is None else keys[at - start, every]
        if history is not None:
            history = said(history, fed[:, 0])
        out = step(cache, fed[:, 0])
        how = mine, history, at - bounds.begins, stages, boards[0]
        choice = choose(out.logits, out.token, rows, *how)
        made = jax.tree.map(lambda a: _padded(a, tokens), Made.of(choice))
        return _Looked(out.cache, made, (choice.board, boards[1]))

    def several(cache: KVCache, fed: Array, history: History | None, boards: Any) -> _Looked:
        at = cache.lengths[:, None] + order
        mine = None if keys is None else keys[at - start[:, None], every[:, None]].reshape(-1)
        if history is not None:
            history = _histories(history, fed)
        out = step(cache, fed)
        number = (at - bounds.begins[:, None]).reshape(-1)
        logits = out.logits.reshape(batch * tokens, -1)
        how = mine, history, number, wide_stages, boards[1]
        choice: Choice = choose(logits, out.token.reshape(-1), wide_rows, *how)
        made = jax.tree.map(lambda a: a.reshape(batch, tokens, *a.shape[1:]), Made.of(choice))
        return _Looked(out.cache, made, (boards[0], choice.board))

    def choosing(at: Array, history: History | None) -> Choosing:
        """How the tokens after position `at` are chosen, of drafts that are not yet fed."""
        untold = dataclasses.replace(stages, logprobs=None)

        def following(
            memory: Any, fed: Array, logits: Array, greedy: Array, number: Array
        ) -> tuple[Array, Any]:
            history, board = memory
            mine = None if keys is None else keys[at + number - start, every]
            if history is not None:
                history = said(history, fed)
            index = at + number - bounds.begins
            choice = choose(logits, greedy, rows, mine, history, index, untold, board)
            return choice.token, (history, choice.board)

        board = empty_board(batch, model.config.vocab_size, stages)
        return Choosing((history, board), following)

    def run(carry: Any, _: None) -> tuple[Any, Made]:
        cache, known, history, boards, held = carry
        before = cache.lengths
        how = choosing(before, history)
        drafts, counts, held = found = _look(source, weights, known, before, held, bounds, how)
        fed = jnp.concatenate([known[every, before][:, None], drafts], axis=1)
        args = cache, fed, history, boards
        looked = several(*args) if source.always else lax.cond(found.any, several, one, *args)
        made = looked.made
        # Where a logit is not finite, NOT_FINITE goes on: what follows is for nobody.
        kept = kept_tokens(made.tokens, fed[:, 1:], counts, bounds.ends - before)
        counted = order < kept[:, None]
        where = jnp.where(counted, before[:, None] + 1 + order, capacity)
        known = known.at[every[:, None], where].set(made.tokens, mode="drop")
        if history is not None:
            history = _all_said(history, jnp.where(counted, fed, EVERY_TOKEN))
        cache = dataclasses.replace(looked.cache, lengths=before + kept)
        made = made._replace(tokens=jnp.where(counted, made.tokens, NO_TOKEN))
        return (cache, known, history, looked.boards, held), made

    boards = tuple(empty_board(batch * t, model.config.vocab_size, stages) for t in (1, tokens))
    carry = going.cache, _written(going.known, going), going.history, boards, going.state
    (cache, known, history, _, held), made = lax.scan(run, carry, None, length=steps)
    gone = Going(cache, known, known[every, cache.lengths], history, held)
    return gone, _gone(source, weights, gone, made, bounds)
