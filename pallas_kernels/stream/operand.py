"""A segment's operand: collected from the mail, normalised where it is a residual."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.program import iota
from pallas_kernels.stream.env import StreamEnv, select
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.tiles import Place

__all__ = ["collect_operand"]


def collect_operand(env: StreamEnv, first: Place) -> Array:
    """Waits for the activations of the segment that begins with the tile `first`.

    Norms' weights are loaded before the wait. RMSNorm and its rounding to bfloat16 are those
    of the reference.

    Returns:
        bfloat16 `[columns, depth]`; 0 beyond the inputs and for padding sequences.
    """
    plan, d, mail = env.plan, env.dims, env.mail
    bp = plan.padded_batch
    shape = (plan.columns, plan.depth)
    chunk, b = lax.div(iota(shape, 0), jnp.int32(bp)), lax.rem(iota(shape, 0), jnp.int32(bp))
    within = chunk * plan.depth + iota(shape, 1)
    segment = first.segment
    inner = env.of_segment(segment, "inner")
    width = env.of_segment(segment, "width")
    element = first.split * width + within
    mask = (b < d.batch) & (within < width) & (element < inner) & first.real
    layer = jnp.minimum(first.layer, d.num_layers - 1)
    safe = jnp.minimum(element, d.model_dim - 1)

    def ones():
        return jnp.ones(shape, jnp.float32)

    pre_norm = env.features.pre_norm
    norm = lax.switch(
        segment,
        [
            (lambda: env.norm_weight("attn_norm", layer, safe)) if pre_norm else ones,
            ones,
            (lambda: env.norm_weight("mlp_norm", layer, safe)) if pre_norm else ones,
            ones,
            lambda: env.norm_weight("final_norm", safe),
        ],
    )
    at = mail.layout
    start = select(segment, [at.x_in, at.attn, at.x_mid, at.ffw, at.x_in])
    x = mail.collect(start + b * inner + element, env.tag(first.layer), mask)
    squares = jnp.sum(x * x, axis=1).reshape(plan.columns // bp, bp).sum(axis=0)
    scale = lax.rsqrt(squares / d.model_dim + d.norm_eps)  # [Bp]
    is_normed = segment == Segment.HEAD
    if pre_norm:
        is_normed |= (segment == Segment.QKV) | (segment == Segment.GATE_UP)
    scale = jnp.where(is_normed, scale, 1.0)
    each = jnp.broadcast_to(scale[None, :], (plan.columns // bp, bp)).reshape(plan.columns)
    x = x * each[:, None] * norm
    return jnp.where(mask, x, 0.0).astype(jnp.bfloat16)
