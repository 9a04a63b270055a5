"""The attention's output projection, added to the residual."""

from __future__ import annotations

from jax import Array

from pallas_kernels.env import Env, Wait, no_wait
from pallas_kernels.phases.residual import add_to_residual, residual_stream

__all__ = ["attn_out"]


def attn_out(env: Env, layer: Array, wait: Wait = no_wait) -> None:
    """x[b] += W_o @ attention[b]."""
    tile = env.plan.attn_out
    stream = residual_stream(env, env["w_attn_out"], layer, tile, env["attn_operand"])

    def norm_weight_of(element):
        return env["mlp_norm"][layer, element]

    add_to_residual(env, stream, wait, norm_weight_of)
