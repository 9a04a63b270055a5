"""Two activations of a word: what `pallas_kernels.stream.half2` says, in fewer instructions."""

from __future__ import annotations

from jax import Array

from pallas_kernels.asm import Block, Register
from pallas_kernels.stream.half2 import HALF2_TAG_BITS, Format
from pallas_kernels.stream.ptx.operation import Operation

__all__ = ["unpack_half2"]


def _write_unpacking(
    b: Block, first: Register, second: Register, word: Register, *, form: Format
) -> None:
    kept, low, high, magnitude = b.u32("kept"), b.u16("low"), b.u16("high"), b.f32("magnitude")
    b.and_(kept, word, ~HALF2_TAG_BITS % 2**32)
    b.unpack(low, high, kept)
    b.from_half(first, low)
    b.from_half(second, high)
    if form.root:
        b.comment("To take the magnitude costs nothing: the multiplication does it.")
        for number in (first, second):
            b.abs(magnitude, number)
            b.mul_rn(number, number, magnitude)


_unpack = Operation("ffjax_unpack_half2", _write_unpacking)


def unpack_half2(word: Array, form: Format) -> list[Array]:
    """The two activations of a word, float32, in multiples of the format's unit.

    Args:
        word: int32, any shape.
        form: of the numbers.
    """
    return _unpack(word, results=["float32"] * 2, form=form)
