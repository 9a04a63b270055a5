"""The table of PTX instructions, and what a function in it is given: some threads.

`t[1]` reads the second operand in the instruction's type, `t[0] = values` sets the first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from ptx_text import (
    SIZES,
    Address,
    Constant,
    Instruction,
    Operand,
    PtxError,
    Register,
    Special,
    Vector,
)

if TYPE_CHECKING:
    from ptx_machine import Machine, Run

__all__ = ["DTYPES", "WARP", "Threads", "function_of", "instruction", "same_size", "storage"]

# bfloat16 and pairs of numbers are bits.
DTYPES: dict[str, str] = {
    kind: {"s": "i", "f": "f"}.get(kind[0], "u") + str(size)
    for kind, size in SIZES.items()
    if kind != "f8"
} | {"pred": "?", "any": "u4"}
WARP = 32


def storage(kind: str) -> str:
    """The dtype that a register of a type is kept in."""
    return "?" if kind == "pred" else f"u{SIZES.get(kind, 4)}"


def same_size(a: Register, b: Register) -> bool:
    """Whether two registers might be one."""
    return SIZES[a.kind] == SIZES[b.kind]


def _fits(register: str, kind: str, wider: bool) -> bool:
    """Whether the assembler takes a register of a type where an instruction has another."""
    if "pred" in (register, kind):
        return register == kind
    if SIZES[register] != SIZES[kind]:
        return wider and SIZES[register] > SIZES[kind] and register[0] != "f"
    if "b" in (register[0], kind[0]):
        return True
    return (register[0] == "f") == (kind[0] == "f")


class Threads:
    """Some threads that execute an instruction together."""

    def __init__(self, run: Run, instruction: Instruction, threads: np.ndarray):
        self.run, self.instruction, self.threads = run, instruction, threads

    @property
    def machine(self) -> Machine:
        return self.run.machine

    @property
    def operands(self) -> tuple[Operand, ...]:
        return self.instruction.operands

    @property
    def kind(self) -> str:
        return self.instruction.kind

    def has(self, *modifiers: str) -> bool:
        """Whether the instruction has one of some modifiers."""
        return not set(modifiers).isdisjoint(self.instruction.modifiers)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.get(self.operands[number], self.kind)

    def __setitem__(self, number: int, values: np.ndarray) -> None:
        self.put(self.operands[number], self.kind, values)

    def get(self, operand: Operand, kind: str, *, wider: bool = False) -> np.ndarray:
        """An operand's value as a type, `[n]`; of a register that may be wider, the low bits."""
        if isinstance(operand, Register):
            if not _fits(operand.kind, kind, wider):
                raise PtxError(f"A register of .{operand.kind} is read as .{kind}.")
            bits = self.run.read(operand, self.threads)
            if wider:
                bits = bits.astype(storage(kind))
            return bits ^ operand.negated if kind == "pred" else bits.view(DTYPES[kind])
        if isinstance(operand, Constant):
            return np.full(len(self.threads), _number(operand.text, kind))
        if isinstance(operand, Special):
            if self.instruction.name not in ("mov", "cvt"):
                raise PtxError(f"{operand.name} is read by mov alone.")
            return self._special(operand.name).astype(storage("u32")).view(DTYPES[kind])
        raise PtxError(f"{operand} is no value.")

    def _special(self, name: str) -> np.ndarray:
        thread, block = self.threads, self.machine.blocks
        along = {
            "tid": thread,
            "ntid": self.machine.threads,
            "ctaid": block[0],
            "nctaid": block[1],
        }
        values = {
            "%laneid": thread % WARP,
            "%warpid": thread // WARP,
            "%dynamic_smem_size": len(self.machine.shared),
            "%clock": self.machine.clock,
            "global_smem": self.machine.shared_base,
        }
        what, dimension = name[1:].split(".") if "." in name else ("", "")
        value = values[name] if not what else along[what]
        if dimension in ("y", "z"):  # programs have one dimension
            value = int(what.startswith("n"))
        return np.broadcast_to(np.asarray(value), thread.shape)

    def put(self, operand: Operand, kind: str, values: np.ndarray, *, wider: bool = False) -> None:
        """Sets a register to values of a type, `[n]`."""
        if not isinstance(operand, Register) or operand.negated:
            raise PtxError(f"{operand} is set.")
        if operand.name == "_":
            return
        if not _fits(operand.kind, kind, wider):
            raise PtxError(f"A register of .{operand.kind} is set as .{kind}.")
        held = storage(operand.kind)
        if SIZES[operand.kind] != SIZES[kind]:
            values = values.astype(held)  # the sign is extended
        self.run.write(operand, self.threads, np.ascontiguousarray(values).view(held))

    def parts(self, number: int) -> tuple[Operand, ...]:
        """The operands in an operand's braces, or itself."""
        operand = self.operands[number]
        return operand.parts if isinstance(operand, Vector) else (operand,)

    def address(self, number: int, space: str) -> np.ndarray:
        """Addresses, int64 `[n]`."""
        operand = self.operands[number]
        if not isinstance(operand, Address):
            raise PtxError(f"{operand} is no address.")
        wide = isinstance(operand.base, Register) and SIZES[operand.base.kind] == 8
        if space == "global" and not wide:
            raise PtxError("An address in global memory has 64 bits.")
        base = self.get(operand.base, "b64" if wide else "b32")
        return base.astype(np.int64) + operand.offset


@functools.cache
def _number(text: str, kind: str) -> Any:
    dtype = np.dtype(DTYPES[kind])
    if text[:2] in ("0f", "0F"):
        if SIZES[kind] != 4:
            raise PtxError(f"{text} is no .{kind}.")
        return np.array(int(text[2:], 16), np.uint32).view(dtype)[()]
    if "." in text or dtype.kind == "f":
        if dtype.kind != "f" or "." not in text:
            raise PtxError(f"{text} is no .{kind}.")
        return dtype.type(float(text))
    value, bits = int(text, 0), 8 * dtype.itemsize
    if not -(1 << (bits - 1)) <= value < 1 << bits:
        raise PtxError(f"{text} is no .{kind}.")
    return np.array(value & ((1 << bits) - 1), storage(kind)).view(dtype)[()]


_Function = Callable[[Threads], None]
_TABLE: dict[str, tuple[_Function, frozenset[str]]] = {}


def instruction(*names: str, also: str = "") -> Callable[[_Function], _Function]:
    """Enters a function into the table, with the modifiers it knows besides types."""

    def enter(function: _Function) -> _Function:
        _TABLE.update({name: (function, frozenset(also.split())) for name in names})
        return function

    return enter


def function_of(instruction: Instruction) -> _Function:
    """What has threads execute an instruction; numpy's warnings are the caller's affair."""
    if instruction.name not in _TABLE:
        raise PtxError(f"The machine does not know `{instruction.name}`.")
    function, known = _TABLE[instruction.name]
    for modifier in instruction.modifiers:
        if modifier not in SIZES and modifier not in known:
            raise PtxError(f"The machine does not know `.{modifier}` of `{instruction.name}`.")
    return function
