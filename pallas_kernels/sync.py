"""How long the programs of a launch wait for each other at most."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as plgpu

__all__ = ["MAX_POLLS", "trap_if_over"]

# A poll takes about a microsecond, so a wait ends after some seconds.
MAX_POLLS = 1 << 22


def trap_if_over(polls: Array, limit: int) -> Array:
    """Returns `polls`; ends the launch in an error where they exceed `limit`."""
    [out] = plgpu.elementwise_inline_asm(
        f"{{ .reg .pred p; setp.gt.s32 p, $1, {limit}; @p trap; mov.u32 $0, $1; }}",
        args=[jnp.full((1,), polls)],  # inline assembly takes arrays only
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((1,), jnp.int32)],
    )
    return jnp.sum(out)
