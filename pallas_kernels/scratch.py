"""The step's scratch buffers in device memory, and how activations lie in them.

An *operand* buffer holds the bfloat16 activations that a mat-vec multiplies with:
element i of sequence b lies at row `(i // depth) * Bp + b`, column `i % depth` (Bp:
the padded batch). So the operand of a weight tile, `chunks * Bp` columns of `depth`
inputs, is one contiguous block. Rows beyond the inputs and columns of padding
sequences are never written; the first are masked when read, the second stay in
columns of the product that nobody stores.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dims import ceil_div, next_power_of_2
from pallas_kernels.plan import Plan, Tile

__all__ = ["scratch_shapes"]


def scratch_shapes(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    """The scratch buffers by name. Their contents on entry do not matter.

    x: float32 residual stream. x_operand: the residual times the next norm's
    weights, not yet divided by its root mean square. x_squares: sums of squares of
    a group's residuals, from which readers take the root mean square. q: queries after
    RoPE, float32. attn_operand, ffw_operand: operands of the
    output and down projections. part_*: maximum, sum and weighted values of one
    span of attention. best_*: each program's best logit and its token.
    """
    d, bp = plan.dims, plan.padded_batch
    splits, groups = plan.attention.max_splits, ceil_div(d.model_dim, plan.down.rows)

    def operand(tile: Tile) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((tile.blocks * tile.chunks * bp, tile.depth), jnp.bfloat16)

    def f32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    heads = d.batch * d.num_kv_heads
    return {
        "x": f32(d.batch, d.model_dim),
        "x_operand": operand(plan.qkv),
        "x_squares": f32(next_power_of_2(groups), bp),
        "q": f32(d.batch, d.attn_dim),
        "attn_operand": operand(plan.attn_out),
        "ffw_operand": operand(plan.down),
        "part_max": f32(heads, splits, d.q_per_kv),
        "part_sum": f32(heads, splits, d.q_per_kv),
        "part_out": f32(heads, splits, d.q_per_kv, d.head_dim),
        "best_logit": f32(plan.programs, bp),
        "best_token": jax.ShapeDtypeStruct((plan.programs, bp), jnp.int32),
    }
