"""The head: logits, the greedy token, and the end of the step."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dims import ceil_div, next_power_of_2
from pallas_kernels.env import Env, Wait, no_wait
from pallas_kernels.matvec import PREFETCH, RowStream
from pallas_kernels.phases.residual import rms_scale
from pallas_kernels.program import iota

__all__ = ["head"]

_NO_TOKEN = 2**31 - 1


def _best(logit: Array, token: Array) -> tuple[Array, Array]:
    """Over axis 0, the largest logit and the lowest token that has it."""
    top = jnp.max(logit, axis=0)
    winner = jnp.min(jnp.where(logit == top[None, :], token, _NO_TOKEN), axis=0)
    return top, winner


def head(env: Env, wait: Wait = no_wait) -> None:
    """logits[b] = W_head @ rmsnorm(x[b]); token[b] = argmax; lengths[b] += 1.

    A sequence whose cache was full gets NaN logits, like in the reference.
    """
    tile, d, bp = env.plan.head, env.dims, env.plan.padded_batch
    column = iota((bp,), 0)
    length = jnp.maximum(plgpu.load(env["lengths"].at[jnp.minimum(column, d.batch - 1)]), 0)
    fits = length < d.capacity

    def rows_of(group):
        # The last group is moved back to end with the last row: rows it shares with
        # the one before are computed twice, to the same bits.
        first = jnp.minimum(group * tile.rows, d.vocab_size - tile.rows)
        return first + iota((tile.rows,), 0)

    groups = ceil_div(d.vocab_size, tile.rows)
    stream = RowStream(env, env["w_head"], None, groups, rows_of, tile, env["x_operand"])
    prefetched = stream.prefetch(PREFETCH)
    wait()
    scale = rms_scale(env)

    def finish(j, group, sums, carry):
        best_logit, best_token = carry
        b = iota(sums.shape, 1)
        token = jnp.broadcast_to(rows_of(group)[:, None], sums.shape)
        logits = jnp.where(fits[None, :], sums * scale[None, :], jnp.nan)
        plgpu.store(env["logits"].at[b, token], logits, mask=b < d.batch)
        # As in jnp.argmax, a NaN wins. A program's tokens rise, so ">" keeps the lowest.
        logits = jnp.where(jnp.isnan(logits), jnp.inf, logits)
        better = logits > best_logit
        return jnp.where(better, logits, best_logit), jnp.where(better, token, best_token)

    shape = (tile.rows, bp)
    nothing = (jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, _NO_TOKEN, jnp.int32))
    best_logit, best_token = stream.run(finish, nothing, prefetched=prefetched)
    top, winner = _best(best_logit, best_token)
    program = env.program
    env["best_logit"][program, :] = top
    env["best_token"][program, :] = winner
    last = env.sync.last_program()

    @pl.when(last)
    def _():
        count = next_power_of_2(env.plan.programs)
        shape = (count, bp)
        row = iota(shape, 0)
        there = row < env.plan.programs
        where = (jnp.minimum(row, env.plan.programs - 1), iota(shape, 1))
        top = plgpu.load(env["best_logit"].at[where], mask=there, other=-jnp.inf)
        token = plgpu.load(env["best_token"].at[where], mask=there, other=_NO_TOKEN)
        real = column < d.batch
        # Every logit -inf leaves no winner; jnp.argmax then says 0.
        _, winner = _best(top, token)
        winner = jnp.where(winner == _NO_TOKEN, 0, winner)
        plgpu.store(env["token"].at[column], winner, mask=real)
        plgpu.store(env["lengths"].at[column], length + 1, mask=real)
