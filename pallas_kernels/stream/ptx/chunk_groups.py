"""A tile of integer weights whose groups are fine, times an operand of digits: of one sequence.

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

from pallas_kernels.stream.ptx import lowered
from pallas_kernels.stream.ptx.scales import SIXTEENTH, scale_lines, scale_registers, widened

if TYPE_CHECKING:
    from pallas_kernels.stream.ptx.integers import IntegerTile

__all__ = ["chunk_text"]

# Products whose sums a thread chooses among, at most.
_ABREAST = 4
# Words of weights that a thread may have loaded before any of them is multiplied. More take
# registers that others need, and where there are none left, something is kept in memory.
_AT_ONCE = 32
# Bytes of what a warp reads of a row at once, and those of it between groups of the same chunk.
_LINE, _HALF = 256, 128


def chunk_text(tile: IntegerTile) -> str:
    """The whole text: operands as those of `integers`; behind them where sums of groups begin."""
    return _Chunks(tile).text()


def _names(prefix: str, count: int) -> list[str]:
    return [f"%{prefix}{i}" for i in range(count)]


class _Chunks:
    """The text, piece by piece."""

    def __init__(self, tile: IntegerTile):
        self.t = tile
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
        self.half = tile.rows // 2
        self.rows = "xy" if tile.rows > 2 else "x"

    def text(self) -> str:
        t, values = self.t, _names("v", len(self.rows))
        self.values = values
        lines = [
            "{ .reg .pred %p, %one, %two; .reg .b32 %l, %g, %t, %i, %a, %b, %c, %v, %w, %zero;",
            f".reg .f32 %f, %s, %own, {', '.join(values)}; {scale_registers(t)}",
            "mov.u32 $0, 0; mov.b32 %zero, 0;",
            f"mov.u32 %t, %tid.x; setp.ge.u32 %p, %t, {t.threads}; @%p bra idle;",
            "mov.u32 %l, %laneid; shr.u32 %g, %l, 2; and.b32 %t, %l, 3;",
            *(f"mov.f32 {value}, 0f00000000;" for value in values),
            *self.addresses(),
            # The product of use is the i-th.
            "xor.b32 %i, %g, %t; and.b32 %i, %i, 3;",
            "and.b32 %v, %i, 1; setp.ne.u32 %one, %v, 0;",
            "and.b32 %v, %i, 2; setp.ne.u32 %two, %v, 0;",
            *self.scale_addresses(),
        ]
        a_line = len(self.rows) * self.abreast * self.words * self.steps
        at_once = max(1, _AT_ONCE // a_line)
        for q in range(t.reads):
            if q and q % at_once == 0:
                lines.append(lowered.REJOIN)
            lines += self.line(q)
        lines += self.ending()
        return " ".join([*lines, "idle: }"])

    # Weights

    def place_of(self, group: int) -> int:
        """Bytes from a chunk's first group in a line to another."""
        if self.groups == 4:
            return 16 * (group & 1) + _HALF * (group >> 1)
        return _HALF * group

    def addresses(self) -> list[str]:
        """Makes where each thread reads: int4, %a and %b; int8, one of each for every product."""
        if self.t.bits == 4:
            return self._matrix_addresses()
        # Row g of the i-th product is of chunk g ^ i.
        lines = [
            f".reg .b32 {', '.join(f'%{n}a{i}' for n in self.rows for i in range(self.abreast))};",
            f"shr.u32 %v, %g, 2; mul.lo.u32 %v, %v, {self.half}; mad.lo.u32 %a, %v, $2, $1;",
            "shl.b32 %v, %t, 3; add.u32 %a, %a, %v; and.b32 %v, %g, 3; shl.b32 %v, %v, 5;",
            "shl.b32 %b, $2, 1;",
        ]
        for i in range(self.abreast):
            four, group = i % self.fours, i // self.fours
            lines.append(f"xor.b32 %w, %v, {32 * i}; add.u32 %xa{i}, %a, %w;")
            if four:
                lines.append(f"mad.lo.u32 %xa{i}, %b, {four}, %xa{i};")
            if group:
                lines.append(f"add.u32 %xa{i}, %xa{i}, {self.place_of(group * self.steps)};")
            if "y" in self.rows:
                lines.append(f"add.u32 %ya{i}, %xa{i}, $2;")
        return lines

    def _matrix_addresses(self) -> list[str]:
        """Of `ldmatrix`: threads 8 * i to 8 * i + 7 have the addresses of the i-th product's rows.

        Where there are two products, the next two matrices are those of a group's second piece.
        """
        fours = self.fours.bit_length() - 1
        lines = [
            "shr.u32 %i, %l, 3; and.b32 %v, %l, 7; shr.u32 %b, %v, 2;",
            f"mul.lo.u32 %w, %b, {self.half};",
        ]
        if self.fours > 1:
            lines.append(f"and.b32 %a, %i, {self.fours - 1}; mad.lo.u32 %w, %a, 2, %w;")
        lines.append("mad.lo.u32 %a, %w, $2, $1;")
        if self.t.gap:
            lines.append(f"mad.lo.u32 %a, %b, {self.t.gap}, %a;")
        # Of two products the chunk has the lowest bit of i alone.
        chunk = f"and.b32 %w, %i, {self.abreast - 1}; xor.b32 %v, %v, %w;"
        lines.append(f"{chunk} and.b32 %v, %v, 3; shl.b32 %v, %v, 5; add.u32 %a, %a, %v;")
        if self.abreast < _ABREAST:
            lines.append("shr.u32 %v, %i, 1; shl.b32 %v, %v, 4; add.u32 %a, %a, %v;")
            lines.append(f"and.b32 %i, %i, {self.abreast - 1};")
        if self.of_groups > 1:
            lines.append(f"shr.u32 %v, %i, {fours};")
            if self.of_groups == 4:  # as `place_of`
                lines.append("and.b32 %w, %v, 1; shl.b32 %w, %w, 4; add.u32 %a, %a, %w;")
                lines.append("shr.u32 %v, %v, 1;")
            lines.append(f"shl.b32 %v, %v, {_HALF.bit_length() - 1}; add.u32 %a, %a, %v;")
        if "y" in self.rows:
            lines.append("add.u32 %b, %a, $2;")
        return lines

    def loaded(self, name: str, q: int, step: int) -> list[str]:
        """Loads words of row x or y of every product: %{name}{product}_{word}."""
        t, words = self.t, self.words
        made = [[f"%{name}{i}_{w}" for w in range(words)] for i in range(self.abreast)]
        at = _LINE * q + self.place_of(step)
        lines = [f".reg .b32 {', '.join(x for some in made for x in some)};"]
        if t.bits == 8:
            return lines + [
                f"ld.shared.v2.b32 {{{', '.join(some)}}}, [%{name}a{i}+{at}];"
                for i, some in enumerate(made)
            ]
        start = "%a" if name == "x" else "%b"
        for first in range(0, words, _ABREAST // self.abreast):
            some = [x[w] for w in range(words) for x in made]
            some = some[first * self.abreast :][:_ABREAST]
            lines.append(
                "ldmatrix.sync.aligned.m8n8.x4.shared.b16 "
                f"{{{', '.join(some)}}}, [{start}+{at + 16 * first}];"
            )
        return lines

    # Scales

    def scale_addresses(self) -> list[str]:
        """Makes %c, where the scales of a thread's first row begin; and %z, its groups' sums."""
        t, fours = self.t, self.fours.bit_length() - 1
        lines = [f"shr.u32 %c, %g, 2; mul.lo.u32 %w, %c, {self.half};"]
        if self.fours > 1:
            lines.append(f"and.b32 %v, %i, {self.fours - 1}; mad.lo.u32 %w, %v, 2, %w;")
        # Halves of 16 rows' scales have a gap between them, too.
        base = "$4"
        if t.scale_gap:
            lines.append(f"mad.lo.u32 %v, %c, {t.scale_gap}, $4;")
            base = "%v"
        lines.append(f"mad.lo.u32 %c, %w, {t.scale_bytes}, {base}; add.u32 %v, $6, %t;")
        if self.groups == 4:
            lines.append("add.u32 %v, %v, %t;")
        if t.offset is not None:
            lines.append(f".reg .b32 %z; mov.b32 %z, ${7 + t.reads * t.words};")
        if self.of_groups > 1:
            # A thread without sums of use reads what another does.
            lines.append(f"shr.u32 %w, %i, {fours}; and.b32 %w, %w, {self.of_groups - 1};")
            if t.offset is not None:
                lines.append(f"mad.lo.u32 %z, %w, {4 * self.steps}, %z;")
            if self.of_groups == 4:
                lines.append("add.u32 %v, %v, %w; and.b32 %w, %w, 2; mad.lo.u32 %v, %w, 3, %v;")
            else:
                each = 8 if self.groups == 4 else 4
                lines.append(f"mad.lo.u32 %v, %w, {each}, %v;")
        return [*lines, f"mad.lo.u32 %c, %v, {t.group_bytes}, %c;"]

    @property
    def pairs(self) -> bool:
        """Whether two steps have neighbouring groups, whose scales may be loaded at once."""
        t = self.t
        return self.groups == 4 and self.steps > 1 and t.scales_at_once >= 2 * t.group_bytes

    def load_scales(self, q: int, step: int) -> list[str]:
        """Loads the scales of a step, or of two: %{row}s{step}, or %{row}s{step} of both."""
        t, lines = self.t, []
        if self.pairs and step % 2:
            return []
        group = self.place_of(step) * 8 // (t.bits * t.group)
        at = t.group_bytes * (q * _LINE * 8 // (t.bits * t.group) + group)
        for half, row in enumerate(self.rows):
            place = f"[%c+{at + half * t.scale_bytes}]"
            if not self.pairs:
                kind = "u16" if t.group_bytes == 2 else "b32"
                lines.append(f".reg .b32 %{row}s{step}; ld.shared.{kind} %{row}s{step}, {place};")
            elif t.group_bytes == 2:
                lines.append(f".reg .b32 %{row}s{step}; ld.shared.b32 %{row}s{step}, {place};")
            else:
                both = f"%{row}s{step}, %{row}s{step + 1}"
                lines.append(f".reg .b32 {both}; ld.shared.v2.b32 {{{both}}}, {place};")
        return lines

    def scale_of(self, row: str, step: int) -> list[str]:
        if self.pairs and self.t.group_bytes == 2:
            return scale_lines(self.t, f"%{row}s{step & ~1}", high=step % 2 == 1)
        return scale_lines(self.t, f"%{row}s{step}")

    # Products

    def line(self, q: int) -> list[str]:
        """The q-th line of every row."""
        t, lines = self.t, ["{"]
        if t.offset is not None:
            sums = _names("q", self.steps)
            vector = f".v{self.steps}" if self.steps > 1 else ""
            some = f"{{{', '.join(sums)}}}" if self.steps > 1 else sums[0]
            lines.append(f".reg .f32 {', '.join(sums)};")
            lines.append(f"ld.shared{vector}.f32 {some}, [%z+{4 * 16 * q}];")
        for step in range(self.steps):
            lines += self.load_scales(q, step)
            lines += ["{", *self.step(q, step), "}"]
        return [*lines, "}"]

    def step(self, q: int, step: int) -> list[str]:
        """Products abreast; of the sums that are of use, a thread adds its own to its values."""
        lines = []
        for row in self.rows:
            lines += self.loaded(row, q, step)
        sums = [[f"%d{i}_{k}" for k in range(4)] for i in range(self.abreast)]
        lines.append(f".reg .b32 {', '.join(x for some in sums for x in some)};")
        for i in range(self.abreast):
            group = i // self.fours * self.steps + step
            for piece in range(self.pieces):
                lines += ["{", self.product(q, group, i, piece, sums[i]), "}"]
            # What is known to be of no use takes no registers.
            if i % 2:
                lines += self.chosen(sums[i - 1], sums[i], "%one")
            if i == 3:
                lines += self.chosen(sums[0], sums[2], "%two")
        for half, (row, value) in enumerate(zip(self.rows, self.values, strict=True)):
            lines += self.scale_of(row, step)
            high, low = sums[0][2 * half : 2 * half + 2]
            lines += self.added(value, high, low, f"%q{step}")
        return lines

    def chosen(self, sums: list[str], others: list[str], which: str) -> list[str]:
        """Where the predicate holds, puts others in the place of some sums."""
        used = 2 * len(self.rows)
        pairs = list(zip(sums, others, strict=True))[:used]
        return [f"selp.b32 {to}, {other}, {to}, {which};" for to, other in pairs]

    def product(self, q: int, group: int, i: int, piece: int, sums: list[str]) -> str:
        """One product: of a chunk's group in the q-th line."""
        t = self.t
        if t.bits == 4:
            words = {row: [f"%{row}w{k}" for k in range(2)] for row in self.rows}
            lines = [f".reg .b32 {', '.join(x for some in words.values() for x in some)};"]
            for row in self.rows:
                lines += widened(words[row], [f"%{row}{i}_{piece}"])
        else:
            words = {row: [f"%{row}{i}_{k}" for k in range(2)] for row in self.rows}
            lines = []
        a = [words[row][k] if row in words else "%zero" for k in range(2) for row in "xy"]
        first = 7 + q * t.words + 2 * (group * self.pieces + piece)
        before = ["%zero"] * 4 if piece == 0 else sums
        lines.append(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
            f"{{{', '.join(sums)}}}, {{{', '.join(a)}}}, {{${first}, ${first + 1}}}, "
            f"{{{', '.join(before)}}};"
        )
        return " ".join(lines)

    def added(self, value: str, high: str, low: str, total: str) -> list[str]:
        """Adds a group's sum to a value: %s times the digits, and %o times their total."""
        t = self.t
        lines = [f"mad.lo.s32 %v, {high}, 256, {low}; cvt.rn.f32.s32 %f, %v;"]
        # Beyond a row, sums are 0, and in the place of scales may lie anything.
        guard = "setp.ne.f32 %p, {}, 0f00000000; @%p " if t.ragged else ""
        lines.append(f"{guard.format('%f')}fma.rn.f32 {value}, %f, %s, {value};")
        if t.offset is not None:
            lines.append(f"{guard.format(total)}fma.rn.f32 {value}, {total}, %o, {value};")
        return lines

    def ending(self) -> list[str]:
        """Adds up what threads have of the same rows and chunk; scales and stores the sums.

        All threads store: those with sums of no use where nobody looks.
        """
        lines = []
        for bit in (0, 1):
            if self.fours <= 1 << bit < self.abreast:
                for value in self.values:
                    lines.append(f"shfl.sync.bfly.b32 %f, {value}, {4 << bit}, 31, 0xffffffff;")
                    lines.append(f"add.rn.f32 {value}, {value}, %f;")
        # A chunk's scale is with the threads that hold its inputs.
        lines.append("shl.b32 %l, %t, 3; shfl.sync.idx.b32 %own, $5, %l, 31, 0xffffffff;")
        if self.t.bits == 4:
            lines.append(f"mul.rn.f32 %own, %own, {SIXTEENTH};")
        lines += [f"mul.rn.f32 {value}, {value}, %own;" for value in self.values]
        vector = ".v2" if "y" in self.rows else ""
        some = f"{{{', '.join(self.values)}}}" if "y" in self.rows else self.values[0]
        return [*lines, f"st.shared{vector}.f32 [$3], {some};"]
