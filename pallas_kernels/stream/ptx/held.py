"""Fragments of words of two activations, in no more registers than the words take.

A thread of wide rows holds so many activations that there is no room for all of them as float32. It
holds the words instead, and parts them twice: to find the largest, and to make the fragments, each
piece's in the place of its words. Before that, `sum_squares` parts them for a norm's sake. The
norm's weights, too, are loaded twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax import Array

from pallas_kernels.asm import Block, Register
from pallas_kernels.inline_ptx.operation import Choice, Operation
from pallas_kernels.stream.half2 import HALF2_TAG_BITS, Format
from pallas_kernels.stream.plan import PIECE
from pallas_kernels.stream.ptx.digits import Digits, held_order
from pallas_kernels.stream.ptx.half2 import Parting
from pallas_kernels.stream.ptx.squares import Squares

__all__ = ["ONES", "NormRow", "pack_held", "pack_held_digits", "prefetch_pieces"]

# Words of a piece: of two activations, and of two of a norm's weights.
_WORDS = PIECE // 2
# Two bfloat16 of 1.
ONES = 0x3F803F80
# Of each of two numbers but a tag's bit and the sign.
_MAGNITUDES = 0x7FFF7FFF & ~HALF2_TAG_BITS


@dataclasses.dataclass(frozen=True)
class NormRow:
    """A norm's weights of the inputs that each thread holds.

    Attributes:
        weights: where those of its first piece begin, bfloat16.
        there: int32 `[threads]`, how many pieces have weights; the others' are 1. None: all have.
        places: elements from the first piece to each.
        more: float32 `[threads]`, which is added to every weight, and to ones; None where nothing
            is.
        squares: int32 scalar, the address that `sum_squares` has.
        warps: of the program.
    """

    weights: Choice
    there: Array | None
    places: Sequence[int]
    more: Array | None
    squares: Array
    warps: int

    @property
    def operands(self) -> list[Any]:
        """What a text is given of it."""
        return [self.weights, *(x for x in (self.there, self.more) if x is not None)]

    @property
    def text(self) -> _Norm:
        """What a text knows of it."""
        guarded, adds = self.there is not None, self.more is not None
        return _Norm(tuple(self.places), guarded, adds, self.warps)


@dataclasses.dataclass(frozen=True)
class _Norm:
    """What the text knows of a `NormRow`."""

    places: tuple[int, ...]
    guarded: bool  # whether some pieces may have no weights
    adds: bool  # whether something is added to them
    warps: int

    @property
    def count(self) -> int:
        """Of the operands."""
        return 1 + self.guarded + self.adds


class _Pieces:
    """The text that makes activations of a thread's words, 8 at a time."""

    def __init__(self, b: Block, form: Format, words: Sequence[Register], tag: Register):
        self._b, self._words, self._tag = b, words, tag
        self._parting = Parting(b, form)
        self._norm: _Norm | None = None
        self._address = tag  # these are set by `multiply_by`
        self._there: Register | None = None  # the first operand after it, if there are any
        self._more: Register | None = None  # the last one
        self._both: list[Register] = []

    def multiply_by(self, norm: _Norm, operands: Sequence[Register]) -> None:
        """Has activations multiplied by a norm's weights."""
        self._norm, (self._address, *more) = norm, operands
        self._there, self._more = (more[0], more[-1]) if more else (None, None)
        self._both = self._b.f32s("weight", "weight")

    def __len__(self) -> int:
        return len(self._words) // _WORDS

    def words_of(self, q: int) -> Sequence[Register]:
        """The q-th piece's."""
        return self._words[_WORDS * q : _WORDS * (q + 1)]

    def write(
        self,
        q: int,
        *,
        again: bool,
        scale: Register | None = None,
        squares: Squares | None = None,
    ) -> list[Register]:
        """The activations of the q-th piece.

        Args:
            q: which.
            again: whether words have been parted before. It is done by other instructions then:
                what two have in common, ptxas would keep from the first time on, activations as
                float32, and weights that it is told nobody writes.
            scale: what activations are multiplied by before the norm's weights are; None: nothing.
            squares: to which theirs are added, as they come; None: they are not.
        """
        b = self._b
        values = [b.f32("value") for _ in range(PIECE)]
        weights = self._load(q, again)
        for i, word in enumerate(self.words_of(q)):
            first, second = both = values[2 * i : 2 * i + 2]
            self._parting.write(first, second, word, self._tag if again else None)
            if squares is not None:
                squares.add(first)
                squares.add(second)
            if scale is not None:
                for value in both:
                    b.mul_rn(value, value, scale)
            if weights:
                self._multiply(both, weights[i])
        return values

    def _load(self, q: int, again: bool) -> list[Register]:
        """Words of two of the norm's weights; none where there is no norm."""
        if self._norm is None:
            return []
        b, words, is_there = self._b, self._b.u32s(*["weights"] * _WORDS), None
        load = b.ld_global if again else b.ld_global_nc
        if self._norm.guarded:
            for word in words:
                b.mov(word, ONES)
            assert self._there is not None
            is_there = b.pred("is_there")
            b.setp("gt", is_there, self._there, q)
        with b.when(is_there):
            load(words, self._address + 2 * self._norm.places[q])
        return words

    def _multiply(self, both: Sequence[Register], word: Register) -> None:
        """Multiplies two activations by the weights of a word."""
        assert self._norm is not None
        b, (low, high) = self._b, self._both
        b.shl(low.as_("u32"), word, 16)
        b.and_(high.as_("u32"), word, 0xFFFF0000)
        for value, weight in zip(both, self._both, strict=True):
            if self._norm.adds:
                assert self._more is not None
                b.add_rn(weight, weight, self._more)
            b.mul_rn(value, value, weight)


def _given(
    b: Block, operands: Sequence[Register], form: Format, count: int, norm: _Norm | None
) -> tuple[_Pieces, Sequence[Register]]:
    """What the words become, and what other operands there are.

    Args:
        b: the text.
        operands: the words and their tag, with a norm its own, and others.
        form: of the words.
        count: of them.
        norm: what activations are multiplied by; None: by nothing.
    """
    words, (tag, *others) = operands[:count], operands[count:]
    pieces = _Pieces(b, form, words, tag)
    if norm is None:
        return pieces, others
    pieces.multiply_by(norm, others[: norm.count])
    return pieces, others[norm.count :]


def _write_digits(
    b: Block,
    *registers: Register,
    count: int,
    order: tuple[int, ...],
    form: Format,
    norm: _Norm | None,
) -> None:
    """Results: the words, then the scale; with a norm, the sum of squares.

    Operands: see `_given`; with a norm, where the warps' sums of squares lie.
    """
    (*words, scale), given = registers[: count + 1], registers[count + 1 :]
    digits = Digits(b, scale, order, halved=False)
    if norm is None:
        pieces, _ = _given(b, given, form, count, None)
        _find_largest(b, pieces, digits.largest, form)
    else:
        total, given = given[0], given[1:]
        pieces, [address] = _given(b, given, form, count, norm)
        squares = Squares(b, 2 * count, norm.warps)
        for q in range(len(pieces)):
            for i, value in enumerate(pieces.write(q, again=False, squares=squares)):
                digits.look_at(value) if q or i else digits.largest_is_first(value)
        squares.write_total(total, address)
    digits.write_scale()
    for q in range(len(pieces)):
        values = pieces.write(q, again=True)
        for half in range(2):
            # Of four neighbouring words of digits, the inputs are those of one piece, or of two.
            four = 2 * q + half
            within = order[4 * four % len(order) :][:4]
            high, low = digits.places(words, four)
            digits.write_word(high, low, [values[i % PIECE] for i in within])


def _find_largest(b: Block, pieces: _Pieces, largest: Register, form: Format) -> None:
    """Of activations that nothing is done to: the largest of each half, and then of both.

    A half's magnitude grows with the activation's.
    """
    most, kept, first, second = *b.u32s("most", "magnitudes"), *b.f32s("first", "second")
    for q in range(len(pieces)):
        for i, word in enumerate(pieces.words_of(q)):
            b.and_(kept if q or i else most, word, _MAGNITUDES)
            if q or i:
                b.max_nan_halves(most, most, kept)
    Parting(b, form).write(first, second, most)
    b.max_nan(largest, first, second)


_pack_digits = Operation("ffjax_pack_held_digits", _write_digits)


def pack_held_digits(
    words: Sequence[Array],
    tag: Array,
    bits: int,
    form: Format,
    norm: NormRow | None = None,
    *,
    held: int,
) -> tuple[list[Array], Array, Array | None]:
    """Activations, perhaps times a norm's weights, as `pack_digits` makes digits of them.

    Args:
        words: int32 `[threads]`, of two activations, in order, 4 a piece.
        tag: int32 `[threads]`, what they carry, at its places.
        bits: of the weights they will be multiplied by.
        form: of the words.
        norm: whose weights the activations are multiplied by first; None: by nothing.
        held: inputs of a read that a thread holds.

    Returns:
        Words and scale, as of `pack_digits`, bit by bit; and with a norm, what `sum_squares` of the
        words returns.
    """
    made = _pack_digits(
        *(*words, tag),
        *([] if norm is None else [*norm.operands, norm.squares]),
        results=["int32"] * len(words) + ["float32"] * (1 if norm is None else 2),
        count=len(words),
        order=tuple(held_order(bits, False, held)),
        form=form,
        norm=None if norm is None else norm.text,
    )
    if norm is None:
        return made[:-1], made[-1], None
    return made[:-2], made[-2], made[-1]


def _write_halves(
    b: Block, *registers: Register, count: int, form: Format, norm: _Norm | None
) -> None:
    """Results: the words. Operands: see `_given`; with a norm, its scale."""
    words = registers[:count]
    pieces, scale = _given(b, registers[count:], form, count, norm)
    for q in range(len(pieces)):
        # Squares may have been summed before.
        values = pieces.write(q, again=True, scale=scale[0] if scale else None)
        for i in range(_WORDS):
            b.to_bf16x2(words[_WORDS * q + i], values[2 * i + 1], values[2 * i])


_pack_halves = Operation("ffjax_pack_held", _write_halves)


def pack_held(
    words: Sequence[Array],
    tag: Array,
    form: Format,
    norm: NormRow | None = None,
    scale: Array | None = None,
) -> list[Array]:
    """Activations, perhaps normed, as words of two bfloat16: int32 `[threads]`.

    Args:
        words: int32 `[threads]`, of two activations, in order, 4 a piece.
        tag: int32 `[threads]`, what they carry, at its places.
        form: of the words.
        norm: whose weights the activations are multiplied by; None: by nothing.
        scale: float32 `[threads]`, with a norm: what they are multiplied by before.
    """
    return _pack_halves(
        *(*words, tag),
        *([] if norm is None else norm.operands),
        *([] if scale is None else [scale]),
        results=["int32"] * len(words),
        count=len(words),
        form=form,
        norm=None if norm is None else norm.text,
    )


def _write_prefetch(
    b: Block, address: Register, there: Register, *, places: tuple[int, ...], counts: Sequence[int]
) -> None:
    for place, count in zip(places, counts, strict=True):
        is_there = b.pred("is_there")
        b.setp("gt", is_there, there, count)
        with b.when(is_there):
            b.prefetch_l2(address + 2 * place)


_prefetch = Operation("ffjax_prefetch_pieces", _write_prefetch)


def prefetch_pieces(
    row: Choice, there: Array, places: Sequence[int], counts: Sequence[int]
) -> None:
    """Asks for lines of bfloat16 into the L2 cache.

    Args:
        row: where each thread's first piece begins.
        there: int32 `[threads]`, a number of each thread's.
        places: elements from there to each piece that it asks for.
        counts: for each of these, the number that `there` must be above.
    """
    _prefetch(row, there, places=tuple(places), counts=tuple(counts))
