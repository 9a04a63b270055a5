"""A typed assembler for inline PTX: no compiler, no JAX.

    b = Block()
    [sum], [address] = b.results("f32"), b.operands(address="u32")
    thread, low = b.u32("thread"), b.pred("low")
    b.comment("Only the first warp reads.")
    b.mov(thread, TID)
    b.setp("lt", low, thread, 32)
    with b.when(low):
        b.ld_shared(sum, address + 64)
    b.text()

A register has a name and a type, an instruction is a method that names its PTX, a label belongs to
its block, and a text has a line for each instruction.
"""

from pallas_kernels.asm.block import Block
from pallas_kernels.asm.registers import (
    LANE,
    TID,
    Address,
    AsmError,
    Label,
    Register,
    Special,
    Value,
    bits_of,
)

__all__ = [
    "LANE",
    "TID",
    "Address",
    "AsmError",
    "Block",
    "Label",
    "Register",
    "Special",
    "Value",
    "bits_of",
]
