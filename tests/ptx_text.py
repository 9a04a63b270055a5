"""PTX as text, taken apart: what `ptx_machine` runs."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = [
    "SIZES",
    "Address",
    "Branch",
    "Constant",
    "Corner",
    "Instruction",
    "Operand",
    "Parts",
    "Program",
    "PtxError",
    "Register",
    "Special",
    "Vector",
    "parse",
    "statements",
    "take_apart",
    "without_comments",
]

# Bytes of a type.
SIZES = {f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64)}
SIZES |= {"bf16": 2, "bf16x2": 4, "f16x2": 4, "pred": 1}
_CONSTRAINTS = {"h": "b16", "r": "b32", "l": "b64", "f": "f32"}
_STATEMENT = re.compile(
    r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[A-Za-z_]\w*)\s*:(?!:)"
    r"|(?P<line>[^;{}]+(?:\{[^{}]*\}[^;{}]*)*);)"
)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^\s,][^,]*")
_INSTRUCTION = re.compile(r"(?:@(!?%\w+)\s+)?([a-z]\w*(?:\.[\w:]+)*)(?:\s+(.*))?", re.DOTALL)
_SPECIAL = re.compile(r"%(n?tid|n?ctaid)\.[xyz]|%(laneid|warpid|dynamic_smem_size|clock)")
_NUMBER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)U?|0[fF][0-9a-fA-F]{8}|-?\d+\.\d*")


class PtxError(Exception):
    """What a GPU, or its assembler, would not do."""


@dataclasses.dataclass(frozen=True)
class Register:
    """A register; `name` tells it from those of other scopes. The one of "_" takes anything."""

    name: str
    kind: str
    negated: bool = False


@dataclasses.dataclass(frozen=True)
class Constant:
    """A number as it is written."""

    text: str


@dataclasses.dataclass(frozen=True)
class Special:
    """A register that the hardware sets, or the name of the program's shared memory."""

    name: str


@dataclasses.dataclass(frozen=True)
class Vector:
    """Several operands: `{a, b}`, or `a|b`."""

    parts: tuple[Operand, ...]


@dataclasses.dataclass(frozen=True)
class Address:
    """`[base + offset]`."""

    base: Operand
    offset: int


@dataclasses.dataclass(frozen=True)
class Corner:
    """`[map, {a, b, c}]`: where a box begins, as a tensor map counts."""

    base: Operand
    parts: tuple[Operand, ...]


@dataclasses.dataclass(frozen=True)
class Branch:
    """A label, and the number of the instruction that it stands before."""

    label: str
    to: int


Operand = Register | Constant | Special | Vector | Address | Corner | Branch


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: `@guard name.modifiers operands`."""

    text: str
    name: str
    modifiers: tuple[str, ...]
    guard: Register | None
    operands: tuple[Operand, ...]

    @functools.cached_property
    def kind(self) -> str:
        """The last type among its modifiers."""
        kinds = [m for m in self.modifiers if m in SIZES]
        if not kinds:
            raise PtxError(f"`{self.text}` names no type.")
        return kinds[-1]

    @functools.cached_property
    def collective(self) -> bool:
        """Whether all threads of a warp must execute it together."""
        if self.name in ("bar", "barrier"):
            return "warp" in self.modifiers
        return "sync" in self.modifiers


@dataclasses.dataclass(frozen=True)
class Program:
    """Instructions, and which registers hold results and operands: `$0` and so on."""

    instructions: tuple[Instruction, ...]
    results: tuple[Register, ...]
    early: tuple[bool, ...]  # of the results, whether no operand shares their registers
    inputs: tuple[Register, ...]


def _bindings(constraints: str) -> tuple[list[Register], list[bool], list[Register]]:
    results, early, inputs = [], [], []
    for number, constraint in enumerate(constraints.split(",") if constraints else []):
        found = re.fullmatch(r"(=?)(&?)([hrlf])", constraint.strip())
        if found is None or (inputs and found[1]):
            raise PtxError(f"The constraints {constraints!r} are not results, then operands.")
        register = Register(f"${number}", _CONSTRAINTS[found[3]])
        if found[1]:
            results.append(register)
            early.append(bool(found[2]))
        else:
            inputs.append(register)
    return results, early, inputs


class _Scopes:
    """Names of registers and labels, innermost scope last."""

    def __init__(self, bound: list[Register]):
        self._bound = {register.name: register for register in bound}
        self._open: list[int] = []
        self._made = 0
        self._registers: dict[tuple[int, str], Register] = {}
        self._labels: dict[tuple[int, str], int] = {}

    def enter(self) -> None:
        self._made += 1
        self._open.append(self._made)

    def leave(self) -> None:
        if not self._open:
            raise PtxError("A } closes no scope.")
        self._open.pop()

    def where(self) -> tuple[int, ...]:
        return tuple(reversed(self._open))

    def _place(self, name: str) -> tuple[int, str]:
        if not self._open:
            raise PtxError(f"{name} stands outside of {{ }}: inlined twice, it would clash.")
        return self._open[-1], name

    def declare(self, name: str, kind: str) -> None:
        place = self._place(name)
        if place in self._registers:
            raise PtxError(f"{name} is declared twice in one scope.")
        self._registers[place] = Register(f"{name}/{place[0]}", kind)

    def label(self, name: str, number: int) -> None:
        place = self._place(name)
        if place in self._labels:
            raise PtxError(f"The label {name} stands twice in one scope.")
        self._labels[place] = number

    def register(self, name: str) -> Register:
        if name in self._bound:
            return self._bound[name]
        for scope in self._open[::-1]:
            if (scope, name) in self._registers:
                return self._registers[scope, name]
        raise PtxError(f"{name} is declared nowhere.")

    def branch(self, name: str, scopes: tuple[int, ...]) -> Branch:
        for scope in scopes:
            if (scope, name) in self._labels:
                return Branch(name, self._labels[scope, name])
        raise PtxError(f"There is no label {name} here.")

    def end(self) -> None:
        if self._open:
            raise PtxError("A { is not closed.")


def _operand(text: str, scopes: _Scopes) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return Vector(tuple(_operand(x, scopes) for x in text[1:-1].split(",")))
    if text.startswith("[") and "{" in text:
        base, parts = text[1:-1].split(",", 1)
        vector = _operand(parts, scopes)
        assert isinstance(vector, Vector)
        return Corner(_operand(base, scopes), vector.parts)
    if text.startswith("["):
        base, *rest = re.split(r"\+", text[1:-1])
        return Address(_operand(base, scopes), sum(int(x, 0) for x in rest))
    if "|" in text:
        return Vector(tuple(_operand(x, scopes) for x in text.split("|")))
    if text == "_":
        return Register("_", "any")
    if text == "global_smem" or _SPECIAL.fullmatch(text):
        return Special(text)
    if _NUMBER.fullmatch(text):
        return Constant(text.rstrip("U"))
    register = scopes.register(text.lstrip("!").strip())
    return dataclasses.replace(register, negated=True) if text.startswith("!") else register


def _declare(line: str, scopes: _Scopes) -> None:
    found = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", line, re.DOTALL)
    if found is None or found[1] not in SIZES:
        raise PtxError(f"`{line}` declares no registers.")
    for name in found[2].split(","):
        many = re.fullmatch(r"(%\w+)<(\d+)>", name.strip())
        names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
        for each in names:
            scopes.declare(each, found[1])


class Parts(NamedTuple):
    """An instruction as it is written: `@guard opcode operands;`."""

    guard: str
    opcode: str
    operands: tuple[str, ...]


def take_apart(line: str) -> Parts:
    """An instruction's parts, of the text between two semicolons."""
    found = _INSTRUCTION.fullmatch(line)
    if found is None:
        raise PtxError(f"`{line}` is no instruction.")
    return Parts(found[1] or "", found[2], tuple(_OPERAND.findall(found[3] or "")))


def _instruction(line: str, scopes: _Scopes) -> Instruction:
    parts = take_apart(line)
    guard = _operand(parts.guard, scopes) if parts.guard else None
    if guard is not None and not (isinstance(guard, Register) and guard.kind == "pred"):
        raise PtxError(f"`{line}` is guarded by what is no predicate.")
    name, *modifiers = parts.opcode.split(".")
    # Where a branch goes is known at the end.
    operands = () if name == "bra" else tuple(_operand(x, scopes) for x in parts.operands)
    return Instruction(line, name, tuple(modifiers), guard, operands)


def statements(text: str) -> Iterator[re.Match[str]]:
    """A text's statements: each has one of `open`, `close`, `label` and `line`."""
    at = 0
    while text[at:].strip():
        found = _STATEMENT.match(text, at)
        if found is None:
            raise PtxError(f"A statement lacks its end: `{text[at : at + 60].strip()}`")
        at = found.end()
        yield found


def without_comments(text: str) -> str:
    """A text with spaces where comments were."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)


@functools.lru_cache(maxsize=256)
def parse(text: str, constraints: str) -> Program:
    """Takes inline PTX apart.

    Args:
        text: with `$0` and so on for results and operands.
        constraints: of those, as LLVM wants them: "=&r,r,l".
    """
    results, early, inputs = _bindings(constraints)
    scopes = _Scopes(results + inputs)
    instructions: list[Instruction] = []
    branches: list[tuple[int, tuple[int, ...]]] = []
    for found in statements(without_comments(text)):
        if found["open"]:
            scopes.enter()
        elif found["close"]:
            scopes.leave()
        elif found["label"]:
            scopes.label(found["label"], len(instructions))
        elif (line := found["line"].strip()).startswith(".reg"):
            _declare(line, scopes)
        else:
            instruction = _instruction(line, scopes)
            if instruction.name == "bra":
                branches.append((len(instructions), scopes.where()))
            instructions.append(instruction)
    scopes.end()
    for number, where in branches:
        label = instructions[number].text.split()[-1]
        target = scopes.branch(label, where)
        instructions[number] = dataclasses.replace(instructions[number], operands=(target,))
    return Program(tuple(instructions), tuple(results), tuple(early), tuple(inputs))
