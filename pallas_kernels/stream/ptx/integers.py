"""A tile of integer weights times activations as digits: see `digits`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax import Array

from pallas_kernels.asm import Block, Register
from pallas_kernels.inline_ptx.operation import Operation
from pallas_kernels.stream.ptx.chunk_groups import write_chunks
from pallas_kernels.stream.ptx.groups import write_sequences
from pallas_kernels.stream.ptx.scales import Given, IntegerText

__all__ = ["IntegerTile", "multiply_integers"]

# Rows of a product.
_BLOCK = 16
# Where several sequences' activations are more words than these, so many reads of a row are loaded
# at once: of 70B, all of them had threads keep in memory what they hold from tile to tile.
_MANY_WORDS, _WIDE_READS = 64, 4


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
        chunked: whether the activations' 8 columns are both digits of 4 chunks of one sequence;
            else each of 8 sequences has its digits one after the other.
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


class _Multiply(IntegerText):
    """The text of `multiply_integers` where groups are not fine, piece by piece."""

    def __init__(self, b: Block, tile: IntegerTile, given: Given):
        super().__init__(b, tile, given)
        # Rows that a warp multiplies at once: of a product's 16, 8 are of each half of them.
        self.both = tile.rows > (2 if tile.chunked else 8)
        # A product waits for the one before it that it is added to: of few rows, every other one,
        # or fourth, begins a sum of its own.
        rows = tile.rows // (4 if self.both else 2) if tile.chunked else 2
        self.chains = max(1, 4 // rows) if tile.bits == 8 else 1
        self.names = ["x", "y"][: 1 + self.both]
        # Sums of products by high digits, and by low ones; chunked, a thread has one alone.
        self.sums = [
            [[b.s32(name) for _ in range(4)] for _ in range(self.chains)]
            for name in (("high_sum",) if tile.chunked else ("high_sum", "low_sum"))
        ]
        self.mine, self.odd = b.pred("mine"), b.pred("odd")
        # Of each name and read: words as they lie in memory, and as bytes.
        self.raw: dict[tuple[str, int], list[Register]] = {}
        self.bytes: dict[tuple[str, int], list[Register]] = {}
        self.totals: list[list[Register]] = []

    def write(self) -> None:
        """The whole text."""
        b, t = self.b, self.t
        count = t.rows // 2 if t.chunked else max(2, t.rows // 4)
        values = [b.f32("value") for _ in range(count)]
        self.begin(values)
        self._load_totals()
        (self._write_chunks if t.chunked else self._write_sequences)(values)
        b.mark(self.idle)

    def _digit(self, q: int, low: int, word: int) -> Register:
        """A word of the activations; chunked, a thread has one digit alone."""
        read = q if self.t.chunked else 2 * q + low
        return self.given.words[read * self.t.words + word]

    def _declare(self, name: str, q: int) -> list[Register]:
        """The q-th read of a row, as it lies in memory: int8 weights are bytes there."""
        self.bytes[name, q] = [self.b.u32(name) for _ in range(self.t.words)]
        raw = self.b.u32s(*[f"{name}_raw"] * 4) if self.t.bits == 4 else self.bytes[name, q]
        self.raw[name, q] = raw
        return raw

    def _load(self, name: str, at: Register, q: int, guard: Register | None = None) -> None:
        """Loads the q-th read of a row; zeros where the guard does not hold."""
        raw = self._declare(name, q)
        if guard is not None:
            for word in raw:
                self.b.mov(word, 0)
        with self.b.when(guard):
            self.b.ld_shared(raw, at + self.t.step * q)

    def _widen(self, name: str, q: int) -> None:
        """Of int4 weights n, words of bytes 16 * (n - 8)."""
        if self.t.bits == 4:
            self.widen_nibbles(self.bytes[name, q], self.raw[name, q])

    def _multiply(self, q: int) -> None:
        """Adds the q-th read's products to the sums."""
        for word in range(0, self.t.words, 2):
            a = [
                self.bytes[n, q][word + i] if n in self.names else self.zero
                for i in range(2)
                for n in "xy"
            ]
            # Of int4 weights, every read begins a sum.
            number = (word + (q * self.t.words if self.t.bits == 8 else 0)) // 2
            for low, chains in enumerate(self.sums):
                sums = chains[number % self.chains]
                before = [self.zero] * 4 if number < self.chains else sums
                digits = [self._digit(q, low, word + i) for i in range(2)]
                self.b.mma_s8(sums, a, digits, before)

    def _add_chains(self) -> None:
        """Adds up the sums of the chains that there are."""
        for chain in range(1, min(self.chains, self.t.reads * self.t.words // 2)):
            for first, *others in self.sums:
                for to, number in zip(first, others[chain - 1], strict=True):
                    self.b.add(to, to, number)

    def _scale(self, q: int, row: int, half: int, values: Sequence[Register]) -> None:
        """Of int4 weights: adds what the sums are of one row, times the group's scale.

        Args:
            q: the read.
            row: bytes to the row's scales from those of the thread's first one.
            half: which of the two rows of a product.
            values: what is added to.
        """
        b, t = self.b, self.t
        stride = 4 if t.chunked else 1  # groups from a read to the next
        at = self.scale_place + (row + t.group_bytes * stride * q)
        if t.offset is not None:
            b.ld_shared(self.w, at)
            self.split_scale(self.w)
        elif t.scales == "float16":
            b.ld_shared(self.half, at)
            b.from_half(self.scale, self.half)
        else:
            b.ld_shared_u16(self.w, at)
            b.shl(self.w, self.w, 16)
            b.mov(self.scale, self.w)
        for i, value in enumerate(values):
            self.combine(self.number, *self._sums_of(half, i))
            self.add_scaled(value, self.totals[q][i] if self.totals else self.number)

    def _load_totals(self) -> None:
        """Loads the sums of each group's activations, those of a thread's columns."""
        b, t, start = self.b, self.t, self.given.offsets
        if start is None:
            return
        for q in range(t.reads):
            some = [b.f32("total") for _ in range(1 if t.chunked else 2)]
            b.ld_shared(some, start + (16 if t.chunked else 32) * q)
            self.totals.append(some)

    def _sums_of(self, half: int, i: int) -> tuple[Register, Register]:
        """The sums of high and low digits of one of the two rows; of its i-th column."""
        if self.t.chunked:
            return self.sums[0][0][2 * half], self.sums[0][0][2 * half + 1]
        return self.sums[0][0][2 * half + i], self.sums[1][0][2 * half + i]

    def _write_chunks(self, values: list[Register]) -> None:
        """Columns are digits of chunks.

        Of a product's 16 rows, 4 are the chunks of one row of the tile. Threads of g below 4 have
        the tile's first half of rows, two at a time, and the others its second half.
        """
        b, t, given, half = self.b, self.t, self.given, self.t.rows // 2
        b.shr(self.lane, self.group, 2)
        b.mul_lo(self.lane, self.lane, half)
        b.mad_lo(self.row, self.lane, given.pitch, given.address)
        b.mad_lo(self.scale_place, self.lane, t.scale_bytes, given.scales)
        if t.bits == 4:
            b.mad_lo(self.scale_place, given.group, t.group_bytes, self.scale_place)
        b.comment("The scale of a chunk is with the threads that hold its inputs.")
        b.shl(self.lane, self.quad, 3)
        self.load_own_scale(self.lane)
        for r in range(0, half, len(self.names)):
            b.add(self.other_row, self.row, given.pitch)
            for q in range(t.reads):
                for name, at in zip(self.names, (self.row, self.other_row), strict=False):
                    self._load(name, at, q)
            for q in range(t.reads):
                for name in self.names:
                    self._widen(name, q)
                self._multiply(q)
                if t.bits == 4:
                    for i in range(len(self.names)):
                        self._scale(q, (r + i) * t.scale_bytes, i, values[r + i : r + i + 1])
            self._add_chains()
            for i in range(len(self.names)):
                value = values[r + i]
                if t.bits == 8:
                    self.combine(value, *self._sums_of(i, 0))
                    b.ld_shared(self.scale, self.scale_place + (r + i) * t.scale_bytes)
                    b.mul_rn(value, value, self.scale)
                b.mul_rn(value, value, self.own)
            b.add(self.row, self.other_row, given.pitch)
        b.comment("Only products on the chunk diagonal are used; others lie where nobody looks.")
        size = min(4, half)
        for r in range(0, half, size):
            b.st_shared(given.where + 4 * r, values[r : r + size])

    def _write_sequences(self, values: list[Register]) -> None:
        """Columns are sequences: a block's row, or two that are 8 apart, for every four threads."""
        b, t, given = self.b, self.t, self.given
        b.comment("Threads of rows that there are not hold zeros.")
        b.setp("lt", self.mine, self.group, t.rows)
        b.mad_lo(self.row, self.group, given.pitch, given.address)
        b.mad_lo(self.scale_place, self.group, t.scale_bytes, given.scales)
        b.and_(self.other_row, self.group, 1)
        b.setp("ne", self.odd, self.other_row, 0)
        if t.bits == 4:
            b.mad_lo(self.scale_place, given.group, t.group_bytes, self.scale_place)
        for first in range(0, t.rows, _BLOCK):
            self._write_block(values[first // 4 :])
            if first + _BLOCK < t.rows:
                b.shl(self.other_row, given.pitch, 4)
                b.add(self.row, self.row, self.other_row)
                b.add(self.scale_place, self.scale_place, _BLOCK * t.scale_bytes)
        b.comment("A sequence's scale is with the threads that hold its inputs.")
        b.shl(self.lane, self.quad, 3)
        for n in range(2):
            b.shfl_idx(self.own, given.scale, self.lane)
            b.add(self.lane, self.lane, 4)
            if t.bits == 4:
                b.mul_rn(self.own, self.own, 1 / 16)
            for value in values[n::2]:
                b.mul_rn(value, value, self.own)
        for i in range(len(values) // 2):
            with b.when(self.mine):
                b.st_shared(given.where + 256 * i, values[2 * i : 2 * i + 2])

    def _write_block(self, values: list[Register]) -> None:
        """Of several sequences, the sums of one product's rows, from `row` on."""
        b, t = self.b, self.t
        if self.both:
            b.shl(self.other_row, self.given.pitch, 3)
            b.add(self.other_row, self.row, self.other_row)
        reads: dict[str, list[list[Register]]] = {}
        at_once = t.reads if len(self.given.words) <= _MANY_WORDS else _WIDE_READS
        for start in range(0, t.reads, at_once):
            some = range(start, min(start + at_once, t.reads))
            if start:
                b.comment("Nothing is loaded further ahead: there are no registers for it.")
                b.bar_warp()
            for q in some:
                self._load_in_turn(q, reads)
            for q in some:
                for name in self.names:
                    self._widen(name, q)
                self._multiply(q)
                if t.bits == 4:
                    for i in range(len(self.names)):
                        self._scale(q, 8 * i * t.scale_bytes, i, values[2 * i : 2 * i + 2])
        self._add_chains()
        if t.bits == 8:
            for i in range(len(self.names)):
                b.ld_shared(self.scale, self.scale_place + 8 * i * t.scale_bytes)
                for n, value in enumerate(values[2 * i : 2 * i + 2]):
                    self.combine(value, *self._sums_of(i, n))
                    b.mul_rn(value, value, self.scale)

    def _load_in_turn(self, q: int, reads: dict[str, list[list[Register]]]) -> None:
        """Loads the q-th read of each row, and the next one with it.

        Rows begin in the same bank: of two reads, threads of every other row make the second one
        first. `reads` holds what was loaded with the read before.
        """
        b, t = self.b, self.t
        for name, at in zip(self.names, (self.row, self.other_row), strict=False):
            if q == t.reads - 1 and q % 2 == 0:
                self._load(name, at, q, self.mine)
                continue
            raw = self._declare(name, q)
            if q % 2 == 0:
                reads[name] = [b.u32s(*[f"{name}_first"] * 4), b.u32s(*[f"{name}_second"] * 4)]
                for word in (x for some in reads[name] for x in some):
                    b.mov(word, 0)
                turns = ((t.step, 0), (0, t.step))
                for to, (if_odd, if_even) in zip(reads[name], turns, strict=True):
                    b.selp(self.v, if_odd, if_even, self.odd)
                    b.add(self.v, self.v, at)
                    with b.when(self.mine):
                        b.ld_shared(to, self.v + t.step * q)
            for word, first, second in zip(raw, *reads[name], strict=True):
                b.selp(word, *((first, second) if q % 2 else (second, first)), self.odd)


def _write_multiply(b: Block, *operands: Register, tile: IntegerTile) -> None:
    """Operands: see `Given`."""
    b.warps_jump_whole = True
    words, offsets = operands[6:], None
    if tile.offset is not None:
        *words, offsets = words
    address, pitch, where, scales, scale, group = operands[:6]
    given = Given(address, pitch, where, scales, scale, group, words, offsets)
    if tile.fine:
        (write_chunks if tile.chunked else write_sequences)(b, tile, given)
    else:
        _Multiply(b, tile, given).write()


_multiply = Operation("ffjax_multiply_integers", _write_multiply)


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
    become float32 and are multiplied by the weights' scales and the activations'. What is stored is
    what `multiply_tile` stores.

    Args:
        address: int32 `[threads]`, of each thread's first read of the first row.
        pitch: int32 `[threads]`, bytes from a row to the next; all the same.
        where: int32 `[threads]`, address in shared memory where what the thread stores begins.
            Chunked, what thread t stores is of use where t // 4 % 4 is t % 4.
        scales: int32 `[threads]`, address of the first row's scales; all the same.
        scale: float32 `[threads]`, the activations'.
        group: int32 `[threads]`, number in the row of the group that each thread's first read is
            of; or where groups are fine, that each warp's is.
        words: int32 `[threads]`, the activations, from `pack_digits`.
        tile: the rest.
        offsets: int32 `[threads]`, address of the first of the sums of groups that each thread
            uses, as `sum_groups` has left them; None where groups have no offset.

    Returns:
        Nothing of use: a branch of a `cond` must have a result.
    """
    more = [] if offsets is None else [offsets]
    operands = address, pitch, where, scales, scale, group, *words, *more
    return _multiply(*operands, tile=tile)[0]
