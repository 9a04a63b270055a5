"""What a product of a segment is given: activations normed, and rounded as its weights want them.

- Weights of 16 bits meet bfloat16.
- Weights that are integers meet integers: two digits of 8 bits, s * (256 * high + low). The inputs
  that the threads of one column of one warp hold have one s, a 16256th of the largest of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.spec.handed import as_bfloat16
from pallas_kernels.stream.plan import QUAD, Segment, StreamPlan

__all__ = ["mean_square_scale", "normed_inputs", "plain_inputs", "scale_groups"]

# The largest of the numbers that share a scale becomes this: 127 * 2^7.
_LARGEST = 16256
# So that nothing is divided by zero.
_SMALLEST = 1e-30


def plain_inputs(plan: StreamPlan, segment: Segment, x: Array) -> Array:
    """Activations `[C, in]` as the segment's product multiplies them, float32 `[C, in]`."""
    if plan.segments[segment].bits == 16:
        return as_bfloat16(x)
    whole, unit = _digits(plan, segment, x)
    return whole * unit


def normed_inputs(plan: StreamPlan, segment: Segment, x: Array, weight: Array | None) -> Array:
    """RMSNorm (Zhang and Sennrich, arXiv 1910.07467) of the residual, then as `plain_inputs`.

    The norm is that of the numbers as they were handed over, not of the owners' float32.

    Args:
        plan: the step's.
        segment: whose product it is for.
        x: the residual as it was handed over, float32 `[C, D]`.
        weight: of the norm, its offset added, float32 `[D]`; None: the model does not norm here.

    Returns:
        Float32 `[C, D]`.
    """
    if weight is None:
        return plain_inputs(plan, segment, x)
    scale = mean_square_scale(plan, x)
    if plan.segments[segment].bits == 16:
        return as_bfloat16(x * scale * weight)
    # The norm's scale is the same for all: it goes into that of the digits.
    whole, unit = _digits(plan, segment, x * weight)
    return whole * (unit * scale)


def mean_square_scale(plan: StreamPlan, x: Array) -> Array:
    """1 / sqrt(mean(x^2) + eps) of each row, float32 `[C, 1]`."""
    return lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + plan.dims.norm_eps)


def _digits(plan: StreamPlan, segment: Segment, x: Array) -> tuple[Array, Array]:
    """256 * high + low of each input, a whole number, and its s: float32 `[C, in]` each."""
    group = scale_groups(plan, segment)
    largest = jax.ops.segment_max(jnp.abs(x).T, group, num_segments=int(group.max()) + 1)
    largest = jnp.maximum(largest, _SMALLEST)[group].T
    return jnp.round(x / largest * _LARGEST), largest / _LARGEST


def scale_groups(plan: StreamPlan, segment: Segment) -> np.ndarray:
    """Which inputs of a segment of integers share a scale: the number of each one's group, `[in]`.

    A warp reads a row of weights in lines. Of several tokens, all that it reads of a row, in all of
    its lines, is one group. Of a single one each line is shared out to 4 chunks: a group is what
    the lines of one warp have for one chunk, a fourth of each line; where the weights' scales are
    of small groups, an eighth of the line's first half and one of its second half.
    """
    part = plan.segments[segment]
    line = plan.line(part) * part.grain  # inputs
    of_split, inside = np.divmod(np.arange(part.inner), part.width)
    warp = inside // (part.reads * line)
    if not plan.chunked:
        return of_split * plan.product_warps + warp
    place = inside % line
    chunk = place % (line // 2) // (line // 8) if part.fine else place // (line // QUAD)
    return (of_split * plan.product_warps + warp) * QUAD + chunk
