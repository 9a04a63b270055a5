"""The kernel's body: the phases in order, and the waits between them."""

from __future__ import annotations

import functools

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
# Every phase waits once.
WAITS = len(LAYER_PHASES)


def decode_kernel(env: Env) -> None:
    """One whole decode step, as every program runs it.

    After every phase a program counts itself in, and inside the next one, before it
    touches what others have written, it waits until all have. What it can do without
    them it does in between: load what is its own, and ask for the weights it will read.

    The same wait protects what is overwritten: a buffer's next writer comes two phases or
    more after its last reader.
    """
    embed(env)
    env.sync.arrive()

    def layer_step(layer, carry):
        for index, phase in enumerate(LAYER_PHASES):
            phase(env, layer, functools.partial(env.sync.wait, 1 + layer * WAITS + index))
            env.sync.arrive()
        return carry

    layers = env.dims.num_layers
    lax.fori_loop(jnp.int32(0), jnp.int32(layers), layer_step, 0)
    head(env, functools.partial(env.sync.wait, 1 + layers * WAITS))
