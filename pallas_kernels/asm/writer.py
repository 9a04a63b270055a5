"""A text while it is written: its registers, labels, guards and lines."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterator

from pallas_kernels.asm.registers import (
    BYTES,
    CONSTRAINTS,
    Address,
    AsmError,
    Label,
    Register,
    Special,
    Value,
    immediate,
)

__all__ = ["Writer"]

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
# What compilers call the registers around a text, which its own would hide: %r1, %rd2. And what PTX
# calls its own: %tid, %laneid.
_TAKEN = re.compile(
    r"[a-z]{1,2}\d+|n?(tid|warpid|ctaid|smid)|laneid|gridid|clock(64)?|globaltimer|lanemask_.*|pm\d+"
)
# Registers that a line declares.
_A_LINE = 8


@dataclasses.dataclass(frozen=True)
class _Line:
    text: str
    is_comment: bool = False
    is_label: bool = False


class Writer:
    """What all blocks do, whatever their instructions."""

    def __init__(self) -> None:
        self._lines: list[_Line] = []
        self._registers: list[Register] = []
        self._bound: list[tuple[Register, str, str]] = []  # with constraint, and what it is
        self._names: set[str] = set()
        self._labels: list[Label] = []
        self._guards: list[str] = []
        self._results = 0
        self.warps_jump_whole = False
        """Whether all threads of a warp take the same branches: see `lowered.assembly`."""

    # Registers

    def results(self, *kinds: str, early: bool = True) -> list[Register]:
        """Declares what the text makes: `$0` and so on. To be called before `operands`.

        Args:
            kinds: a type each.
            early: whether one may be written before all operands have been read.
        """
        if len(self._bound) > self._results:
            raise AsmError("A text's results come before its operands.")
        made = [self._bind(kind, "=&" if early else "=", "result") for kind in kinds]
        self._results = len(self._bound)
        return made

    def operands(self, **kinds: str) -> list[Register]:
        """Declares what is bound to the text, after its results: types by name."""
        return [self._bind(kind, "", name) for name, kind in kinds.items()]

    def operand_list(self, kind: str, name: str, count: int) -> list[Register]:
        """Several more of a name."""
        return [self._bind(kind, "", name) for _ in range(count)]

    def _bind(self, kind: str, prefix: str, what: str) -> Register:
        if kind not in CONSTRAINTS:
            raise AsmError(f"A register of type {kind} cannot be bound to a text.")
        register = Register(f"${len(self._bound)}", kind)
        self._bound.append((register, prefix + CONSTRAINTS[kind], what))
        return register

    def given(self, kind: str, name: str) -> Register:
        """A register of a text around this one, as that calls it."""
        return Register(name, kind)

    def reg(self, kind: str, name: str) -> Register:
        """Declares a register; of a name that the block has, the second is called `name_2`."""
        made = Register(f"%{self._fresh(name)}", kind)
        self._registers.append(made)
        return made

    def _fresh(self, name: str) -> str:
        if not _NAME.fullmatch(name) or _TAKEN.fullmatch(name):
            raise AsmError(
                f"{name!r} names no register or label: lower case, digits and _, and not one or two"
                " letters with a number, as compilers call theirs, nor a name of PTX's own."
            )
        numbers = (f"{name}_{i}" for i in itertools.count(2))
        fresh = next(x for x in itertools.chain([name], numbers) if x not in self._names)
        self._names.add(fresh)
        return fresh

    def pred(self, name: str) -> Register:
        """Declares a predicate."""
        return self.reg("pred", name)

    def u16(self, name: str) -> Register:
        """Declares a register of 16 bits."""
        return self.reg("u16", name)

    def u32(self, name: str) -> Register:
        """Declares an unsigned number of 32 bits, or a word of bits."""
        return self.reg("u32", name)

    def s32(self, name: str) -> Register:
        """Declares a number of 32 bits with a sign."""
        return self.reg("s32", name)

    def f32(self, name: str) -> Register:
        """Declares a float32."""
        return self.reg("f32", name)

    def u64(self, name: str) -> Register:
        """Declares an unsigned number of 64 bits, or an address in global memory."""
        return self.reg("u64", name)

    def s64(self, name: str) -> Register:
        """Declares a number of 64 bits with a sign."""
        return self.reg("s64", name)

    def u32s(self, *names: str) -> list[Register]:
        """Declares several."""
        return [self.u32(name) for name in names]

    def preds(self, *names: str) -> list[Register]:
        """Declares several."""
        return [self.pred(name) for name in names]

    def f32s(self, *names: str) -> list[Register]:
        """Declares several."""
        return [self.f32(name) for name in names]

    # Labels and guards

    def label(self, name: str) -> Label:
        """A label of this block, to be marked once; of a name that is taken, `name_2`."""
        made = Label(self._fresh(name))
        self._labels.append(made)
        return made

    def mark(self, label: Label) -> None:
        """Has a label stand here."""
        if label.marked:
            raise AsmError(f"The label {label.name} stands in two places.")
        label.marked = True
        self._lines.append(_Line(f"{label.name}:", is_label=True))

    def marked(self, name: str) -> Label:
        """A label that stands here: where a loop begins."""
        label = self.label(name)
        self.mark(label)
        return label

    @contextlib.contextmanager
    def when(self, predicate: Register | None) -> Iterator[None]:
        """Within it, instructions are executed where a predicate holds; None: everywhere."""
        with self._guarded(predicate, ""):
            yield

    @contextlib.contextmanager
    def unless(self, predicate: Register) -> Iterator[None]:
        """Within it, instructions are executed where a predicate does not hold."""
        with self._guarded(predicate, "!"):
            yield

    @contextlib.contextmanager
    def _guarded(self, predicate: Register | None, sign: str) -> Iterator[None]:
        if predicate is None:
            yield
            return
        if self._guards:
            raise AsmError("An instruction has one guard: combine predicates by `setp` or `and_`.")
        _must_be(predicate, "pred")
        self._guards.append(f"@{sign}{predicate} ")
        try:
            yield
        finally:
            self._guards.pop()

    def comment(self, why: str) -> None:
        """Says why what follows is there; `text` leaves it out, `listing` does not."""
        if "$" in why or "\n" in why:
            raise AsmError("A comment is a line, and has no $: compilers read that.")
        self._lines.append(_Line(why, is_comment=True))

    # Instructions

    def emit(self, name: str, *operands: str) -> None:
        """Writes an instruction, with its guard. Methods of `Block` check what it is given."""
        guard = self._guards[-1] if self._guards else ""
        self._lines.append(_Line(f"{guard}{name} {', '.join(operands)}".rstrip() + ";"))

    def read(self, value: Value, kind: str) -> str:
        """An operand that is read as a type.

        Raises:
            AsmError: it has another size, or is a predicate, or no float where one is wanted.
        """
        if isinstance(value, Register):
            _must_fit(value, kind)
            return value.name
        if isinstance(value, Special):
            raise AsmError(f"{value} is read by mov alone.")
        return immediate(value, kind)

    def address(self, place: Register | Address, size: int) -> str:
        """An address of so many bytes: 4 of shared memory, 8 of global memory."""
        place = place + 0 if isinstance(place, Register) else place
        if place.base.bytes != size or place.base.kind == "f32":
            raise AsmError(f"{place.base} of type {place.base.kind} is no address of {size} bytes.")
        return str(place)

    # Text

    @property
    def jumps(self) -> bool:
        """Whether the text has branches."""
        return any(label.used for label in self._labels)

    @property
    def constraints(self) -> str:
        """What is bound, as LLVM wants to know it: "=&r,r,l"."""
        return ",".join(constraint for _, constraint, _ in self._bound)

    @property
    def result_kinds(self) -> list[str]:
        """The types of what the text makes."""
        return [register.kind for register, _, _ in self._bound[: self._results]]

    def text(self) -> str:
        """The text for compilers: it changes where the code does, and not with what is said of it.

        Raises:
            AsmError: a label stands nowhere.
        """
        return "\n".join(["{", *self._declarations(), *self._code(comments=False), "}"])

    def listing(self) -> str:
        """The text for people: with comments, and what is bound to it."""
        bound = [f"// {register}: {what}, {register.kind}" for register, _, what in self._bound]
        code = self._code(comments=True)
        return "\n".join([*bound, "{", *self._declarations(), *code, "}"])

    def lines(self) -> list[str]:
        """The same as `text`, to be put into another one."""
        return self.text().split("\n")

    def _declarations(self) -> list[str]:
        """Registers that are in use, some a line: PTX's `mma` wants words that are mere bits."""
        lines, used = [], set(re.findall(r"%\w+", "\n".join(self._code(comments=False))))
        for declared in ("pred", "b16", "b32", "b64", "f32"):
            here = [x for x in self._registers if x.name in used]
            names = [x.name for x in here if declared == _declared(x)]
            for first in range(0, len(names), _A_LINE):
                lines.append(f"    .reg .{declared} {', '.join(names[first : first + _A_LINE])};")
        return lines

    def _code(self, comments: bool) -> list[str]:
        for label in self._labels:
            if not label.marked:
                raise AsmError(f"The label {label.name} stands nowhere.")
        lines = []
        for line in self._lines:
            if line.is_comment:
                if comments:
                    lines.append(f"    // {line.text}")
            else:
                lines.append(line.text if line.is_label else f"    {line.text}")
        return lines


def _declared(register: Register) -> str:
    return register.kind if register.kind in ("pred", "f32") else register.bits


def _must_be(register: Register, kind: str) -> None:
    if not isinstance(register, Register) or register.kind != kind:
        raise AsmError(f"{register} is no {kind}.")


def _must_fit(register: Register, kind: str) -> None:
    """A register is read, or set, as a type of its size; whole numbers are no floats."""
    if kind.startswith("b"):  # bits are anything but a predicate
        alike = register.kind != "pred" and register.bits == kind
    else:
        alike = register.kind == kind or (
            not {"pred", "f32"} & {register.kind, kind} and register.bytes == BYTES[kind]
        )
    if not alike:
        raise AsmError(f"{register} is of type {register.kind} where {kind} is wanted.")
