"""Two activations of a word: what `pallas_kernels.stream.twins` says, in fewer instructions."""

from __future__ import annotations

import struct

import jax.numpy as jnp
from jax import Array
from jax._src import core
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.pallas.triton import lowering

from pallas_kernels.stream.ptx import lowered
from pallas_kernels.stream.twins import Format

__all__ = ["parted"]

_parted_p = core.Primitive("ffjax_parted")
_parted_p.multiple_results = True


def _bits(x: float) -> str:
    """Those of a float32."""
    return "0x" + struct.pack(">f", x).hex().upper()


def _parted_text(form: Format) -> str:
    """Operands: both numbers, then the word."""
    kept, least = 0x80000000 | 0x3FFF << form.shift, _bits(form.least)
    down = f"0f{_bits(1 / form.scale)[2:]}"
    number = f"mov.b32 %f, %x; mov.b32 %g, %y; fma.rn.f32 $N, %f, {down}, %g;"
    to_first = "mov.b32 %x, $2;" if form.shift == 15 else f"shr.s32 %x, $2, {15 - form.shift};"
    return (
        f"{{ .reg .b32 %x, %y; .reg .f32 %f, %g; {to_first}"
        f" lop3.b32 %x, %x, {kept:#010x}, {form.upper:#010x}, 0xEA;"  # (x & kept) | upper
        # With the other sign: (~x & sign) | least
        f" lop3.b32 %y, $2, 0x80000000, {least}, 0xAE; {number.replace('$N', '$0')}"
        f" shl.b32 %x, $2, 17; lop3.b32 %y, %x, 0x80000000, {least}, 0xAE;"
        f" shr.s32 %x, %x, {17 - form.shift}; or.b32 %x, %x, {form.upper:#010x};"
        f" {number.replace('$N', '$1')} }}"
    )


@_parted_p.def_effectful_abstract_eval
def _(word, *, form):
    return [core.ShapedArray(word.shape, jnp.float32)] * 2, {lowered.ORDERED}


@lowering.register_lowering(_parted_p)
def _(ctx, word, *, form):
    result = lowered.like(ctx.avals_out[0].shape, ir.F32Type.get())
    text, arguments = _parted_text(form), lowered.values(ctx, [word])
    return lowered.assembly([result] * 2, text, "=&f,=&f,r", arguments)


def parted(word: Array, form: Format) -> list[Array]:
    """The twins of a word, float32.

    Args:
        word: int32, any shape.
        form: of the numbers.
    """
    return _parted_p.bind(word, form=form)
