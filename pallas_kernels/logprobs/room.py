"""Room for arrays that are written before they are read."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

__all__ = ["room"]

# The kernel's name in compiled programs and in profiles.
KERNEL_NAME = "ffjax_room"


def room(shape: tuple[int, ...], dtype: Any, *, interpret: bool = False) -> Array:
    """An array in which nobody knows what stands.

    XLA has none: zeros of 8 steps' logits of 8 sequences take as long to write as the logits.

    Args:
        shape: its shape.
        dtype: its dtype.
        interpret: run on a CPU.
    """
    return pl.pallas_call(
        lambda _: None,
        grid=(1,),
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        name=KERNEL_NAME,
    )()
