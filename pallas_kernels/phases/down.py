"""The down projection, added to the residual."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.env import Env, Wait, no_wait
from pallas_kernels.phases.residual import add_to_residual, residual_stream

__all__ = ["down"]


def down(env: Env, layer: Array, wait: Wait = no_wait) -> None:
    """x[b] += W_down @ hidden[b]; what follows is the next layer, or the head."""
    stream = residual_stream(env, env["w_down"], layer, env.plan.down, env["ffw_operand"])
    last = env.dims.num_layers - 1

    def norm_weight_of(element):
        following = env["attn_norm"][jnp.minimum(layer + 1, last), element]
        return jnp.where(layer == last, env["final_norm"][element], following)

    add_to_residual(env, stream, wait, norm_weight_of)
