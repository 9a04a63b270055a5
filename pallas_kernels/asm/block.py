"""A block of inline PTX."""

from __future__ import annotations

from pallas_kernels.asm.arithmetic import Arithmetic
from pallas_kernels.asm.memory import Memory
from pallas_kernels.asm.warps import Warps

__all__ = ["Block"]


class Block(Arithmetic, Memory, Warps):
    """A text of inline PTX while it is written: registers, labels, and an instruction a method.

    What is bound to the text comes first, as results and operands. Registers are declared under a
    name, which becomes another one where it is taken: a function that writes a part of a text may
    be called twice. A register that is read before it is set, or a result that overwrites an
    operand, is found by the tests' PTX machine.
    """
