"""Two activations of a word: what `pallas_kernels.stream.half2` says, in fewer instructions."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax._src import core

from pallas_kernels.stream.half2 import HALF2_TAG_BITS, Format
from pallas_kernels.stream.ptx import lowered

__all__ = ["unpack_half2"]

_parted_p = core.Primitive("ffjax_parted")
_parted_p.multiple_results = True


def _parted_text(form: Format) -> str:
    """Operands: both numbers, then the word."""
    kept = ~HALF2_TAG_BITS % 2**32
    lines = [
        f"{{ .reg .b32 %x; .reg .b16 %h, %g; .reg .f32 %f; and.b32 %x, $2, {kept:#010x};",
        "mov.b32 {%h, %g}, %x; cvt.f32.f16 $0, %h; cvt.f32.f16 $1, %g;",
    ]
    if form.root:  # to take the magnitude costs nothing: the multiplication does it
        lines += [f"abs.f32 %f, ${i}; mul.rn.f32 ${i}, ${i}, %f;" for i in range(2)]
    return " ".join([*lines, "}"])


@_parted_p.def_effectful_abstract_eval
def _(word, *, form):
    return [core.ShapedArray(word.shape, jnp.float32)] * 2, {lowered.ORDERED}


@lowered.rule(_parted_p)
def _(ctx, word, *, form):
    result = lowered.like(ctx.avals_out[0].shape, lowered.f32())
    text, arguments = _parted_text(form), lowered.values(ctx, [word])
    return lowered.assembly([result] * 2, text, "=&f,=&f,r", arguments)


def unpack_half2(word: Array, form: Format) -> list[Array]:
    """The two activations of a word, float32, in multiples of the format's unit.

    Args:
        word: int32, any shape.
        form: of the numbers.
    """
    return _parted_p.bind(word, form=form)
