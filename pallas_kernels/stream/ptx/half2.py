"""Two activations of a word: what `pallas_kernels.stream.half2` says, in fewer instructions."""

from __future__ import annotations

from jax import Array

from pallas_kernels.asm import Block, Register
from pallas_kernels.inline_ptx.operation import Operation
from pallas_kernels.stream.half2 import HALF2_TAG_BITS, Format

__all__ = ["Parting", "unpack_half2"]


class Parting:
    """The text that parts words: registers for it, used for one word after another."""

    def __init__(self, b: Block, form: Format):
        """Declares registers.

        Args:
            b: the text.
            form: of the words' numbers.
        """
        self._b, self._form, self._kept = b, form, b.u32("kept")
        self._low, self._high, self._magnitude = b.u16("low"), b.u16("high"), b.f32("magnitude")

    def write(
        self, first: Register, second: Register, word: Register, tag: Register | None = None
    ) -> None:
        """Parts a word.

        Args:
            first: is set to its first activation, in multiples of the format's unit.
            second: to its second one.
            word: the word.
            tag: what it carries, at its place; None: whatever that is.
        """
        b = self._b
        if tag is None:
            b.and_(self._kept, word, ~HALF2_TAG_BITS % 2**32)
        else:
            b.xor(self._kept, word, tag)
        b.unpack(self._low, self._high, self._kept)
        b.from_half(first, self._low)
        b.from_half(second, self._high)
        if self._form.root:
            b.comment("To take the magnitude costs nothing: the multiplication does it.")
            for number in (first, second):
                b.abs(self._magnitude, number)
                b.mul_rn(number, number, self._magnitude)


def _write_unpacking(
    b: Block, first: Register, second: Register, word: Register, *, form: Format
) -> None:
    Parting(b, form).write(first, second, word)


_unpack = Operation("ffjax_unpack_half2", _write_unpacking)


def unpack_half2(word: Array, form: Format) -> list[Array]:
    """The two activations of a word, float32, in multiples of the format's unit.

    Args:
        word: int32, any shape.
        form: of the numbers.
    """
    return _unpack(word, results=["float32"] * 2, form=form)
