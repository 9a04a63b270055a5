"""Gumbel noise of the tokens that may be drawn, in PTX: a warp skips those that may not.

The compiler makes noise for all tokens of a program or for none. Here a warp makes it for some of
its tokens at a time, if one of them may be drawn: where filters leave a few hundred tokens of a
vocabulary, next to nothing is left to do. Random bits are those of `pallas_kernels.draw.threefry`.
The logarithm has an error of less than 1.5 units in the last place, which XLA's has, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.asm import Block, Register, bits_of
from pallas_kernels.draw.threefry import PARITY, ROTATIONS, TINY
from pallas_kernels.inline_ptx.operation import Operation

__all__ = ["noisy"]

# Elements whose instructions alternate, so that one need not wait for another's result.
_SIDE_BY_SIDE = 2
# log(1 + f) is about f + f^2 (c_0 + c_1 f + ...) for f from -1/3 to 1/3. Fitted by least squares,
# weighted again and again towards where the relative error is greatest; it is 9e-8 in float32.
_LOG = (
    -0.49999940395355225,
    0.33333104848861694,
    -0.2500759959220886,
    0.20016059279441833,
    -0.16419349610805511,
    0.13920924067497253,
    -0.1537274271249771,
    0.14374099671840668,
)
_TWO_THIRDS = 0x3F2AAAAB  # the bits of 2/3
_EXPONENT = 0xFF800000
_NEVER = bits_of(-math.inf)


class _Token(NamedTuple):
    """A token while its noise is made.

    Attributes:
        may_be: predicate, whether it may be drawn.
        word: of a hash, or bits of a number.
        other: likewise.
        number: float32.
        sum: float32, of a polynomial.
        part: float32, of a logarithm.
    """

    may_be: Register
    word: Register
    other: Register
    number: Register
    sum: Register
    part: Register

    @classmethod
    def of(cls, b: Block) -> _Token:
        """Declares its registers."""
        words, floats = b.u32s("word", "other"), b.f32s("number", "sum", "part")
        return cls(b.pred("may_be"), *words, *floats)


class _Writer:
    """Writes what becomes of some tokens, whose instructions alternate."""

    def __init__(self, b: Block, tokens: Sequence[_Token], key: Sequence[Register]):
        self.b, self.tokens, self.key = b, tokens, key

    def hash(self, indices: Sequence[Register]) -> None:
        """The words of a hash of each index: Threefry's, of 20 rounds."""
        b, tokens, key = self.b, self.tokens, self.key
        for token in tokens:
            b.mov(token.word, key[0])
        for token, index in zip(tokens, indices, strict=True):
            b.add(token.other, index, key[1])
        for group in range(5):
            for by in ROTATIONS[group % 2]:
                for token in tokens:
                    b.add(token.word, token.word, token.other)
                for token in tokens:
                    b.shf_left(token.other, token.other, token.other, by)
                for token in tokens:
                    b.xor(token.other, token.other, token.word)
            for token in tokens:
                b.add(token.word, token.word, key[(group + 1) % 3])
            for token in tokens:
                b.add(token.other, token.other, key[(group + 2) % 3])
            for token in tokens:
                b.add(token.other, token.other, group + 1)

    def uniform(self) -> None:
        """Numbers from 0 to 1 by 23 bits of a hash; 0 is the least normal one."""
        b, tokens = self.b, self.tokens
        for token in tokens:
            b.xor(token.word, token.word, token.other)
        for token in tokens:
            b.shr(token.word, token.word, 9)
        for token in tokens:
            b.or_(token.word, token.word, bits_of(1.0))
        for token in tokens:
            b.mov(token.number, token.word)
        for token in tokens:
            b.add(token.number, token.number, -1.0)
        for token in tokens:
            b.max(token.number, token.number, float(TINY))

    def minus_log(self) -> None:
        """A number becomes its logarithm, negative; it is a normal number above 0."""
        b, tokens = self.b, self.tokens
        for token in tokens:
            b.mov(token.word, token.number)
        b.comment("A multiple of 2^23, so many times ln 2; and what is left of the number, less 1.")
        for token in tokens:
            b.sub(token.other, token.word, _TWO_THIRDS)
        for token in tokens:
            b.and_(token.other, token.other, _EXPONENT)
        for token in tokens:
            b.sub(token.word, token.word, token.other)
        for token in tokens:
            b.mov(token.number, token.word)
        for token in tokens:
            b.add(token.number, token.number, -1.0)
        for token in tokens:
            b.mov(token.sum, _LOG[-1])
        for factor in _LOG[-2::-1]:
            for token in tokens:
                b.fma(token.sum, token.sum, token.number, factor)
        for token in tokens:
            b.mul(token.part, token.number, token.number)
        for token in tokens:
            b.fma(token.number, token.sum, token.part, token.number)
        for token in tokens:
            b.to_float(token.part, token.other.as_("s32"))
        for token in tokens:
            b.fma(token.number, token.part, math.log(2) * 2.0**-23, token.number)
        for token in tokens:
            b.neg(token.number, token.number)


_Each = Sequence[Register]
"""Of an operand, or a result, a register for each of a thread's tokens."""


def _write_noisy(
    b: Block,
    noisy: _Each,
    logits: _Each,
    indices: _Each,
    first: _Each,
    second: _Each,
    temperature: _Each,
    least: _Each,
) -> None:
    b.warps_jump_whole = True  # whole warps do
    key = b.u32s("key", "key", "key")
    declared, anyone = [_Token.of(b) for _ in range(_SIDE_BY_SIDE)], b.pred("anyone")
    b.mov(key[0], first[0])
    b.mov(key[1], second[0])
    b.xor(key[2], key[0], key[1])
    b.xor(key[2], key[2], int(PARITY))
    for begin in range(0, len(logits), _SIDE_BY_SIDE):
        these = slice(begin, begin + _SIDE_BY_SIDE)
        some, out, over = logits[these], noisy[these], b.label("over")
        tokens = declared[: len(some)]
        for token, logit in zip(tokens, some, strict=True):
            b.setp("ge", token.may_be, logit.as_("f32"), least[0].as_("f32"))
        for result in out:
            b.mov(result, _NEVER)
        b.comment("A warp of which none may be drawn goes on to its next ones.")
        b.mov(anyone, tokens[0].may_be)
        for token in tokens[1:]:
            b.or_(anyone, anyone, token.may_be)
        b.vote_any(anyone, anyone)
        b.bra_unless(anyone, over)
        write = _Writer(b, tokens, key)
        write.hash(indices[these])
        write.uniform()
        write.minus_log()
        write.minus_log()
        for token, logit in zip(tokens, some, strict=True):
            scale = temperature[0].as_("f32")
            b.fma(token.number, scale, token.number, logit.as_("f32"))
        for token, result in zip(tokens, out, strict=True):
            b.selp(result, token.number, _NEVER, token.may_be)
        b.mark(over)
    b.comment("A label stands before an instruction.")
    b.mov(key[0], 0)


_noisy = Operation("ffjax_draw_noisy", _write_noisy)


def noisy(
    logits: Array,
    key: tuple[Array, Array],
    index: Array,
    temperature: Array,
    least: Array,
    together: int,
) -> Array:
    """Logits with noise, float32 `[1, W]`: `logits + temperature * gumbel(key, index)`.

    It is -inf where logits lie beneath the least one.

    Args:
        logits: float32 `[1, W]`, no NaN.
        key: a key's two words, uint32 scalars.
        index: int32 `[1, W]`.
        temperature: float32 scalar.
        least: float32 scalar.
        together: tokens that a thread has.
    """
    arrays = [logits, index, *key, temperature, least]
    arrays = [_bits(jnp.broadcast_to(x, logits.shape)) for x in arrays]
    [made] = _noisy(*arrays, results=["int32"], together=together)
    return lax.bitcast_convert_type(made, jnp.float32)


def _bits(x: Array) -> Array:
    return x if x.dtype == jnp.int32 else lax.bitcast_convert_type(x, jnp.int32)
