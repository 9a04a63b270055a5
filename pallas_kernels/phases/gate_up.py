"""Gate and up projections and SwiGLU (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.env import Env, Wait, no_wait
from pallas_kernels.matvec import PREFETCH, RowStream
from pallas_kernels.phases.residual import rms_scale, store_operand
from pallas_kernels.program import iota

__all__ = ["gate_up"]


def gate_up(env: Env, layer: Array, wait: Wait = no_wait) -> None:
    """hidden[b] = silu(W_gate @ h) * (W_up @ h) with h = rmsnorm(x[b]).

    A group holds half its rows of the gate and the same rows of the up projection,
    so that the product needs no other program.
    """
    tile = env.plan.gate_up
    half = tile.rows // 2
    bp = env.plan.padded_batch

    def rows_of(group):
        r = iota((tile.rows,), 0)
        is_up = lax.div(r, jnp.int32(half))
        return group * half + lax.rem(r, jnp.int32(half)) + is_up * env.dims.ffw_dim

    groups = env.dims.ffw_dim // half
    stream = RowStream(env, env["w_gate_up"], layer, groups, rows_of, tile, env["x_operand"])
    prefetched = stream.prefetch(PREFETCH)
    wait()
    scale = rms_scale(env)

    def finish(j, group, sums, carry):
        pair = (sums * scale[None, :]).reshape(2, half, bp)
        is_gate = iota(pair.shape, 0) == 0
        gate = jnp.sum(jnp.where(is_gate, pair, 0.0), axis=0)
        up = jnp.sum(jnp.where(is_gate, 0.0, pair), axis=0)
        hidden = gate * jax.nn.sigmoid(gate) * up
        rows = group * half + iota((half,), 0)
        store_operand(env["ffw_operand"], hidden, rows, env.plan.down.depth, bp)
        return carry

    stream.run(finish, prefetched=prefetched)
