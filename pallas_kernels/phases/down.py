"""The down projection, added to the residual."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.env import Env
from pallas_kernels.matvec import iota, stream_rows
from pallas_kernels.phases.residual import load_residual, store_residual

__all__ = ["down"]


def down(env: Env, layer: Array) -> None:
    """x[b] += W_down @ hidden[b]; what follows is the next layer, or the head."""
    tile = env.plan.down
    last = env.dims.num_layers - 1

    def rows_of(group):
        return group * tile.rows + iota((tile.rows,), 0)

    def finish(group, sums, carry):
        rows = rows_of(group)
        x = load_residual(env, rows) + sums
        following = env["attn_norm"][jnp.minimum(layer + 1, last), rows]
        norm_weight = jnp.where(layer == last, env["final_norm"][rows], following)
        store_residual(env, group, rows, x, norm_weight)
        return carry

    stream_rows(
        env,
        weight=env["w_down"],
        layer=layer,
        groups=env.dims.model_dim // tile.rows,
        rows_of=rows_of,
        tile=tile,
        operand=env["ffw_operand"],
        finish=finish,
    )
