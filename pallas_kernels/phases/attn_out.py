"""The attention's output projection, added to the residual."""

from __future__ import annotations

from jax import Array

from pallas_kernels.env import Env
from pallas_kernels.matvec import iota, stream_rows
from pallas_kernels.phases.residual import load_residual, store_residual

__all__ = ["attn_out"]


def attn_out(env: Env, layer: Array) -> None:
    """x[b] += W_o @ attention[b]."""
    tile = env.plan.attn_out

    def rows_of(group):
        return group * tile.rows + iota((tile.rows,), 0)

    def finish(group, sums, carry):
        rows = rows_of(group)
        x = load_residual(env, rows) + sums
        store_residual(env, group, rows, x, env["mlp_norm"][layer, rows])
        return carry

    stream_rows(
        env,
        weight=env["w_attn_out"],
        layer=layer,
        groups=env.dims.model_dim // tile.rows,
        rows_of=rows_of,
        tile=tile,
        operand=env["attn_operand"],
        finish=finish,
    )
