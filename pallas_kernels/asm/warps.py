"""Instructions that several threads execute together, and those that say what comes next."""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels.asm.memory import Place
from pallas_kernels.asm.registers import AsmError, Label, Register, Value
from pallas_kernels.asm.writer import Writer

__all__ = ["Warps"]

_EVERYONE = "0xffffffff"


class Warps(Writer):
    """What the threads of a warp, or of a program, do together. Warps come whole."""

    # Branches

    def bra(self, label: Label) -> None:
        """`bra`: goes on at a label; within `when`, if the predicate holds."""
        label.used = True
        self.emit("bra", label.name)

    def bra_if(self, predicate: Register, label: Label) -> None:
        """`@p bra`: goes on at a label where a predicate holds."""
        with self.when(predicate):
            self.bra(label)

    def bra_unless(self, predicate: Register, label: Label) -> None:
        """`@!p bra`: goes on at a label where it does not."""
        with self.unless(predicate):
            self.bra(label)

    def trap(self) -> None:
        """`trap`: ends the launch in an error."""
        self.emit("trap")

    # Barriers

    def bar_warp(self) -> None:
        """`bar.warp.sync`: the threads of the warp wait for each other, and see their stores."""
        self.emit("bar.warp.sync", _EVERYONE)

    def bar_sync(self) -> None:
        """`bar.sync 0`: the warps of the program wait for each other."""
        self.emit("bar.sync", "0")

    def bar_program(self) -> None:
        """`bar.warp.sync`, then `bar.sync 0`: the threads of the program wait for each other."""
        self.bar_warp()
        self.bar_sync()

    # Votes and exchanges

    def vote_all(self, to: Register, each: Register) -> None:
        """`vote.sync.all`: whether a predicate holds for all threads of the warp."""
        self.emit("vote.sync.all.pred", *self._preds(to, each), _EVERYONE)

    def vote_any(self, to: Register, each: Register) -> None:
        """`vote.sync.any`: whether it holds for one of them."""
        self.emit("vote.sync.any.pred", *self._preds(to, each), _EVERYONE)

    def _preds(self, *registers: Register) -> list[str]:
        return [self.read(x, "pred") for x in registers]

    def shfl_bfly(self, to: Register, value: Register, distance: int) -> None:
        """`shfl.sync.bfly`: the value of the lane whose number differs by these bits."""
        words = self.read(to, "b32"), self.read(value, "b32")
        self.emit("shfl.sync.bfly.b32", *words, str(distance), "31", _EVERYONE)

    def shfl_idx(self, to: Register, value: Register, lane: Value) -> None:
        """`shfl.sync.idx`: the value of a lane."""
        words = self.read(to, "b32"), self.read(value, "b32")
        self.emit("shfl.sync.idx.b32", *words, self.read(lane, "u32"), "31", _EVERYONE)

    def redux_max(self, to: Register, value: Register) -> None:
        """`redux.sync.max`: the largest whole number of the warp (8.0 and newer)."""
        self._redux("max", to, value)

    def redux_add(self, to: Register, value: Register) -> None:
        """`redux.sync.add`: the sum of the warp's whole numbers (8.0 and newer)."""
        self._redux("add", to, value)

    def _redux(self, name: str, to: Register, value: Register) -> None:
        kind = to.kind
        if kind not in ("u32", "s32"):
            raise AsmError(f"redux.sync is of whole numbers of 32 bits, not of {kind}.")
        self.emit(f"redux.sync.{name}.{kind}", to.name, self.read(value, kind), _EVERYONE)

    # Tensor cores

    def mma_bf16(
        self,
        sums: Sequence[Register],
        a: Sequence[Register],
        b: Sequence[Register],
        before: Sequence[Register],
    ) -> None:
        """`mma.m16n8k16` of bfloat16, or `m16n8k8` of half the registers: sums of float32.

        Args:
            sums: 4 registers: two columns of row lane / 4, then of the row 8 below.
            a: 4 words of 16 x 16, or 2 of 16 x 8: rows lane / 4 and 8 below of each half.
            b: 2 words of 16 x 8, or 1 of 8 x 8: column lane / 4.
            before: 4 registers that the products are added to.
        """
        self._shapes([sums, a, b, before], [(4, 4, 2, 4), (4, 2, 1, 4)])
        shape = "m16n8k16" if len(a) == 4 else "m16n8k8"
        operands = [
            self._matrix(sums, "f32"),
            *(self._matrix(x, "b32") for x in (a, b)),
            self._matrix(before, "f32"),
        ]
        self.emit(f"mma.sync.aligned.{shape}.row.col.f32.bf16.bf16.f32", *operands)

    def mma_s8(
        self,
        sums: Sequence[Register],
        a: Sequence[Register],
        b: Sequence[Register],
        before: Sequence[Register],
    ) -> None:
        """`mma.m16n8k32` of bytes with signs, four a word: sums of 32 bits; as `mma_bf16`."""
        self._shapes([sums, a, b, before], [(4, 4, 2, 4)])
        operands = (self._matrix(x, "b32") for x in (sums, a, b, before))
        self.emit("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", *operands)

    def ldmatrix(self, to: Sequence[Register], place: Place, *, transposed: bool = False) -> None:
        """`ldmatrix`: 1, 2 or 4 matrices of 8 x 8 numbers of 16 bits from shared memory.

        Args:
            to: a word of each: two neighbours of row lane / 4; transposed, of that column.
            place: where lane 8 i + j says that row j of matrix i lies.
            transposed: see above.
        """
        how = ".trans" if transposed else ""
        name = f"ldmatrix.sync.aligned.m8n8.x{len(to)}{how}.shared.b16"
        self.emit(name, self._matrix(to, "b32"), self.address(place, 4))

    def _matrix(self, registers: Sequence[Register], kind: str) -> str:
        return f"{{{', '.join(self.read(x, kind) for x in registers)}}}"

    def _shapes(
        self, given: Sequence[Sequence[Register]], allowed: Sequence[tuple[int, ...]]
    ) -> None:
        sizes = tuple(len(x) for x in given)
        if sizes not in allowed:
            raise AsmError(f"A product takes registers as one of {allowed}, not {sizes}.")
