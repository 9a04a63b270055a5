"""Query, key and value projections of the normalised residual."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.env import Env
from pallas_kernels.matvec import iota, stream_rows
from pallas_kernels.phases.residual import rms_scale

__all__ = ["qkv"]


def qkv(env: Env, layer: Array) -> None:
    """qkv[b] = W_qkv @ rmsnorm(x[b]), before RoPE, float32."""
    tile = env.plan.qkv
    scale = rms_scale(env)

    def rows_of(group):
        return group * tile.rows + iota((tile.rows,), 0)

    def finish(group, sums, carry):
        b = iota(sums.shape, 1)
        row = jnp.broadcast_to(rows_of(group)[:, None], sums.shape)
        plgpu.store(env["qkv"].at[b, row], sums * scale[None, :], mask=b < env.dims.batch)
        return carry

    stream_rows(
        env,
        weight=env["w_qkv"],
        layer=layer,
        groups=env.dims.qkv_dim // tile.rows,
        rows_of=rows_of,
        tile=tile,
        operand=env["x_operand"],
        finish=finish,
    )
