"""A tile of integer weights times an operand of digits: see `digits`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax._src import core

from pallas_kernels.stream.ptx import lowered
from pallas_kernels.stream.ptx.chunk_groups import chunk_text
from pallas_kernels.stream.ptx.groups import sequences_text
from pallas_kernels.stream.ptx.scales import SIXTEENTH, scale_lines, scale_registers

__all__ = ["IntegerTile", "multiply_integers"]

# Rows of a product.
_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class IntegerTile:
    """What multiplying a tile needs to know when it is traced.

    Attributes:
        bits: of a weight, 8 or 4.
        rows: a power of two from 2 on, at most 16; of several sequences, at most 32.
        reads: of 16 bytes, of each row, by a thread.
        step: bytes from a thread's read to its next one.
        scale_bytes: from a row's scales to the next one's.
        ragged: whether the last of a row's reads may lie beyond it, where anything is.
        chunked: whether the operand's 8 columns are both digits of 4 chunks of one sequence; else
            each of 8 sequences has its digits one after the other.
        threads: that take part, from the first on.
        group: inputs that share a scale; 0 where a row does.
        scales: dtype of a group's scale, and of what stands beside it.
        offset: what stands beside it, as of `dims.Grouping`, or None.
        fine: whether groups are: see `groups`. Of one sequence, `step` is that of its reads of the
            same line.
        scales_at_once: bytes of groups that are fine that may be loaded at once.
        gap: bytes between the two halves of the rows; where groups are fine, of one sequence.
        scale_gap: likewise between those of their scales.
    """

    bits: int
    rows: int
    reads: int
    step: int
    scale_bytes: int
    ragged: bool
    chunked: bool
    threads: int
    group: int = 0
    scales: str = "bfloat16"
    offset: str | None = None
    fine: bool = False
    scales_at_once: int = 2
    gap: int = 0
    scale_gap: int = 0

    @property
    def read_bytes(self) -> int:
        """Bytes of a row that a thread reads at once."""
        if self.fine and not self.chunked:  # a fourth of a group
            return self.group * self.bits // 32
        return 16

    @property
    def words(self) -> int:
        """Words of a read's weights as bytes, and of one digit of its inputs."""
        return 2 * self.read_bytes // self.bits

    @property
    def group_bytes(self) -> int:
        """Bytes of a group's scale, and of what stands beside it."""
        return 2 if self.offset is None else 4


def _float(name: str, high: str, low: str) -> str:
    """256 * high + low, both integers, as a float32."""
    return f"mad.lo.s32 %v, {high}, 256, {low}; cvt.rn.f32.s32 {name}, %v;"


class _Multiply:
    """The text of `multiply_integers`, piece by piece.

    Operands: result $0, unused; address $1, pitch $2, where $3, scales $4, the operand's scale $5,
    the first group of each thread $6, then the operand's words; where groups have an offset, behind
    them where the sums of groups begin: see `group_sums`.
    """

    def __init__(self, tile: IntegerTile):
        self.t = tile
        # Rows that a warp multiplies at once: of a product's 16, 8 are of each half of them.
        self.both = tile.rows > (2 if tile.chunked else 8)
        # A product waits for the one before it that it is added to: of few rows, every other one,
        # or fourth, begins a sum of its own.
        rows = tile.rows // (4 if self.both else 2) if tile.chunked else 2
        self.chains = max(1, 4 // rows) if tile.bits == 8 else 1

    def digit(self, q: int, low: bool, word: int) -> str:
        """A word of the operand; chunked, a thread has one digit alone."""
        read = q if self.t.chunked else 2 * q + low
        return f"${7 + read * self.t.words + word}"

    def load(self, name: str, at: str, q: int, guard: str = "") -> list[str]:
        """The q-th read of a row, as bytes: words {name}{q}_0 and so on."""
        t, raw = self.t, [f"%{name}{q}_{i}" for i in range(4)]
        words = ", ".join(f"%{name}{q}_{i}" for i in range(t.words))
        lines = [f".reg .b32 {words};"]
        if t.bits == 4:
            raw = [f"%{name}r{q}_{i}" for i in range(4)]
            lines.append(f".reg .b32 {', '.join(raw)};")
        if guard:
            lines += [f"mov.b32 {x}, 0;" for x in raw]
        lines.append(f"{guard}ld.shared.v4.b32 {{{', '.join(raw)}}}, [{at}+{t.step * q}];")
        return lines

    def widen(self, name: str, q: int) -> list[str]:
        """Of int4 weights n, words of bytes 16 * (n - 8)."""
        if self.t.bits == 8:
            return []
        lines = []
        for i in range(4):
            raw, low, high = f"%{name}r{q}_{i}", f"%{name}{q}_{2 * i}", f"%{name}{q}_{2 * i + 1}"
            # (x ^ 0x88888888) & 0xF0F0F0F0 is one instruction
            lines.append(f"shl.b32 {low}, {raw}, 4;")
            for to, x in ((low, low), (high, raw)):
                lines.append(f"lop3.b32 {to}, {x}, 0x88888888, 0xF0F0F0F0, 0x28;")
        return lines

    def products(self, q: int) -> list[str]:
        """Adds the q-th read's products to the sums %hi, and to %lo where the low digits are."""
        lines = []
        for word in range(0, self.t.words, 2):
            rows = ("x", "y") if self.both else ("x", None)
            a = [f"%{n}{q}_{word + i}" if n else "%zero" for i in range(2) for n in rows]
            # Of int4 weights, every read begins a sum.
            number = (word + (q * self.t.words if self.t.bits == 8 else 0)) // 2
            chain, first = number % self.chains, number < self.chains
            for name in self._names():
                sums = ", ".join(f"%{name}{chain or ''}_{i}" for i in range(4))
                before = "%zero, %zero, %zero, %zero" if first else sums
                b = [self.digit(q, name == "lo", word + i) for i in range(2)]
                lines.append(
                    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                    f"{{{sums}}}, {{{', '.join(a)}}}, {{{', '.join(b)}}}, {{{before}}};"
                )
        return lines

    def add_chains(self) -> list[str]:
        """Adds up the sums of the chains that there are."""
        chains = min(self.chains, self.t.reads * self.t.words // 2)
        return [
            f"add.s32 %{name}_{i}, %{name}_{i}, %{name}{chain}_{i};"
            for chain in range(1, chains)
            for name in self._names()
            for i in range(4)
        ]

    def _sums(self) -> list[str]:
        chains = [chain or "" for chain in range(self.chains)]
        return [f"%{n}{c}_{i}" for n in ("hi", "lo") for c in chains for i in range(4)]

    def _names(self) -> tuple[str, ...]:
        return ("hi",) if self.t.chunked else ("hi", "lo")

    def scaled(self, q: int, row: str, half: int, values: Sequence[str]) -> list[str]:
        """Of int4 weights: adds what the sums are of one row, times the group's scale.

        Args:
            q: the read.
            row: address of the row's scale of the thread's first group.
            half: which of the two rows of a product.
            values: what is added to.
        """
        t = self.t
        stride = 4 if t.chunked else 1  # groups from a read to the next
        at = f"[{row}+{t.group_bytes * stride * q}]"
        if t.offset is not None:
            lines = [f"ld.shared.b32 %w, {at};", *scale_lines(t, "%w")]
        elif t.scales == "float16":
            lines = [f"ld.shared.b16 %h, {at}; cvt.f32.f16 %s, %h;"]
        else:
            lines = [f"ld.shared.u16 %w, {at}; shl.b32 %w, %w, 16; mov.b32 %s, %w;"]
        # Beyond a row, sums are 0, and in the scale's place may lie anything.
        guard = "setp.ne.f32 %p, {}, 0f00000000; @%p " if t.ragged else ""
        for i, value in enumerate(values):
            lines.append(_float("%f", *self.sums(half, i)))
            lines.append(f"{guard.format('%f')}fma.rn.f32 {value}, %f, %s, {value};")
            if t.offset is not None:
                total = f"%q{q}_{i}"
                lines.append(f"{guard.format(total)}fma.rn.f32 {value}, {total}, %o, {value};")
        return lines

    def totals(self) -> list[str]:
        """Loads the sums of each group's activations, those of a thread's columns: %q{q}_{i}."""
        t = self.t
        if t.offset is None:
            return []
        start, lines = f"${7 + t.reads * t.words * (1 if t.chunked else 2)}", []
        for q in range(t.reads):
            if t.chunked:
                lines.append(f".reg .f32 %q{q}_0; ld.shared.f32 %q{q}_0, [{start}+{16 * q}];")
            else:
                pair = f"%q{q}_0, %q{q}_1"
                lines.append(f".reg .f32 {pair}; ld.shared.v2.f32 {{{pair}}}, [{start}+{32 * q}];")
        return lines

    def sums(self, half: int, i: int) -> tuple[str, str]:
        """The sums of high and low digits of one of the two rows; of its i-th column."""
        if self.t.chunked:
            return f"%hi_{2 * half}", f"%hi_{2 * half + 1}"
        return f"%hi_{2 * half + i}", f"%lo_{2 * half + i}"

    def text(self) -> str:
        """The whole text."""
        t = self.t
        values = [f"%v{r}" for r in range(t.rows // 2 if t.chunked else max(2, t.rows // 4))]
        lines = [
            "{ .reg .pred %p, %odd, %mine; .reg .b32 %l, %g, %t, %a, %b, %c, %v, %w, %zero;",
            f".reg .b32 {', '.join(self._sums())};",
            f".reg .f32 %f, %s, %own, {', '.join(values)}; {scale_registers(t)}"
            "mov.u32 $0, 0; mov.b32 %zero, 0;",
            f"mov.u32 %t, %tid.x; setp.ge.u32 %mine, %t, {t.threads}; @%mine bra idle;",
            "mov.u32 %l, %laneid; shr.u32 %g, %l, 2; and.b32 %t, %l, 3;",
        ]
        lines += [f"mov.f32 {value}, 0f00000000;" for value in values]
        lines += self.totals()
        lines += self.chunks(values) if t.chunked else self.sequences(values)
        return " ".join([*lines, "idle: }"])

    def chunks(self, values: list[str]) -> list[str]:
        """Columns are digits of chunks.

        Of a product's 16 rows, 4 are the chunks of one row of the tile. Threads of g below 4 have
        the tile's first half of rows, two at a time, and the others its second half.
        """
        t = self.t
        half = t.rows // 2
        lines = [
            f"shr.u32 %l, %g, 2; mul.lo.u32 %l, %l, {half};",
            "mad.lo.u32 %a, %l, $2, $1;",
            f"mad.lo.u32 %c, %l, {t.scale_bytes}, $4;",
        ]
        if t.bits == 4:
            lines.append(f"mad.lo.u32 %c, $6, {t.group_bytes}, %c;")
        # The scale of a chunk is with the threads that hold its inputs.
        lines.append("shl.b32 %l, %t, 3; shfl.sync.idx.b32 %own, $5, %l, 31, 0xffffffff;")
        if t.bits == 4:
            lines.append(f"mul.rn.f32 %own, %own, {SIXTEENTH};")
        names = "xy" if self.both else "x"
        for r in range(0, half, len(names)):
            # A scope of its own for the names of what is loaded.
            lines.append("{ add.u32 %b, %a, $2;")
            for q in range(t.reads):
                for name, at in zip(names, ("%a", "%b"), strict=False):
                    lines += self.load(name, at, q)
            for q in range(t.reads):
                for name in names:
                    lines += self.widen(name, q)
                lines += self.products(q)
                if t.bits == 4:
                    for i in range(len(names)):
                        row = f"%c+{(r + i) * t.scale_bytes}"
                        lines += self.scaled(q, row, i, values[r + i : r + i + 1])
            lines += self.add_chains()
            for i in range(len(names)):
                value = values[r + i]
                if t.bits == 8:
                    lines.append(_float(value, *self.sums(i, 0)))
                    lines.append(f"ld.shared.f32 %s, [%c+{(r + i) * t.scale_bytes}];")
                    lines.append(f"mul.rn.f32 {value}, {value}, %s;")
                lines.append(f"mul.rn.f32 {value}, {value}, %own;")
            lines.append("add.u32 %a, %b, $2; }")
        # Those count whose row and column are the same chunk's; others lie where nobody looks.
        size = min(4, half)
        vector = f".v{size}" if size > 1 else ""
        for r in range(0, half, size):
            some = ", ".join(values[r : r + size])
            some = f"{{{some}}}" if size > 1 else some
            lines.append(f"st.shared{vector}.f32 [$3+{4 * r}], {some};")
        return lines

    def sequences(self, values: list[str]) -> list[str]:
        """Columns are sequences: a block's row, or two that are 8 apart, for every four threads."""
        t = self.t
        lines = [
            # Threads of rows that there are not hold zeros.
            f"setp.lt.u32 %mine, %g, {t.rows}; mad.lo.u32 %a, %g, $2, $1;",
            f"mad.lo.u32 %c, %g, {t.scale_bytes}, $4;",
            "and.b32 %b, %g, 1; setp.ne.u32 %odd, %b, 0;",
        ]
        if t.bits == 4:
            lines.append(f"mad.lo.u32 %c, $6, {t.group_bytes}, %c;")
        for first in range(0, t.rows, _BLOCK):
            # A scope of its own for the names of what is loaded.
            lines += ["{", *self.block(values[first // 4 :]), "}"]
            if first + _BLOCK < t.rows:
                lines.append("shl.b32 %b, $2, 4; add.u32 %a, %a, %b;")
                lines.append(f"add.u32 %c, %c, {_BLOCK * t.scale_bytes};")
        # A sequence's scale is with the threads that hold its inputs.
        lines.append("shl.b32 %l, %t, 3;")
        for n in range(2):
            lines.append("shfl.sync.idx.b32 %own, $5, %l, 31, 0xffffffff; add.u32 %l, %l, 4;")
            if t.bits == 4:
                lines.append(f"mul.rn.f32 %own, %own, {SIXTEENTH};")
            for value in values[n::2]:
                lines.append(f"mul.rn.f32 {value}, {value}, %own;")
        for i in range(len(values) // 2):
            pair = ", ".join(values[2 * i : 2 * i + 2])
            lines.append(f"@%mine st.shared.v2.f32 [$3+{256 * i}], {{{pair}}};")
        return lines

    def block(self, values: list[str]) -> list[str]:
        """Of several sequences, the sums of one product's rows: of %a's on, with scales from %c."""
        t, lines, names = self.t, [], ["x", "y"][: 1 + self.both]
        if self.both:
            lines.append("shl.b32 %b, $2, 3; add.u32 %b, %a, %b;")
        for q in range(t.reads):
            lines += self.pieces(q, names)
        for q in range(t.reads):
            for name in names:
                lines += self.widen(name, q)
            lines += self.products(q)
            if t.bits == 4:
                for i in range(len(names)):
                    row = f"%c+{8 * i * t.scale_bytes}"
                    lines += self.scaled(q, row, i, values[2 * i : 2 * i + 2])
        lines += self.add_chains()
        if t.bits == 8:
            for i in range(len(names)):
                lines.append(f"ld.shared.f32 %s, [%c+{8 * i * t.scale_bytes}];")
                for n, value in enumerate(values[2 * i : 2 * i + 2]):
                    lines.append(_float(value, *self.sums(i, n)))
                    lines.append(f"mul.rn.f32 {value}, {value}, %s;")
        return lines

    def pieces(self, q: int, names: list[str]) -> list[str]:
        """Loads the q-th read of each row, and the next one with it.

        Rows begin in the same bank: of two reads, threads of every other row make the second one
        first.
        """
        t, lines = self.t, []
        alone = q == t.reads - 1 and q % 2 == 0
        raw = "r" if t.bits == 4 else ""
        for name, at in zip(names, ("%a", "%b"), strict=False):
            if alone:
                lines += self.load(name, at, q, "@%mine ")
                continue
            u, v = ([f"%{name}{n}{q // 2}_{i}" for i in range(4)] for n in "uv")
            x = [f"%{name}{raw}{q}_{i}" for i in range(4)]
            words = {*x, *(f"%{name}{q}_{i}" for i in range(t.words))}
            lines.append(f".reg .b32 {', '.join(sorted(words))};")
            if q % 2 == 0:
                lines.append(f".reg .b32 {', '.join(u + v)};")
                lines += [f"mov.b32 {n}, 0;" for n in u + v]
                for to, if_odd, if_even in ((u, t.step, 0), (v, 0, t.step)):
                    lines.append(f"selp.b32 %v, {if_odd}, {if_even}, %odd;")
                    lines.append(f"add.u32 %v, %v, {at};")
                    some = ", ".join(to)
                    lines.append(f"@%mine ld.shared.v4.b32 {{{some}}}, [%v+{t.step * q}];")
                lines += [f"selp.b32 {x[i]}, {v[i]}, {u[i]}, %odd;" for i in range(4)]
            else:
                lines += [f"selp.b32 {x[i]}, {u[i]}, {v[i]}, %odd;" for i in range(4)]
        return lines


_multiply_p = core.Primitive("ffjax_multiply_integers")


@_multiply_p.def_effectful_abstract_eval
def _(address, *args, tile):
    return core.ShapedArray(address.shape, jnp.int32), {lowered.ORDERED}


@lowered.rule(_multiply_p)
def _(ctx, *args, tile):
    args = lowered.values(ctx, args)
    result = lowered.like(ctx.avals_out[0].shape, lowered.i32())
    constraints = "=&r,r,r,r,r,f,r" + ",r" * (len(args) - 6)
    if tile.fine:
        text = (chunk_text if tile.chunked else sequences_text)(tile)
    else:
        text = _Multiply(tile).text()
    return lowered.assembly([result], text, constraints, args, by_warps=True)[0]


def multiply_integers(
    address: Array,
    pitch: Array,
    where: Array,
    scales: Array,
    scale: Array,
    group: Array,
    words: Sequence[Array],
    tile: IntegerTile,
    offsets: Array | None = None,
) -> Array:
    """Multiplies a tile of integers in shared memory by digits in registers, on tensor cores.

    Sums of a group of int4 weights, or of all a thread's inputs of int8 ones, are exact; then they
    become float32 and are multiplied by the weights' scales and the operand's. What is stored is
    what `multiply_tile` stores.

    Args:
        address: int32 `[T]`, of each thread's first read of the first row.
        pitch: int32 `[T]`, bytes from a row to the next; all the same.
        where: int32 `[T]`, address in shared memory where what the thread stores begins. Chunked,
            what thread t stores is of use where t // 4 % 4 is t % 4.
        scales: int32 `[T]`, address of the first row's scales; all the same.
        scale: float32 `[T]`, the operand's.
        group: int32 `[T]`, number in the row of the group that each thread's first read is of; or
            where groups are fine, that each warp's is.
        words: int32 `[T]`, the operand, from `pack_digits`.
        tile: the rest.
        offsets: int32 `[T]`, address of the first of the sums of groups that each thread uses, as
            `sum_groups` has left them; None where groups have no offset.

    Returns:
        Nothing of use: a branch of a `cond` must have a result.
    """
    more = [] if offsets is None else [offsets]
    return _multiply_p.bind(address, pitch, where, scales, scale, group, *words, *more, tile=tile)
