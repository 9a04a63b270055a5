"""The kernel's body: the phases in order, and the waits between them."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels.env import Env
from pallas_kernels.phases.attention import attention
from pallas_kernels.phases.attn_out import attn_out
from pallas_kernels.phases.down import down
from pallas_kernels.phases.embed import embed
from pallas_kernels.phases.gate_up import gate_up
from pallas_kernels.phases.head import head
from pallas_kernels.phases.qkv import qkv

__all__ = ["LAYER_PHASES", "decode_kernel"]

LAYER_PHASES = (qkv, attention, attn_out, gate_up, down)


def decode_kernel(env: Env) -> None:
    """One whole decode step, as every program runs it.

    Behind every phase stands a barrier: the next phase reads what all programs
    stored in this one. The same barrier protects what is overwritten: a buffer's
    next writer comes two phases or more after its last reader.
    """
    embed(env)
    env.sync.barrier(1)

    def layer_step(layer, carry):
        for index, phase in enumerate(LAYER_PHASES):
            phase(env, layer)
            env.sync.barrier(2 + layer * len(LAYER_PHASES) + index)
        return carry

    lax.fori_loop(jnp.int32(0), jnp.int32(env.dims.num_layers), layer_step, 0)
    head(env)
