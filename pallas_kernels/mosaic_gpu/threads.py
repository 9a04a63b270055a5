"""A program's threads, and how numbers come from one to another.

Within a warp they are shuffled; else they go through shared memory, where all threads meet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, gpu

from pallas_kernels.asm import TID, Block
from pallas_kernels.mosaic_gpu.ir import constant, i32, integer, is_float, width, written
from pallas_kernels.mosaic_gpu.layout import Layout, bits_of_axes, log2
from pallas_kernels.mosaic_gpu.values import Lazy, Registers

__all__ = ["Threads"]

_LANE_BITS = 5
# A shuffle that fetches for each of so many registers is no longer faster than shared memory.
_MOST_SHUFFLES = 16


def _number(*, anew: bool) -> Any:
    """A thread's number; anew: the compiler may take no earlier one for it."""
    b = Block()
    [number] = b.results("u32", early=False)
    b.mov(number, TID)
    return written(b, [], effects=anew)[0]


def _tree(combine: Callable[[Any, Any], Any], values: Sequence[Any]) -> Any:
    values = list(values)
    while len(values) > 1:
        pairs = [combine(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(pairs) * 2 :]
    return values[0]


class Threads:
    """The threads of a program.

    Attributes:
        count: how many, a power of two.
        number: each thread's, int32.
        blocks: numbers of the blocks of code that are open, the innermost last: see `Lazy`.
    """

    def __init__(self, count: int, scratch: Any, scratch_bytes: int):
        """Must be called where the kernel begins.

        Args:
            count: threads.
            scratch: address of shared memory for what goes from thread to thread, int32.
            scratch_bytes: its size.
        """
        self.count = count
        self.blocks = [0]
        self._scratch, self._scratch_bytes = scratch, scratch_bytes
        self._last_block = 0
        # Whether somebody may still read what lies in shared memory.
        self._in_use = True
        self.number = _number(anew=False)

    # What a thread knows by its number

    def plain(self, shape: Sequence[int]) -> Layout:
        """Where texts of PTX want the elements of an array."""
        return Layout.plain(shape, self.count)

    @contextlib.contextmanager
    def number_anew(self) -> Iterator[None]:
        """Within it, what follows from numbers of threads follows from numbers read anew."""
        before = self.number
        self.number = _number(anew=True)
        try:
            yield
        finally:
            self.number = before

    def element(self, layout: Layout, register: int) -> Any:
        """The number of the element in a register of each thread, int32."""
        out, bit = None, 0
        while bit < len(layout.places):
            place, run = layout.places[bit], 1
            if place < 0:
                bit += 1
                continue
            while bit + run < len(layout.places) and layout.places[bit + run] == place + run:
                run += 1
            part = self._field(place, run)
            if bit:
                part = arith.shli(part, constant(i32(), bit))
            out = part if out is None else arith.ori(out, part)
            bit += run
        more = layout.element(register)
        if out is None:
            return constant(i32(), more)
        return out if more == 0 else arith.ori(out, constant(i32(), more))

    def _field(self, first: int, bits: int) -> Any:
        """Some bits of each thread's number, int32."""
        out = self.number
        if first:
            out = arith.shrui(out, constant(i32(), first))
        if first + bits < log2(self.count):
            out = arith.andi(out, constant(i32(), (1 << bits) - 1))
        return out

    def _is_set(self, bit: int) -> Any:
        return self.where_not(1 << bit, inverted=True)

    def where_not(self, mask: int, *, inverted: bool = False) -> Any:
        """Whether none of these bits of a thread's number is set; inverted, whether one is."""
        found = arith.andi(self.number, constant(i32(), mask))
        kind = arith.CmpIPredicate.ne if inverted else arith.CmpIPredicate.eq
        return arith.cmpi(kind, found, constant(i32(), 0))

    # Arrays wherever they are wanted

    def at(self, x: Registers | Lazy, layout: Layout) -> list[Any]:
        """A thread's values of an array, in a layout."""
        if isinstance(x, Lazy):
            return x.at(layout, self.blocks)
        if x.size == 1:
            return x.regs * layout.registers
        return x.regs if x.layout == layout else self._moved(x, layout)

    def held(self, x: Registers | Lazy) -> Registers:
        """An array in registers, wherever it is."""
        if isinstance(x, Registers):
            return x
        layout = self.plain(x.shape)
        return Registers(x.shape, layout, self.at(x, layout))

    def _moved(self, x: Registers, layout: Layout) -> list[Any]:
        source, target = x.layout.places, layout.places
        crossing = [a for a, b in zip(source, target, strict=True) if a >= 0 and a != b]
        chosen = [i for i, (a, b) in enumerate(zip(source, target, strict=True)) if a < 0 <= b]
        if crossing and (
            max(crossing) >= _LANE_BITS or layout.registers << len(chosen) > _MOST_SHUFFLES
        ):
            return self._through_shared_memory(x, layout)

        def fetch(register: int, wanted: int) -> Any:
            value = x.regs[register]
            return self._shuffled(value, x.layout, layout, wanted) if crossing else value

        def choose(bits: list[int], register: int, wanted: int) -> Any:
            if not bits:
                return fetch(register, wanted)
            bit, *rest = bits
            other = register | 1 << (-1 - source[bit])
            no, yes = choose(rest, register, wanted), choose(rest, other, wanted)
            return arith.select(self._is_set(target[bit]), yes, no)

        def fixed(wanted: int) -> int:
            return sum(
                (wanted >> (-1 - b) & 1) << (-1 - a)
                for a, b in zip(source, target, strict=True)
                if a < 0 and b < 0
            )

        return [choose(chosen, fixed(k), k) for k in range(layout.registers)]

    def _shuffled(self, value: Any, source: Layout, target: Layout, register: int) -> Any:
        lane = None
        for place in range(_LANE_BITS):
            if place in source.places:
                wanted = target.places[source.places.index(place)]
                if wanted < 0:
                    bit = constant(i32(), register >> (-1 - wanted) & 1)
                else:
                    bit = self._field(wanted, 1)
            else:
                bit = self._field(place, 1)
            bit = arith.shli(bit, constant(i32(), place)) if place else bit
            lane = bit if lane is None else arith.ori(lane, bit)
        b = Block()
        [out] = b.results("u32", early=False)
        word, number = b.operands(word="u32", lane="u32")
        b.shfl_idx(out, word, number)
        return self._as_word(value, lambda w: written(b, [w, lane])[0])

    def _exchanged(self, value: Any, distance: int) -> Any:
        """The value of the thread whose number differs in one bit, of the same warp."""
        b = Block()
        [out] = b.results("u32", early=False)
        [word] = b.operands(word="u32")
        b.shfl_bfly(out, word, distance)
        return self._as_word(value, lambda w: written(b, [w])[0])

    def _as_word(self, value: Any, change: Callable[[Any], Any]) -> Any:
        return _from_word(change(_to_word(value)), value.type)

    # Shared memory

    def meet(self) -> None:
        """Waits for the program's other threads."""
        gpu.barrier()
        self._in_use = False

    def _through_shared_memory(self, x: Registers, layout: Layout) -> list[Any]:
        kind = x.regs[0].type
        self._put(x.regs, x.layout)
        out = [
            _from_word(self._get(self.element(layout, k)), kind) for k in range(layout.registers)
        ]
        self._in_use = True
        return out

    def _put(self, regs: Sequence[Any], layout: Layout) -> None:
        """Lays elements down in order; when all have met, they are there."""
        size = 4 << len(layout.places)
        if size > self._scratch_bytes:
            raise NotImplementedError(
                f"Threads exchange at most {self._scratch_bytes} bytes at once, got {size}."
            )
        if self._in_use:
            self.meet()
        free = layout.free(self.count)
        mine = self.where_not(free) if free else constant(integer(1), 1)
        mine = arith.extui(i32(), mine)
        b = Block()
        [nothing] = b.results("u32", early=False)
        place, word, wanted = b.operands(place="u32", word="u32", wanted="u32")
        puts = b.pred("puts")
        b.setp("ne", puts, wanted, 0)
        with b.when(puts):
            b.st_shared(place, word)
        b.mov(nothing, 0)
        for k, value in enumerate(regs):
            address = self._address(self.element(layout, k))
            written(b, [address, _to_word(value), mine])
        self.meet()

    def _get(self, element: Any) -> Any:
        b = Block()
        [word] = b.results("u32", early=False)
        [place] = b.operands(place="u32")
        b.ld_shared(word, place)
        return written(b, [self._address(element)])[0]

    def _address(self, element: Any) -> Any:
        return arith.addi(self._scratch, arith.shli(element, constant(i32(), 2)))

    # Reductions

    def reduced(
        self,
        x: Registers | Lazy,
        axes: Sequence[int],
        combine: Callable[[Any, Any], Any],
    ) -> Registers:
        """An array along some axes reduced, always in the same order: every thread has the result.

        Args:
            x: the array.
            axes: of it.
            combine: two numbers; must not mind their order.
        """
        x = self.held(x)
        shape = tuple(size for axis, size in enumerate(x.shape) if axis not in axes)
        bits = bits_of_axes(x.shape)
        gone = {bit for axis in axes for bit in bits[axis]}
        kept = [
            bit for axis in reversed(range(len(x.shape))) if axis not in axes for bit in bits[axis]
        ]
        places = x.layout.places
        # What a thread holds itself.
        layout, which = x.layout.restricted(kept)
        groups: list[list[Any]] = [[] for _ in range(layout.registers)]
        for register, value in enumerate(x.regs):
            groups[which[register]].append(value)
        regs = [_tree(combine, group) for group in groups]
        # What its warp does.
        for bit in sorted(gone):
            if 0 <= places[bit] < _LANE_BITS:
                distance = 1 << places[bit]
                regs = [combine(value, self._exchanged(value, distance)) for value in regs]
        # What the others do.
        warps = sorted(places[bit] for bit in gone if places[bit] >= _LANE_BITS)
        if warps:
            regs = self._among_warps(regs, layout, warps, combine)
        return Registers(shape, layout, regs)

    def _among_warps(
        self, regs: list[Any], layout: Layout, warps: list[int], combine: Callable[[Any, Any], Any]
    ) -> list[Any]:
        whole = Layout((*layout.places, *warps), layout.register_bits)
        kind, first = regs[0].type, 1 << len(layout.places)
        self._put(regs, whole)
        out = []
        for k in range(layout.registers):
            element = self.element(layout, k)
            values = []
            for number in range(1 << len(warps)):
                place = arith.addi(element, constant(i32(), number * first))
                values.append(_from_word(self._get(place), kind))
            out.append(_tree(combine, values))
        self._in_use = True
        return out

    # Blocks of code

    def within(self, block: Any, body: Callable[[], None], *, again: bool = False) -> None:
        """Writes the code of a block.

        Args:
            block: MLIR's.
            body: writes it.
            again: whether it may run once more behind itself.
        """
        before = self._in_use
        self._last_block += 1
        self.blocks.append(self._last_block)
        self._in_use = before or again
        with ir.InsertionPoint(block):
            body()
        self.blocks.pop()
        self._in_use = before or self._in_use


def _to_word(value: Any) -> Any:
    """A number as a word of 32 bits."""
    kind = value.type
    if is_float(kind):
        value = arith.bitcast(integer(width(kind)), value)
    return value if width(kind) == 32 else arith.extui(i32(), value)


def _from_word(word: Any, kind: Any) -> Any:
    if width(kind) < 32:
        word = arith.trunci(integer(width(kind)), word)
    return arith.bitcast(kind, word) if is_float(kind) else word
