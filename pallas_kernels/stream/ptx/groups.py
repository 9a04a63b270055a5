"""A tile of integer weights whose groups are fine, times an operand of digits of several sequences.

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

from pallas_kernels.stream.ptx.scales import SIXTEENTH, scale_lines, scale_registers, widened

if TYPE_CHECKING:
    from pallas_kernels.stream.ptx.integers import IntegerTile

__all__ = ["sequences_text"]

# 1.5 * 2^23, its negative, and 256.
_MAGIC, _LESS, _HIGH = "0x4B400000", "0fCB400000", "0f43800000"
_BLOCK = 16


def sequences_text(tile: IntegerTile) -> str:
    """The whole text: operands as those of `integers`; behind them where sums of groups begin."""
    return _Sequences(tile).text()


class _Sequences:
    """The text: columns are sequences, and every read of the four threads of a row is a group."""

    def __init__(self, tile: IntegerTile):
        self.t = tile
        self.words = tile.words  # of bytes, of a read
        self.offsets = f"${7 + tile.reads * 2 * self.words}"
        # A thread has sums of two rows of a product.
        self.names = ["x", "y"] if tile.rows > 8 else ["x"]
        self.whole = tile.rows % 8 == 0

    def head(self, values: list[str]) -> list[str]:
        """Begins; %l is the lane, %g its row, %t its number among the four of the row."""
        t = self.t
        lines = [
            "{ .reg .pred %p, %mine; .reg .b32 %l, %g, %t, %a, %b, %c, %v, %w, %zero, %m;",
            f".reg .f32 %f, %e, %s, %own, {', '.join(values)}; {scale_registers(t)}",
            f"mov.u32 $0, 0; mov.b32 %zero, 0; mov.b32 %m, {_MAGIC};",
            f"mov.u32 %t, %tid.x; setp.ge.u32 %mine, %t, {t.threads}; @%mine bra idle;",
            "mov.u32 %l, %laneid; shr.u32 %g, %l, 2; and.b32 %t, %l, 3;",
        ]
        lines += [f"mov.f32 {value}, 0f00000000;" for value in values]
        # Threads of rows that there are not hold zeros.
        return [
            *lines,
            f"setp.lt.u32 %mine, %g, {t.rows}; mad.lo.u32 %a, %g, $2, $1;",
            f"mad.lo.u32 %c, %g, {t.scale_bytes}, $4; mad.lo.u32 %c, $6, {t.group_bytes}, %c;",
        ]

    def guard(self) -> str:
        return "" if self.whole else "@%mine "

    def loaded(self, names: list[str], at: str) -> list[str]:
        """Loads neighbouring words of a row; zeros where there is no such row."""
        lines = [] if self.whole else [f"mov.b32 {name}, 0;" for name in names]
        vector, some = (f".v{len(names)}", f"{{{', '.join(names)}}}")
        if len(names) == 1:
            vector, some = "", names[0]
        return [*lines, f"{self.guard()}ld.shared{vector}.b32 {some}, [{at}];"]

    def widened(self, names: list[str], raw: list[str]) -> list[str]:
        """Of int4 weights n, words of bytes 16 * (n - 8); of int8 ones themselves."""
        if self.t.bits == 8:
            return [f"mov.b32 {to}, {word};" for to, word in zip(names, raw, strict=True)]
        return widened(names, raw)

    def product(self, sums: list[str], word: int, names: list[str], b: list[str]) -> str:
        """Of the words of both rows from a number on, added to sums; the first one begins them."""
        rows = ("x", "y") if len(self.names) == 2 else ("x", None)
        a = [f"%{n}{names[i]}" if n else "%zero" for i in range(2) for n in rows]
        before = ["%m"] * 4 if word == 0 else sums
        return (
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
            f"{{{', '.join(sums)}}}, {{{', '.join(a)}}}, {{{', '.join(b)}}}, "
            f"{{{', '.join(before)}}};"
        )

    def added(self, value: str, high: str, low: str, total: str) -> list[str]:
        """Adds a group's products to a value: %s times the digits, and %o times their total."""
        t = self.t
        lines = [
            f"add.rn.f32 %f, {high}, {_LESS}; add.rn.f32 %e, {low}, {_LESS};",
            f"fma.rn.f32 %f, %f, {_HIGH}, %e;",
        ]
        # Beyond a row, sums are 0, and in the place of scales may lie anything.
        guard = "setp.ne.f32 %p, {}, 0f00000000; @%p " if t.ragged else ""
        lines.append(f"{guard.format('%f')}fma.rn.f32 {value}, %f, %s, {value};")
        if t.offset is not None:
            lines.append(f"{guard.format(total)}fma.rn.f32 {value}, {total}, %o, {value};")
        return lines

    def own(self) -> list[str]:
        """Puts the operand's scale into %own, of the column that lane %l has inputs of."""
        lines = ["shfl.sync.idx.b32 %own, $5, %l, 31, 0xffffffff;"]
        if self.t.bits == 4:
            lines.append(f"mul.rn.f32 %own, %own, {SIXTEENTH};")
        return lines

    def text(self) -> str:
        t = self.t
        values = [f"%v{i}" for i in range(max(2, t.rows // 4))]
        self.around = 32 // t.read_bytes  # reads of 128 bytes of a row
        places = [f"%k{i}" for i in range(min(self.around, t.reads))]
        lines = [
            *self.head(values),
            f".reg .b32 {', '.join(places)}; .reg .pred %n1, %n2, %n4;",
        ]
        for bit in (1, 2, 4):
            lines.append(f"and.b32 %v, %g, {bit}; setp.ne.u32 %n{bit}, %v, 0;")
        for first in range(0, t.rows, _BLOCK):
            lines += ["{", *self.block(values[first // 4 :]), "}"]
            if first + _BLOCK < t.rows:
                lines.append("shl.b32 %b, $2, 4; add.u32 %a, %a, %b;")
                lines.append(f"add.u32 %c, %c, {_BLOCK * t.scale_bytes};")
        lines.append("shl.b32 %l, %t, 3;")
        for n in range(2):
            lines += self.own()
            lines.append("add.u32 %l, %l, 4;")
            lines += [f"mul.rn.f32 {value}, {value}, %own;" for value in values[n::2]]
        for i in range(len(values) // 2):
            pair = ", ".join(values[2 * i : 2 * i + 2])
            lines.append(f"{self.guard()}st.shared.v2.f32 [$3+{256 * i}], {{{pair}}};")
        return " ".join([*lines, "idle: }"])

    def block(self, values: list[str]) -> list[str]:
        """The sums of one product's rows: of %a's on, with scales from %c."""
        t, lines, first = self.t, [], 0
        if len(self.names) == 2:
            lines.append("shl.b32 %b, $2, 3; add.u32 %b, %a, %b;")
        while first < t.reads:
            count = min(self.around, 1 << ((t.reads - first).bit_length() - 1))
            lines += ["{", *self.some(first, count, values), "}"]
            first += count
        return lines

    def some(self, first: int, count: int, values: list[str]) -> list[str]:
        """Some neighbouring reads, a power of two: no more than 128 bytes of a row."""
        t, each, lines = self.t, self.t.read_bytes // 4, []
        for i in range(count):
            # Times the bytes of a group, within those of all these.
            lines += [
                f"add.u32 %v, %g, {i}; and.b32 %v, %v, {count - 1};",
                f"shl.b32 %k{i}, %v, {(4 * t.read_bytes).bit_length() - 1};",
            ]
        levels = [bit for bit in (1, 2, 4) if bit < count]
        for n, row in zip(self.names, ("%a", "%b"), strict=False):
            held = [[f"%{n}r0_{i}_{w}" for w in range(each)] for i in range(count)]
            lines.append(f".reg .b32 {', '.join(x for some in held for x in some)};")
            for i, some in enumerate(held):
                lines.append(f"add.u32 %v, {row}, %k{i};")
                lines += self.loaded(some, f"%v+{4 * t.read_bytes * first}")
            for level, bit in enumerate(levels, 1):
                moved = [[f"%{n}r{level}_{i}_{w}" for w in range(each)] for i in range(count)]
                lines.append(f".reg .b32 {', '.join(x for some in moved for x in some)};")
                for i in range(count):
                    for w in range(each):
                        other = held[(i - bit) % count][w]
                        lines.append(f"selp.b32 {moved[i][w]}, {other}, {held[i][w]}, %n{bit};")
                held = moved
        wide = [f"w{i}" for i in range(self.words)]
        names = [f"%{n}{w}" for n in self.names for w in wide]
        sums = {digit: [f"%{digit}_{i}" for i in range(4)] for digit in ("hi", "lo")}
        lines.append(f".reg .b32 {', '.join([*names, *sums['hi'], *sums['lo']])};")
        if t.offset is not None:
            lines.append(".reg .f32 %q0, %q1;")
        at_once = max(4, t.scales_at_once) // t.group_bytes
        loaded = [f"%{n}s{i}" for n in self.names for i in range(t.scales_at_once // 4 or 1)]
        lines.append(f".reg .b32 {', '.join(loaded)};")
        for i in range(count):
            q = first + i
            for n in self.names:
                raw = [f"%{n}r{len(levels)}_{i}_{w}" for w in range(each)]
                lines += self.widened([f"%{n}{w}" for w in wide], raw)
            for number, digit in enumerate(("hi", "lo")):
                for word in range(0, self.words, 2):
                    start = 7 + (2 * q + number) * self.words + word
                    b = [f"${start}", f"${start + 1}"]
                    lines.append(self.product(sums[digit], word, wide[word : word + 2], b))
            if t.offset is not None:
                lines.append(f"ld.shared.v2.f32 {{%q0, %q1}}, [{self.offsets}+{32 * q}];")
            for half, n in enumerate(self.names):
                if t.scales_at_once < 4:
                    at = f"%c+{2 * q + 8 * half * t.scale_bytes}"
                    lines += [f"ld.shared.u16 %{n}s0, [{at}];", *scale_lines(t, f"%{n}s0")]
                else:
                    if i == 0 or q % at_once == 0:
                        lines += self.load_scales(n, half, q - q % at_once)
                    byte = q % at_once * t.group_bytes
                    lines += scale_lines(t, f"%{n}s{byte // 4}", high=byte % 4 != 0)
                for column in range(2):
                    value = values[2 * half + column]
                    high, low = (sums[digit][2 * half + column] for digit in ("hi", "lo"))
                    lines += self.added(value, high, low, f"%q{column}")
        return lines

    def load_scales(self, name: str, half: int, q: int) -> list[str]:
        """Loads the scales of some groups of a row, from the q-th on."""
        t = self.t
        words = [f"%{name}s{i}" for i in range(t.scales_at_once // 4)]
        vector, some = "", words[0]
        if len(words) > 1:
            vector, some = f".v{len(words)}", f"{{{', '.join(words)}}}"
        at = f"%c+{q * t.group_bytes + 8 * half * t.scale_bytes}"
        return [f"ld.shared{vector}.b32 {some}, [{at}];"]
