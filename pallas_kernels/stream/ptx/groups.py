"""A tile of integer weights whose groups are fine, times activations of several sequences.

A product of tensor cores adds up what the four threads of a column hold. Where these have inputs of
different groups, whose scales differ, the sums must be kept apart. So threads read a fourth of a
group at once instead of 16 bytes, and a product is of one group. Rows begin in the same bank: the
threads of each row read its groups in an order of their own, and put the words in order afterwards.
Of one sequence, see `chunk_groups`.

Sums are many, and small: a product that begins with 1.5 * 2^23 as a float's bits leaves a float
that shows the sum, and a subtraction makes it the sum itself. That is faster than a conversion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pallas_kernels.asm import Block, Register
from pallas_kernels.stream.ptx.scales import Given, IntegerText

if TYPE_CHECKING:
    from pallas_kernels.stream.ptx.integers import IntegerTile

__all__ = ["write_sequences"]

# 1.5 * 2^23 as bits, and its negative; and what a high digit counts for.
_MAGIC, _LESS, _HIGH = 0x4B400000, -12582912.0, 256.0
_BLOCK = 16


def write_sequences(b: Block, tile: IntegerTile, given: Given) -> None:
    """The whole text."""
    _Sequences(b, tile, given).write()


class _Sequences(IntegerText):
    """The text: columns are sequences, and every read of the four threads of a row is a group."""

    def __init__(self, b: Block, tile: IntegerTile, given: Given):
        super().__init__(b, tile, given)
        self.words = tile.words  # of bytes, of a read
        # A thread has sums of two rows of a product.
        self.names = ["x", "y"] if tile.rows > 8 else ["x"]
        self.mine = b.pred("mine")
        self.guard = None if tile.rows % 8 == 0 else self.mine
        self.around = 32 // tile.read_bytes  # reads of 128 bytes of a row
        # Where in these bytes the thread's i-th read lies, and which bits its row's number has.
        self.places = [b.u32("place") for _ in range(min(self.around, tile.reads))]
        self.bits = {bit: b.pred(f"bit_{bit}") for bit in (1, 2, 4)}
        self.magic, self.low_number = b.u32("magic"), b.f32("low_number")

    def write(self) -> None:
        """The whole text."""
        b, t, given = self.b, self.t, self.given
        values = [b.f32("value") for _ in range(max(2, t.rows // 4))]
        self.begin(values, (self.magic, _MAGIC))
        b.comment("Threads of rows that there are not hold zeros.")
        b.setp("lt", self.mine, self.group, t.rows)
        b.mad_lo(self.row, self.group, given.pitch, given.address)
        b.mad_lo(self.scale_place, self.group, t.scale_bytes, given.scales)
        b.mad_lo(self.scale_place, given.group, t.group_bytes, self.scale_place)
        for bit, is_set in self.bits.items():
            b.and_(self.v, self.group, bit)
            b.setp("ne", is_set, self.v, 0)
        for first in range(0, t.rows, _BLOCK):
            self._write_block(values[first // 4 :])
            if first + _BLOCK < t.rows:
                b.shl(self.other_row, given.pitch, 4)
                b.add(self.row, self.row, self.other_row)
                b.add(self.scale_place, self.scale_place, _BLOCK * t.scale_bytes)
        b.shl(self.lane, self.quad, 3)
        for n in range(2):
            self.load_own_scale(self.lane)
            b.add(self.lane, self.lane, 4)
            for value in values[n::2]:
                b.mul_rn(value, value, self.own)
        for i in range(len(values) // 2):
            with b.when(self.guard):
                b.st_shared(given.where + 256 * i, values[2 * i : 2 * i + 2])
        b.mark(self.idle)

    def _load(self, words: list[Register], offset: int) -> None:
        """Loads neighbouring words of a row, from `v` on; zeros where there is no such row."""
        if self.guard is not None:
            for word in words:
                self.b.mov(word, 0)
        with self.b.when(self.guard):
            self.b.ld_shared(words, self.v + offset)

    def _widen(self, to: list[Register], raw: list[Register]) -> None:
        """Of int4 weights n, words of bytes 16 * (n - 8); of int8 ones themselves."""
        if self.t.bits == 8:
            for one, word in zip(to, raw, strict=True):
                self.b.mov(one, word)
        else:
            self.widen_nibbles(to, raw)

    def _add(self, value: Register, high: Register, low: Register, total: Register) -> None:
        """Adds a group's products to a value: the sums of both digits are floats in disguise."""
        b = self.b
        b.add_rn(self.number, high.as_("f32"), _LESS)
        b.add_rn(self.low_number, low.as_("f32"), _LESS)
        b.fma(self.number, self.number, _HIGH, self.low_number)
        self.add_scaled(value, total)

    def _write_block(self, values: list[Register]) -> None:
        """The sums of one product's rows, from `row` on, with scales from `scale_place` on."""
        b, t, first = self.b, self.t, 0
        if len(self.names) == 2:
            b.shl(self.other_row, self.given.pitch, 3)
            b.add(self.other_row, self.row, self.other_row)
        while first < t.reads:
            count = min(self.around, 1 << ((t.reads - first).bit_length() - 1))
            self._write_some(first, count, values)
            first += count

    def _write_some(self, first: int, count: int, values: list[Register]) -> None:
        """Some neighbouring reads, a power of two: no more than 128 bytes of a row."""
        b, t = self.b, self.t
        b.comment("The threads of each row read its groups in an order of their own.")
        for i in range(count):
            # Times the bytes of a group, within those of all these.
            b.add(self.v, self.group, i)
            b.and_(self.v, self.v, count - 1)
            b.shl(self.places[i], self.v, (4 * t.read_bytes).bit_length() - 1)
        raw = {
            name: self._load_in_order(name, row, first, count)
            for name, row in zip(self.names, (self.row, self.other_row), strict=False)
        }
        words = {name: [b.u32(f"{name}_bytes") for _ in range(self.words)] for name in self.names}
        sums = [[b.u32(f"{digit}_sum") for _ in range(4)] for digit in ("high", "low")]
        totals = b.f32s("total", "total")
        held = {
            name: [b.u32(f"{name}_scale") for _ in range(t.scales_at_once // 4 or 1)]
            for name in self.names
        }
        at_once = max(4, t.scales_at_once) // t.group_bytes
        for i in range(count):
            q = first + i
            for name in self.names:
                self._widen(words[name], raw[name][i])
            for number, some in enumerate(sums):
                for word in range(0, self.words, 2):
                    self._multiply(some, word, words, (2 * q + number) * self.words + word)
            if self.given.offsets is not None:
                b.ld_shared(totals, self.given.offsets + 32 * q)
            for half, name in enumerate(self.names):
                self._load_scale(half, held[name], q, begins=i == 0 or q % at_once == 0)
                for column in range(2):
                    value = values[2 * half + column]
                    high, low = (some[2 * half + column] for some in sums)
                    self._add(value, high, low, totals[column])

    def _load_in_order(
        self, name: str, row: Register, first: int, count: int
    ) -> list[list[Register]]:
        """Loads the reads of a row, and puts them in order: by each bit of the row's number."""
        b, t, each = self.b, self.t, self.t.read_bytes // 4
        held = [[b.u32(f"{name}_raw") for _ in range(each)] for _ in range(count)]
        for place, some in zip(self.places, held, strict=False):
            b.add(self.v, row, place)
            self._load(some, 4 * t.read_bytes * first)
        for bit in (1, 2, 4):
            if bit < count:
                moved = [[b.u32(f"{name}_raw") for _ in range(each)] for _ in range(count)]
                for i in range(count):
                    for w in range(each):
                        b.selp(moved[i][w], held[(i - bit) % count][w], held[i][w], self.bits[bit])
                held = moved
        return held

    def _multiply(
        self, sums: list[Register], word: int, words: dict[str, list[Register]], start: int
    ) -> None:
        """Of the words of both rows from a number on, added to sums; the first one begins them."""
        a = [words[n][word + i] if n in words else self.zero for i in range(2) for n in "xy"]
        before = [self.magic] * 4 if word == 0 else sums
        self.b.mma_s8(sums, a, self.given.words[start : start + 2], before)

    def _load_scale(self, half: int, held: list[Register], q: int, *, begins: bool) -> None:
        """The scale of a row's q-th group, of those that `held` has, or gets where it begins."""
        b, t = self.b, self.t
        row = 8 * half * t.scale_bytes
        if t.scales_at_once < 4:
            b.ld_shared_u16(held[0], self.scale_place + (2 * q + row))
            self.split_scale(held[0])
            return
        at_once = t.scales_at_once // t.group_bytes
        if begins:
            group = q - q % at_once
            b.ld_shared(held, self.scale_place + (group * t.group_bytes + row))
        byte = q % at_once * t.group_bytes
        self.split_scale(held[byte // 4], high=byte % 4 != 0)
