"""The head: logits, the greedy token, and the end of the step."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.dims import next_power_of_2
from pallas_kernels.stream import access
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.product import Outputs, Sums
from pallas_kernels.stream.state import NO_TOKEN, State
from pallas_kernels.stream.tiles import Flush, Place

__all__ = ["finish_head", "leave_head"]


def finish_head(env: StreamEnv, flush: Flush, outputs: Outputs, sums: Sums, state: State) -> State:
    """logits[c] = W_head @ rmsnorm(x[c]); NaN for a token that the cache has no room for."""
    d, features, column = env.dims, env.features, outputs.column
    best_logit, best_token = state.best_logit, state.best_token
    rows = env.segment(Segment.HEAD).rows
    first = flush.group(outputs.number) * rows + outputs.pair
    real = flush.real(outputs.number)
    for token, logits in zip((first, first + rows // 2), sums, strict=True):
        if features.logit_scale != 1:
            logits = logits * features.logit_scale
        if (cap := features.logit_softcap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        logits = jnp.where(env.positions(column) < d.capacity, logits, jnp.nan)
        there = real & (token < d.vocab_size)
        access.store(env["logits"].at[column, token], logits, mask=there & (column < d.columns))
        # As in jnp.argmax, a NaN wins. A program's tokens rise, so ">" keeps the lowest.
        logits = jnp.where(jnp.isnan(logits), jnp.inf, logits)
        better = there & (logits > best_logit)
        best_logit = jnp.where(better, logits, best_logit)
        best_token = jnp.where(better, token, best_token)
    return state._replace(best_logit=best_logit, best_token=best_token)


def _best(logit: Array, token: Array) -> tuple[Array, Array]:
    """Over axis 0, the largest logit and the lowest token that has it."""
    top = jnp.max(logit, axis=0)
    winner = jnp.min(jnp.where(logit == top[None, :], token, NO_TOKEN), axis=0)
    return top, winner


def leave_head(env: StreamEnv, place: Place, state: State) -> State:
    """token[c] = argmax; lengths[b] += T; the step is counted.

    Every program tells the last one its best. When that one has heard all, nobody reads
    lengths or the number of the step any more, and it may write them.
    """
    d, plan, columns = env.dims, env.plan, env.plan.padded_columns
    top, winner = _best(
        state.best_logit.reshape(-1, columns), state.best_token.reshape(-1, columns)
    )
    start, tag = env.exchange.layout.best, env.tag(place.layer)
    column = env.iota((columns,), 0)
    at = start + 4 * (env.program * d.columns + column)
    env.exchange.publish_pair(at, top, tag, column < d.columns)
    env.exchange.publish_pair(at + 2, winner, tag, column < d.columns)

    @pl.when(env.program == plan.programs - 1)
    def _():
        shape = (next_power_of_2(plan.programs), columns)
        program, column = env.iota(shape, 0), env.iota(shape, 1)
        there = (program < plan.programs) & (column < d.columns)
        at = start + 4 * (program * d.columns + column)
        bits, token = env.exchange.collect_pairs([(at, there), (at + 2, there)], tag)
        if not env.interpret:
            access.meet()  # each thread has heard its own alone
        logit = lax.bitcast_convert_type(bits, jnp.float32)
        logit = jnp.where(there, logit, -jnp.inf)
        # What no program said, since the wait for it ran out, wins as token -1.
        logit = jnp.where(token < 0, jnp.inf, logit)
        _, winner = _best(logit, jnp.where(there, token, NO_TOKEN))
        # Every logit -inf leaves no winner; jnp.argmax then says 0.
        winner = jnp.where(winner == NO_TOKEN, 0, winner)
        column = env.iota((columns,), 0)
        access.store(env["token"].at[column], winner, mask=column < d.columns)
        # Here a number is a sequence's.
        there = column < d.batch
        access.store(env["lengths"].at[column], env.length_of(column) + d.tokens, mask=there)
        env.exchange.words[env.exchange.layout.steps] = env.step + 1

    return state
