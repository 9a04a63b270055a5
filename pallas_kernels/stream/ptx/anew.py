"""Numbers that the compiler takes for new ones.

What does not change within a loop, the compiler computes once before it and keeps. Of a whole model
those are more addresses than there are registers: it kept some in memory, 72 bytes a thread of
llama3.1-8b in int4 with 8 sequences. It is cheaper to compute them where they are used.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax._src import core

from pallas_kernels.stream.ptx import lowered

__all__ = ["anew"]

_anew_p = core.Primitive("ffjax_anew")


@_anew_p.def_effectful_abstract_eval
def _(x):
    return core.ShapedArray(x.shape, jnp.int32), {lowered.ORDERED}


@lowered.rule(_anew_p)
def _(ctx, x):
    shape = ctx.avals_out[0].shape
    result, arguments = lowered.like(shape, lowered.i32()), lowered.values(ctx, [x])
    return lowered.assembly([result], "mov.b32 $0, $1;", "=r,r", arguments)[0]


def anew(x: Array) -> Array:
    """The same numbers. What is computed from them is computed behind this, each time anew.

    Args:
        x: int32, any shape.
    """
    return _anew_p.bind(x)
