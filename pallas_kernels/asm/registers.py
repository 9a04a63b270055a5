"""What instructions take: registers, numbers, addresses and labels."""

from __future__ import annotations

import dataclasses
import struct

__all__ = [
    "BYTES",
    "CONSTRAINTS",
    "LANE",
    "TID",
    "Address",
    "AsmError",
    "Label",
    "Register",
    "Special",
    "Value",
    "bits_of",
    "immediate",
]

BYTES = {"pred": 1, "u16": 2, "u32": 4, "s32": 4, "f32": 4, "u64": 8, "s64": 8}
"""The types that registers have, and their bytes."""

CONSTRAINTS = {"u16": "h", "u32": "r", "s32": "r", "u64": "l", "s64": "l", "f32": "f"}
"""How LLVM calls a type that is bound to a text from outside."""

# Smaller numbers are written as people count, larger ones as bits.
_LARGEST_COUNT = 1 << 24


class AsmError(Exception):
    """A text that PTX does not have."""


@dataclasses.dataclass(frozen=True)
class Register:
    """A register.

    Attributes:
        name: as PTX writes it: "%thread", or "$1" of what is bound to the text.
        kind: its type, one of `BYTES`.
    """

    name: str
    kind: str

    def __add__(self, offset: int) -> Address:
        """The address so many bytes after the one that it holds."""
        return Address(self, offset)

    def as_(self, kind: str) -> Register:
        """The same bits taken for another type of the same size."""
        if BYTES[kind] != self.bytes or "pred" in (kind, self.kind):
            raise AsmError(f"{self.name} is of type {self.kind}: it cannot be taken for {kind}.")
        return dataclasses.replace(self, kind=kind)

    @property
    def bytes(self) -> int:
        """Of the type."""
        return BYTES[self.kind]

    @property
    def bits(self) -> str:
        """The type that says only how many bits: "b32"."""
        return f"b{8 * self.bytes}"

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Special:
    """A register that the hardware sets: `mov` alone reads it."""

    name: str

    def __str__(self) -> str:
        return self.name


TID, LANE = Special("%tid.x"), Special("%laneid")
"""A thread's number in its program, and in its warp."""


@dataclasses.dataclass(frozen=True)
class Address:
    """`[base+offset]`, bytes: 32 bits in shared memory, 64 in global memory."""

    base: Register
    offset: int = 0

    def __add__(self, offset: int) -> Address:
        return Address(self.base, self.offset + offset)

    def __str__(self) -> str:
        return f"[{self.base}+{self.offset}]" if self.offset else f"[{self.base}]"


@dataclasses.dataclass
class Label:
    """A place in a text, once `Block.mark` has said where."""

    name: str
    marked: bool = False
    used: bool = False


Value = Register | Special | int | float
"""What an instruction reads."""


def bits_of(number: float) -> int:
    """The bits of a float32."""
    return struct.unpack("<I", struct.pack("<f", number))[0]


def immediate(value: int | float, kind: str) -> str:
    """A number as PTX writes one of a type.

    Raises:
        AsmError: the type has no such number.
    """
    if kind == "f32":
        return f"0f{bits_of(value):08X}"
    if not isinstance(value, int):
        raise AsmError(f"A whole number is wanted where {value} stands: the type is {kind}.")
    bits = int(kind[1:])
    if not -(1 << (bits - 1)) <= value < 1 << bits:
        raise AsmError(f"{value} does not fit in {bits} bits.")
    return str(value) if abs(value) < _LARGEST_COUNT else f"{value % (1 << bits):#x}"
