"""A tile of integer weights whose groups are fine, times activations of one sequence.

A product takes 16 rows. Here these are 4 rows of the tile, 4 chunks of each; columns are both
digits of 4 chunks; and all of it is of one group of each row and chunk, a fourth of whose inputs
is with each of the four threads of a row. So a thread's sums are of use where its row's chunk is
that of its columns, which one thread in four has.

Four such products, of other rows or other groups, have their chunks in other orders: in the i-th,
row g of the product is chunk g ^ i. So every thread has sums of use in one of them. It chooses
these, and scales no others: 12 selections are fewer instructions than to scale three products more.
No product waits for another.

Where a tile has fewer rows than four products, they are of different groups, and the sums of a row
are added up across threads in the end.

Weights of int4 come by `ldmatrix`, which deals out 16 bytes to four threads; those of int8, 32
bytes of a group, by loads of 8 bytes. A matrix has 16 bytes of each of 4 chunks of two rows. Rows
begin in the same bank, so a gap of 16 bytes lies between the two halves of a tile's rows, and the
two rows of a matrix are of different halves. What int8 loads at once is of one row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pallas_kernels.asm import Block, Register
from pallas_kernels.stream.ptx.scales import Given, IntegerText

if TYPE_CHECKING:
    from pallas_kernels.stream.ptx.integers import IntegerTile

__all__ = ["write_chunks"]

# Products whose sums a thread chooses among, at most.
_ABREAST = 4
# Words of weights that a thread may have loaded before any of them is multiplied. More take
# registers that others need, and where there are none left, something is kept in memory.
_AT_ONCE = 32
# Bytes of what a warp reads of a row at once, and those of it between groups of the same chunk.
_LINE, _HALF = 256, 128


def write_chunks(b: Block, tile: IntegerTile, given: Given) -> None:
    """The whole text."""
    _Chunks(b, tile, given).write()


class _Chunks(IntegerText):
    """The text, piece by piece."""

    def __init__(self, b: Block, tile: IntegerTile, given: Given):
        super().__init__(b, tile, given)
        # Of a line, each chunk has as many groups, each of so many products one after the other.
        self.groups = 4 if tile.bits == 4 and tile.group == 32 else 2
        self.pieces = tile.group * tile.bits // 128 if tile.bits == 4 else 1
        # Products abreast: of so many times 4 rows, and so many groups.
        self.fours = max(1, tile.rows // 4)
        self.of_groups = min(self.groups, _ABREAST // self.fours)
        self.abreast = self.fours * self.of_groups
        self.steps = self.groups // self.of_groups
        # Of a row of a product, by a thread.
        self.words = self.pieces if tile.bits == 4 else 2
        # A product's rows from 4 on are of the tile's second half; rows g and g + 8 are neighbours.
        self.half_rows = tile.rows // 2
        self.rows = "xy" if tile.rows > 2 else "x"
        self.values = [b.f32("value") for _ in self.rows]
        # Which of the products abreast the thread's sums are of use in, and its two bits.
        self.which, self.one, self.two = b.u32("which"), b.pred("one"), b.pred("two")
        self.sums_place = b.u32("sums_place")
        # Of int8, where rows x and y of each product begin.
        self.places = {row: [b.u32(f"{row}_place") for _ in range(self.abreast)] for row in "xy"}
        # Of each row, and step: the word that holds its scales.
        self.scale_words: dict[tuple[str, int], Register] = {}

    def write(self) -> None:
        """The whole text."""
        b, t = self.b, self.t
        self.begin(self.values)
        self._place_weights()
        b.comment("The product of use is the one whose number is g ^ t.")
        b.xor(self.which, self.group, self.quad)
        b.and_(self.which, self.which, 3)
        for bit, is_set in ((1, self.one), (2, self.two)):
            b.and_(self.v, self.which, bit)
            b.setp("ne", is_set, self.v, 0)
        self._place_scales()
        a_line = len(self.rows) * self.abreast * self.words * self.steps
        at_once = max(1, _AT_ONCE // a_line)
        for q in range(t.reads):
            if q and q % at_once == 0:
                b.bar_warp()
            self._write_line(q)
        self._end()
        b.mark(self.idle)

    # Weights

    def _place_of(self, group: int) -> int:
        """Bytes from a chunk's first group in a line to another."""
        if self.groups == 4:
            return 16 * (group & 1) + _HALF * (group >> 1)
        return _HALF * group

    def _place_weights(self) -> None:
        """Where each thread reads: of int4, two rows; of int8, rows of its own for each product."""
        b, given = self.b, self.given
        if self.t.bits == 4:
            self._place_matrices()
            return
        b.comment("Row g of the i-th product is of chunk g ^ i.")
        b.shr(self.v, self.group, 2)
        b.mul_lo(self.v, self.v, self.half_rows)
        b.mad_lo(self.row, self.v, given.pitch, given.address)
        b.shl(self.v, self.quad, 3)
        b.add(self.row, self.row, self.v)
        b.and_(self.v, self.group, 3)
        b.shl(self.v, self.v, 5)
        b.shl(self.other_row, given.pitch, 1)
        for i, (x, y) in enumerate(zip(*self.places.values(), strict=True)):
            four, group = i % self.fours, i // self.fours
            b.xor(self.w, self.v, 32 * i)
            b.add(x, self.row, self.w)
            if four:
                b.mad_lo(x, self.other_row, four, x)
            if group:
                b.add(x, x, self._place_of(group * self.steps))
            if "y" in self.rows:
                b.add(y, x, given.pitch)

    def _place_matrices(self) -> None:
        """Of `ldmatrix`: threads 8 * i to 8 * i + 7 have the addresses of the i-th product's rows.

        Where there are two products, the next two matrices are those of a group's second piece.
        """
        b, given, i, row = self.b, self.given, self.which, self.row
        fours = self.fours.bit_length() - 1
        b.comment("Lane 8 i + j says where row j of the i-th product lies.")
        b.shr(i, self.lane, 3)
        b.and_(self.v, self.lane, 7)
        b.shr(self.other_row, self.v, 2)
        b.mul_lo(self.w, self.other_row, self.half_rows)
        if self.fours > 1:
            b.and_(row, i, self.fours - 1)
            b.mad_lo(self.w, row, 2, self.w)
        b.mad_lo(row, self.w, given.pitch, given.address)
        if self.t.gap:
            b.mad_lo(row, self.other_row, self.t.gap, row)
        b.comment("Of two products the chunk has the lowest bit of i alone.")
        b.and_(self.w, i, self.abreast - 1)
        b.xor(self.v, self.v, self.w)
        b.and_(self.v, self.v, 3)
        b.shl(self.v, self.v, 5)
        b.add(row, row, self.v)
        if self.abreast < _ABREAST:
            b.shr(self.v, i, 1)
            b.shl(self.v, self.v, 4)
            b.add(row, row, self.v)
            b.and_(i, i, self.abreast - 1)
        if self.of_groups > 1:
            b.shr(self.v, i, fours)
            if self.of_groups == 4:  # as `_place_of`
                b.and_(self.w, self.v, 1)
                b.shl(self.w, self.w, 4)
                b.add(row, row, self.w)
                b.shr(self.v, self.v, 1)
            b.shl(self.v, self.v, _HALF.bit_length() - 1)
            b.add(row, row, self.v)
        if "y" in self.rows:
            b.add(self.other_row, row, given.pitch)

    def _load(self, row: str, q: int, step: int) -> list[list[Register]]:
        """Loads words of row x or y of every product."""
        b, words = self.b, self.words
        made = [[b.u32(row) for _ in range(words)] for _ in range(self.abreast)]
        at = _LINE * q + self._place_of(step)
        if self.t.bits == 8:
            for place, some in zip(self.places[row], made, strict=True):
                b.ld_shared(some, place + at)
            return made
        start = self.row if row == "x" else self.other_row
        for first in range(0, words, _ABREAST // self.abreast):
            some = [x[w] for w in range(words) for x in made]
            b.ldmatrix(some[first * self.abreast :][:_ABREAST], start + (at + 16 * first))
        return made

    # Scales

    def _place_scales(self) -> None:
        """Where the scales of a thread's first row begin; and its groups' sums."""
        b, t, given, fours = self.b, self.t, self.given, self.fours.bit_length() - 1
        b.shr(self.scale_place, self.group, 2)
        b.mul_lo(self.w, self.scale_place, self.half_rows)
        if self.fours > 1:
            b.and_(self.v, self.which, self.fours - 1)
            b.mad_lo(self.w, self.v, 2, self.w)
        base = given.scales
        if t.scale_gap:
            b.comment("Halves of 16 rows' scales have a gap between them, too.")
            b.mad_lo(self.v, self.scale_place, t.scale_gap, given.scales)
            base = self.v
        b.mad_lo(self.scale_place, self.w, t.scale_bytes, base)
        b.add(self.v, given.group, self.quad)
        if self.groups == 4:
            b.add(self.v, self.v, self.quad)
        if given.offsets is not None:
            b.mov(self.sums_place, given.offsets)
        if self.of_groups > 1:
            b.comment("A thread without sums of use reads what another does.")
            b.shr(self.w, self.which, fours)
            b.and_(self.w, self.w, self.of_groups - 1)
            if given.offsets is not None:
                b.mad_lo(self.sums_place, self.w, 4 * self.steps, self.sums_place)
            if self.of_groups == 4:
                b.add(self.v, self.v, self.w)
                b.and_(self.w, self.w, 2)
                b.mad_lo(self.v, self.w, 3, self.v)
            else:
                b.mad_lo(self.v, self.w, 8 if self.groups == 4 else 4, self.v)
        b.mad_lo(self.scale_place, self.v, t.group_bytes, self.scale_place)

    @property
    def _pairs(self) -> bool:
        """Whether two steps have neighbouring groups, whose scales may be loaded at once."""
        t = self.t
        return self.groups == 4 and self.steps > 1 and t.scales_at_once >= 2 * t.group_bytes

    def _load_scales(self, q: int, step: int) -> None:
        """Loads the scales of a step, or of two."""
        b, t = self.b, self.t
        if self._pairs and step % 2:
            return
        group = self._place_of(step) * 8 // (t.bits * t.group)
        at = t.group_bytes * (q * _LINE * 8 // (t.bits * t.group) + group)
        for half, row in enumerate(self.rows):
            place, word = self.scale_place + (at + half * t.scale_bytes), b.u32(f"{row}_scale")
            self.scale_words[row, step] = word
            if not self._pairs:
                (b.ld_shared_u16 if t.group_bytes == 2 else b.ld_shared)(word, place)
            elif t.group_bytes == 2:
                b.ld_shared(word, place)
            else:
                self.scale_words[row, step + 1] = b.u32(f"{row}_scale")
                b.ld_shared([word, self.scale_words[row, step + 1]], place)

    def _split_scale_of(self, row: str, step: int) -> None:
        if self._pairs and self.t.group_bytes == 2:
            self.split_scale(self.scale_words[row, step & ~1], high=step % 2 == 1)
        else:
            self.split_scale(self.scale_words[row, step])

    # Products

    def _write_line(self, q: int) -> None:
        """The q-th line of every row."""
        totals = [self.b.f32("total") for _ in range(self.steps)]
        if self.t.offset is not None:
            self.b.ld_shared(totals, self.sums_place + 4 * 16 * q)
        for step in range(self.steps):
            self._load_scales(q, step)
            self._write_step(q, step, totals[step])

    def _write_step(self, q: int, step: int, total: Register) -> None:
        """Products abreast; of the sums that are of use, a thread adds its own to its values."""
        words = {row: self._load(row, q, step) for row in self.rows}
        sums = [[self.b.s32("sum") for _ in range(4)] for _ in range(self.abreast)]
        for i in range(self.abreast):
            group = i // self.fours * self.steps + step
            for piece in range(self.pieces):
                self._multiply(q, group, {row: words[row][i] for row in words}, piece, sums[i])
            # What is known to be of no use takes no registers.
            if i % 2:
                self._choose(sums[i - 1], sums[i], self.one)
            if i == 3:
                self._choose(sums[0], sums[2], self.two)
        for half, (row, value) in enumerate(zip(self.rows, self.values, strict=True)):
            self._split_scale_of(row, step)
            high, low = sums[0][2 * half : 2 * half + 2]
            self.combine(self.number, high, low)
            self.add_scaled(value, total)

    def _choose(self, sums: list[Register], others: list[Register], which: Register) -> None:
        """Where the predicate holds, puts others in the place of some sums."""
        for to, other in list(zip(sums, others, strict=True))[: 2 * len(self.rows)]:
            self.b.selp(to, other, to, which)

    def _multiply(
        self,
        q: int,
        group: int,
        loaded: dict[str, list[Register]],
        piece: int,
        sums: list[Register],
    ) -> None:
        """One product: of a chunk's group in the q-th line."""
        b, t = self.b, self.t
        words = loaded
        if t.bits == 4:
            words = {row: b.u32s(*[f"{row}_bytes"] * 2) for row in self.rows}
            for row in self.rows:
                self.widen_nibbles(words[row], [loaded[row][piece]])
        a = [words[row][k] if row in words else self.zero for k in range(2) for row in "xy"]
        first = q * t.words + 2 * (group * self.pieces + piece)
        before = [self.zero] * 4 if piece == 0 else sums
        b.mma_s8(sums, a, self.given.words[first : first + 2], before)

    def _end(self) -> None:
        """Adds up what threads have of the same rows and chunk; scales and stores the sums.

        All threads store: those with sums of no use where nobody looks.
        """
        b = self.b
        for bit in (0, 1):
            if self.fours <= 1 << bit < self.abreast:
                for value in self.values:
                    b.shfl_bfly(self.number, value, 4 << bit)
                    b.add_rn(value, value, self.number)
        b.comment("A chunk's scale is with the threads that hold its inputs.")
        b.shl(self.lane, self.quad, 3)
        self.load_own_scale(self.lane)
        for value in self.values:
            b.mul_rn(value, value, self.own)
        b.st_shared(self.given.where, self.values)
