"""Activations as integers: two digits of 8 bits each, for products with integer weights.

The threads that hold a column's inputs share a scale s, a 16256th of the largest magnitude
among them, and every x becomes s * (256 * high + low), with high of -64 to 64 and low of -128 to
127: rounded to s, where bfloat16 rounds to x / 256. Of a few hundred inputs that is closer, unless
the largest is thousands of times the others; then its own rounding to bfloat16 would be worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax._src import core

from pallas_kernels.program import iota
from pallas_kernels.stream.ptx import lowered

__all__ = ["pack_digits", "packing_order", "unpack_digits"]

# Of 1024 products by weights of 8 bits, the sum is below 2^31.
LARGEST = 127 * 128
# So that nothing is divided by zero.
_SMALLEST = 1e-30
# A float32 to which an integer is added shows it in its lowest bits: here 128 more, so that the
# second byte is the high digit, and the first one is 128 more than the low one.
_MAGIC = "0f4B400080"


def packing_order(bits: int) -> list[int]:
    """Which of a read's inputs each byte of its digits belongs to, the lowest byte first.

    Weights of 8 bits lie in order. Of words of eight weights of 4 bits (`ffjax.packing`), the low
    nibbles of the bytes become one word of bytes and the high ones another.
    """
    if bits == 8:
        return list(range(16))
    return [8 * word + i for word in range(4) for i in (0, 4, 1, 5, 2, 6, 3, 7)]


_pack_digits_p = core.Primitive("ffjax_pack_digits")
_pack_digits_p.multiple_results = True


@_pack_digits_p.def_effectful_abstract_eval
def _(*values, order, halved):
    word = core.ShapedArray(values[0].shape, jnp.int32)
    scale = core.ShapedArray(values[0].shape, jnp.float32)
    return [*[word] * (len(values) // 2), scale], {lowered.ORDERED}


def _pack_digits_text(count: int, order: Sequence[int], halved: bool) -> str:
    """Operands: the words, the scale, then `count` values."""
    words = count // 2
    value = [f"${words + 1 + i}" for i in range(count)]
    lines = [
        "{ .reg .f32 %m, %n, %i, %y; .reg .b32 %a, %b, %c, %d; .reg .pred %odd;",
        f"abs.f32 %m, {value[0]};",
        *(f"abs.f32 %n, {x}; max.NaN.f32 %m, %m, %n;" for x in value[1:]),
        "mov.u32 %a, %laneid; and.b32 %a, %a, 4; setp.ne.u32 %odd, %a, 0;",
    ]
    for step in (1, 2, 4) if halved else (1, 2):
        lines.append(f"shfl.sync.bfly.b32 %n, %m, {step}, 31, 0xffffffff; max.NaN.f32 %m, %m, %n;")
    lines += [
        "max.NaN.f32 %m, %m, 0f0DA24260; rcp.approx.ftz.f32 %i, %m;",  # 1e-30
        f"mul.rn.f32 %i, %i, 0f467E0000; mul.rn.f32 ${words}, %m, 0f38810204;",  # 16256, 1 / 16256
    ]
    held = len(order)
    for word in range(0, count // 4):
        read, within = divmod(word, held // 4)
        for i, name in enumerate("abcd"):
            x = value[read * held + order[4 * within + i]]
            lines.append(f"fma.rn.f32 %y, {x}, %i, {_MAGIC}; mov.b32 %{name}, %y;")
        first = read * (held // 2) + within
        lines += [
            "prmt.b32 %a, %a, %b, 0x5140; prmt.b32 %c, %c, %d, 0x5140;",
            f"prmt.b32 ${first}, %a, %c, 0x7632; prmt.b32 %a, %a, %c, 0x5410;",
            f"xor.b32 ${first + held // 4}, %a, 0x80808080;",
        ]
        if halved:
            high, low = f"${first}", f"${first + held // 4}"
            lines += [
                f"selp.b32 %a, {high}, {low}, %odd; shfl.sync.bfly.b32 %b, %a, 4, 31, 0xffffffff;",
                f"selp.b32 {high}, %b, {high}, %odd; selp.b32 {low}, {low}, %b, %odd;",
            ]
    return " ".join([*lines, "}"])


@lowered.rule(_pack_digits_p)
def _(ctx, *args, order, halved):
    args = lowered.values(ctx, args)
    shape, words = ctx.avals_out[0].shape, len(args) // 2
    results = [lowered.like(shape, lowered.i32())] * words
    results.append(lowered.like(shape, lowered.f32()))
    constraints = ",".join(["=&r"] * words + ["=&f"] + ["f"] * len(args))
    text = _pack_digits_text(len(args), order, halved)
    return lowered.assembly(results, text, constraints, args)


def pack_digits(
    values: Sequence[Array],
    bits: int,
    *,
    halved: bool,
    interpret: bool,
    held: int | None = None,
) -> tuple[list[Array], Array]:
    """A column's inputs as digits.

    Args:
        values: float32 `[T]`, a thread's inputs in order, whole reads or halves of them.
        bits: of the weights they will be multiplied by.
        halved: whether pairs of columns share their reads: the first's threads hold the first
            half of each, and get the high digits of all of it; the second's get the low ones.
        interpret: whether the kernel is interpreted.
        held: inputs of a read that a thread holds; None: of 16 bytes of weights, or halves of them.

    Returns:
        Words, int32 `[T]`: of every read the high digits, then the low ones, four a word in
        `packing_order`; halved, one of the two. And the scale, float32 `[T]`, NaN where some value
        is.
    """
    order = _held_order(bits, halved, held)
    if not interpret:
        *words, scale = _pack_digits_p.bind(*values, order=tuple(order), halved=halved)
        return words, scale
    stacked, sharing = jnp.stack(values), 8 if halved else 4
    largest = jnp.abs(stacked).max(axis=0).reshape(-1, sharing).max(axis=1)
    largest = jnp.maximum(jnp.repeat(largest, sharing), _SMALLEST)
    whole = jnp.round(stacked / largest * LARGEST).astype(jnp.int32)
    high = lax.shift_right_arithmetic(whole + 128, 8)
    digits = [high & 0xFF, whole & 0xFF]
    words = []
    for read in range(0, len(values), len(order)):
        fours = [order[i : i + 4] for i in range(0, len(order), 4)]
        both = [[_word([digit[read + i] for i in four]) for four in fours] for digit in digits]
        words += _exchanged(*both) if halved else [*both[0], *both[1]]
    return words, largest / LARGEST


def _held_order(bits: int, halved: bool, held: int | None) -> list[int]:
    """The part of `packing_order` that a thread's inputs of a read have."""
    order = packing_order(bits)
    return order[: held or len(order) // (1 + halved)]


def _word(four: list[Array]) -> Array:
    """Four bytes, the lowest first."""
    a, b, c, d = (lax.shift_left(x, 8 * i) for i, x in enumerate(four))
    return a | b | c | d


def _exchanged(high: list[Any], low: list[Any]) -> list[Array]:
    """What both columns of a pair hold of a read, when each has given the other what it wants.

    It is its own inverse, but for the order of what is given and what is got.
    """
    odd = iota(high[0].shape, 0) & 4 != 0
    got = [_of_partner(jnp.where(odd, x, y)) for x, y in zip(high, low, strict=True)]
    first = [jnp.where(odd, x, y) for x, y in zip(got, high, strict=True)]
    return [*first, *(jnp.where(odd, x, y) for x, y in zip(low, got, strict=True))]


def _of_partner(word: Array) -> Array:
    """The word of the thread whose lane differs in the bit 4."""
    return jnp.flip(word.reshape(-1, 2, 4), axis=1).reshape(word.shape)


def unpack_digits(
    words: Sequence[Array], scale: Array, bits: int, *, halved: bool, held: int | None = None
) -> list[Array]:
    """The inverse of `pack_digits`, for interpret mode: float32 `[T]`, inputs in order."""
    order = _held_order(bits, halved, held)
    held, values = len(order), []
    for first in range(0, len(words), held // 2):
        some = list(words[first : first + held // 2])
        high, low = some[: held // 4], some[held // 4 :]
        if halved:
            some = _exchanged(high, low)
            high, low = some[: held // 4], some[held // 4 :]
        read: list[Array] = [scale] * held
        for byte, place in enumerate(order):
            shift = 24 - 8 * (byte % 4)
            digits = [
                lax.shift_right_arithmetic(lax.shift_left(x[byte // 4], shift), 24)
                for x in (high, low)
            ]
            read[place] = (256 * digits[0] + digits[1]).astype(jnp.float32) * scale
        values += read
    return values
