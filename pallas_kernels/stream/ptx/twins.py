"""Two activations of a word: what `pallas_kernels.stream.twins` says, in fewer instructions."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax._src import core
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.pallas.triton import lowering

from pallas_kernels.stream.ptx import lowered

__all__ = ["parted"]

_parted_p = core.Primitive("ffjax_parted")
_parted_p.multiple_results = True

# Numbers times 2^96 and 2^-31 more: 0f0F800000 is 2^-96, 0fB0000000 is -2^-31.
_TEXT = (
    "{ .reg .b32 %x; .reg .f32 %f; lop3.b32 %x, $2, 0x9FFF8000, 0x60000000, 0xEA;"
    " mov.b32 %f, %x; fma.rn.f32 $0, %f, 0f0F800000, 0fB0000000; shl.b32 %x, $2, 17;"
    " shr.s32 %x, %x, 2; or.b32 %x, %x, 0x60000000; mov.b32 %f, %x;"
    " fma.rn.f32 $1, %f, 0f0F800000, 0fB0000000; }"
)


@_parted_p.def_effectful_abstract_eval
def _(word):
    return [core.ShapedArray(word.shape, jnp.float32)] * 2, {lowered.ORDERED}


@lowering.register_lowering(_parted_p)
def _(ctx, word):
    result = lowered.like(ctx.avals_out[0].shape, ir.F32Type.get())
    return lowered.assembly([result] * 2, _TEXT, "=&f,=&f,r", lowered.values(ctx, [word]))


def parted(word: Array) -> list[Array]:
    """The twins of a word, float32.

    Args:
        word: int32, any shape.
    """
    return _parted_p.bind(word)
