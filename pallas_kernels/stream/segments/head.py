"""The head: logits, the greedy token, and the end of the step."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dims import next_power_of_2
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.product import Outputs, Sums
from pallas_kernels.stream.state import NO_TOKEN, State
from pallas_kernels.stream.tiles import Flush, Place

__all__ = ["finish_head", "leave_head"]


def finish_head(env: StreamEnv, flush: Flush, outputs: Outputs, sums: Sums, state: State) -> State:
    """logits[b] = W_head @ rmsnorm(x[b]). A sequence whose cache was full gets NaN logits."""
    d, features, b = env.dims, env.features, outputs.sequence
    best_logit, best_token = state.best_logit, state.best_token
    rows = env.segment(Segment.HEAD).rows
    first = flush.group(outputs.number) * rows + outputs.pair
    real = flush.real(outputs.number)
    for token, logits in zip((first, first + rows // 2), sums, strict=True):
        if features.logit_scale != 1:
            logits = logits * features.logit_scale
        if (cap := features.logit_softcap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        logits = jnp.where(env.batch_lengths(b) < d.capacity, logits, jnp.nan)
        there = real & (token < d.vocab_size)
        plgpu.store(env["logits"].at[b, token], logits, mask=there & (b < d.batch))
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
    """token[b] = argmax; lengths[b] += 1; the step is counted.

    Every program tells the last one its best. When that one has heard all, nobody reads
    lengths or the number of the step any more, and it may write them.
    """
    d, plan, bp = env.dims, env.plan, env.plan.padded_batch
    top, winner = _best(state.best_logit.reshape(-1, bp), state.best_token.reshape(-1, bp))
    start, tag = env.mail.layout.best, env.tag(place.layer)
    b = env.iota((bp,), 0)
    at = start + 4 * (env.program * d.batch + b)
    env.mail.publish_pair(at, top, tag, b < d.batch)
    env.mail.publish_pair(at + 2, winner, tag, b < d.batch)

    @pl.when(env.program == plan.programs - 1)
    def _():
        shape = (next_power_of_2(plan.programs), bp)
        program, b = env.iota(shape, 0), env.iota(shape, 1)
        there = (program < plan.programs) & (b < d.batch)
        at = start + 4 * (program * d.batch + b)
        bits, token = env.mail.collect_pairs([(at, there), (at + 2, there)], tag)
        if not env.interpret:
            plgpu.debug_barrier()  # each thread has heard its own alone
        logit = lax.bitcast_convert_type(bits, jnp.float32)
        logit = jnp.where(there, logit, -jnp.inf)
        # What no program said, since the wait for it ran out, wins as token -1.
        logit = jnp.where(token < 0, jnp.inf, logit)
        _, winner = _best(logit, jnp.where(there, token, NO_TOKEN))
        # Every logit -inf leaves no winner; jnp.argmax then says 0.
        winner = jnp.where(winner == NO_TOKEN, 0, winner)
        column = env.iota((bp,), 0)
        real = column < d.batch
        plgpu.store(env["token"].at[column], winner, mask=real)
        plgpu.store(env["lengths"].at[column], env.batch_lengths(column) + 1, mask=real)
        env.mail.words[env.mail.layout.steps] = env.step + 1

    return state
