"""Gate and up projections and SwiGLU (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.program import iota
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.state import State
from pallas_kernels.stream.tiles import Place

__all__ = ["finish_gate_up"]


def finish_gate_up(env: StreamEnv, place: Place, sums: Array, state: State) -> State:
    """hidden[b] = silu(W_gate @ h) * (W_up @ h) with h = rmsnorm(x[b]); or with GELU."""
    half, bp = env.plan.rows // 2, env.plan.padded_batch
    both = sums.reshape(half, 2, bp)
    is_gate = iota(both.shape, 1) == 0
    gate = jnp.sum(jnp.where(is_gate, both, 0.0), axis=1)
    up = jnp.sum(jnp.where(is_gate, 0.0, both), axis=1)
    if env.features.activation == "silu":
        hidden = gate * jax.nn.sigmoid(gate) * up
    else:
        hidden = jax.nn.gelu(gate, approximate=True) * up
    element, b = place.group * half + iota(hidden.shape, 0), iota(hidden.shape, 1)
    real = (element < env.dims.ffw_dim) & (b < env.dims.batch)
    at = env.mail.layout.ffw + b * env.dims.ffw_dim + element
    env.mail.publish(at, hidden, env.tag(place.layer), real)
    return state
