"""What all products of integers share: activations, scales of groups, int4 weights as bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pallas_kernels.asm import LANE, TID, Block, Register

if TYPE_CHECKING:
    from pallas_kernels.stream.ptx.integers import IntegerTile

__all__ = ["Given", "IntegerText"]

# int4 weights are multiplied as 16 times what they stand for.
_SIXTEENTH, _EIGHT = 1 / 16, 8.0
# The bfloat16 in a word's upper half, and the sign of each of its nibbles.
_UPPER, _SIGNS, _HIGH_NIBBLES = 0xFFFF0000, 0x88888888, 0xF0F0F0F0
# Of `lop3`: (a ^ b) & c.
_XOR_AND = 0x28


@dataclasses.dataclass(frozen=True)
class Given:
    """What is bound to a text: see `multiply_integers`."""

    address: Register
    pitch: Register
    where: Register
    scales: Register
    scale: Register
    group: Register
    words: Sequence[Register]
    offsets: Register | None


class IntegerText:
    """What the texts of products of integers have in common: registers, and how they begin."""

    def __init__(self, b: Block, tile: IntegerTile, given: Given):
        self.b, self.t, self.given = b, tile, given
        # A thread's lane, its row of a product, and its number among the four of the row.
        self.lane, self.group, self.quad = b.u32s("lane", "group", "quad")
        # Where rows of weights begin, and the scales of the first of them.
        self.row, self.other_row, self.scale_place = b.u32s("row", "other_row", "scale_place")
        # What is soon done with shares registers: ptxas else finds other code.
        self.v, self.w, self.zero = *b.u32s(*["scratch"] * 2), b.u32("zero")
        self.number, self.scale, self.own = b.f32s("number", "scale", "own_scale")
        self.offset, self.half, self.other_half = b.f32("offset"), b.u16("half"), b.u16("half")
        self.is_some, self.idle = b.pred("is_some"), b.label("idle")

    def begin(self, values: Sequence[Register], *before: tuple[Register, int]) -> None:
        """Leaves threads out that take no part; sets what is added to, and more, to numbers."""
        b, is_idle = self.b, self.b.pred("is_idle")
        b.mov(self.zero, 0)
        for register, number in before:
            b.mov(register, number)
        b.mov(self.quad, TID)
        b.setp("ge", is_idle, self.quad, self.t.threads)
        b.bra_if(is_idle, self.idle)
        b.mov(self.lane, LANE)
        b.shr(self.group, self.lane, 2)
        b.and_(self.quad, self.lane, 3)
        for value in values:
            b.mov(value, 0.0)

    def load_own_scale(self, lane: Register) -> None:
        """The activations' scale, of the column that a lane has inputs of."""
        self.b.shfl_idx(self.own, self.given.scale, lane)
        if self.t.bits == 4:
            self.b.mul_rn(self.own, self.own, _SIXTEENTH)

    def widen_nibbles(self, names: Sequence[Register], raw: Sequence[Register]) -> None:
        """Of int4 weights n, words of bytes 16 * (n - 8): two for each raw one."""
        b = self.b
        for i, word in enumerate(raw):
            low, high = names[2 * i : 2 * i + 2]
            # (x ^ 0x88888888) & 0xF0F0F0F0 is one instruction.
            b.shl(low, word, 4)
            for to, x in ((low, low), (high, word)):
                b.lop3(to, x, _SIGNS, _HIGH_NIBBLES, _XOR_AND)

    def combine(self, to: Register, high: Register, low: Register) -> None:
        """256 * high + low, both integers, as a float32."""
        whole = self.v.as_("s32")
        self.b.mad_lo(whole, high, 256, low)
        self.b.to_float(to, whole)

    def split_scale(self, word: Register, high: bool = False) -> None:
        """Puts a group's scale into `scale`, and its offset into `offset`, if there is one.

        The offset is what is added to s * (n - 8): s * (8 - z), or m + 8 * s.

        Args:
            word: the register that holds the scale, in its low half, or where high in its high one;
                and where there is an offset what that is made of in its high half.
            high: see above.
        """
        b, t = self.b, self.t
        if t.offset is None:
            if t.scales == "float16":
                b.unpack(
                    *((self.other_half, self.half) if high else (self.half, self.other_half)), word
                )
                b.from_half(self.scale, self.half)
            else:
                self._widen_bfloat16(self.scale, word, high)
            return
        if t.scales == "float16":
            b.unpack(self.half, self.other_half, word)
            b.from_half(self.scale, self.half)
            b.from_half(self.offset, self.other_half)
        else:
            self._widen_bfloat16(self.scale, word, high=False)
            self._widen_bfloat16(self.offset, word, high=True)
        if t.offset == "zero":
            b.sub_rn(self.offset, _EIGHT, self.offset)
            b.mul_rn(self.offset, self.offset, self.scale)
        else:
            b.fma(self.offset, self.scale, _EIGHT, self.offset)

    def _widen_bfloat16(self, to: Register, word: Register, high: bool) -> None:
        if high:
            self.b.and_(self.v, word, _UPPER)
        else:
            self.b.shl(self.v, word, 16)
        self.b.mov(to, self.v)

    def add_scaled(self, value: Register, total: Register) -> None:
        """Adds a group's products to a value: `scale` times `number`, `offset` times their total.

        Beyond a row, sums are 0, and in the place of scales may lie anything.
        """
        pairs = [(self.number, self.scale)]
        if self.t.offset is not None:
            pairs.append((total, self.offset))
        for number, scale in pairs:
            if self.t.ragged:
                self.b.setp("ne", self.is_some, number, 0.0)
            with self.b.when(self.is_some if self.t.ragged else None):
                self.b.fma(value, number, scale, value)
