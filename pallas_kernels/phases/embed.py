"""The tokens' embedding rows become the residual stream."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.env import Env
from pallas_kernels.phases.residual import store_residual
from pallas_kernels.program import iota

__all__ = ["embed"]


def embed(env: Env) -> None:
    """x[b] = embed[tokens[b]], for this program's groups of elements.

    Ids outside the vocabulary are clamped: no token makes the kernel read elsewhere.
    """
    rows_in_group = env.plan.down.rows
    shape = (rows_in_group, env.plan.padded_batch)
    column = iota((env.plan.padded_batch,), 0)
    tokens = plgpu.load(env["tokens"].at[jnp.minimum(column, env.dims.batch - 1)])
    tokens = jnp.clip(tokens, 0, env.dims.vocab_size - 1)

    def group_step(j, carry):
        group = env.program + j * env.plan.programs
        rows = group * rows_in_group + iota((rows_in_group,), 0)
        token = jnp.broadcast_to(tokens[None, :], shape)
        element = jnp.broadcast_to(rows[:, None], shape)
        x = env["embed"][token, element].astype(jnp.float32)
        store_residual(env, group, rows, x, env["attn_norm"][0, rows])
        return carry

    groups = env.dims.model_dim // rows_in_group
    lax.fori_loop(jnp.int32(0), env.share(groups), group_step, 0)
