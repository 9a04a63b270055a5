"""Gumbel noise of the tokens that may be drawn, in PTX: a warp skips those that may not.

The compiler makes noise for all tokens of a program or for none. Here a warp makes it for some of
its tokens at a time, if one of them may be drawn: where filters leave a few hundred tokens of a
vocabulary, next to nothing is left to do. Random bits are those of `pallas_kernels.draw.threefry`.
The logarithm has an error of less than 1.5 units in the last place, which XLA's has, too.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.draw.threefry import PARITY, ROTATIONS, TINY
from pallas_kernels.primitives import ORDERED, effectful, made
from pallas_kernels.stream.ptx import lowered

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


def _f32(x: float | np.float32) -> str:
    """A literal."""
    return f"0f{int(np.float32(x).view(np.uint32)):08X}"


def _hash_lines(index: str) -> list[str]:
    """%x and %y from a counter; the key's words are %k0, %k1 and %k2."""
    lines = ["mov.b32 %x, %k0;", f"add.u32 %y, {index}, %k1;"]
    for group in range(5):
        for by in ROTATIONS[group % 2]:
            lines += [
                "add.u32 %x, %x, %y;",
                f"shf.l.wrap.b32 %y, %y, %y, {by};",
                "xor.b32 %y, %y, %x;",
            ]
        lines += [
            f"add.u32 %x, %x, %k{(group + 1) % 3};",
            f"add.u32 %y, %y, %k{(group + 2) % 3};",
            f"add.u32 %y, %y, {group + 1};",
        ]
    return lines


def _log_lines() -> list[str]:
    """%f becomes its logarithm; it is a normal number above 0."""
    c = [_f32(x) for x in _LOG]
    return [
        "mov.b32 %x, %f;",
        # %y is a multiple of 2^23, so many times ln 2, and %f is what is left of it, less 1.
        f"sub.u32 %y, %x, {_TWO_THIRDS};",
        f"and.b32 %y, %y, {_EXPONENT};",
        "sub.u32 %x, %x, %y;",
        "mov.b32 %f, %x;",
        f"add.f32 %f, %f, {_f32(-1)};",
        f"mov.b32 %g, {c[-1]};",
        *(f"fma.rn.f32 %g, %g, %f, {one};" for one in c[-2::-1]),
        "mul.f32 %h, %f, %f;",
        "fma.rn.f32 %f, %g, %h, %f;",
        "cvt.rn.f32.s32 %h, %y;",
        f"fma.rn.f32 %f, %h, {_f32(math.log(2) * 2.0**-23)}, %f;",
    ]


def _noisy_lines(result: str, logit: str, index: str, temperature: str) -> list[str]:
    return [
        *_hash_lines(index),
        # A number from 0 to 1 by 23 bits; 0 is the least normal one.
        "xor.b32 %x, %x, %y;",
        "shr.u32 %x, %x, 9;",
        "or.b32 %x, %x, 0x3f800000;",
        "mov.b32 %f, %x;",
        f"add.f32 %f, %f, {_f32(-1)};",
        f"max.f32 %f, %f, {_f32(TINY)};",
        *_log_lines(),
        "neg.f32 %f, %f;",
        *_log_lines(),
        "neg.f32 %f, %f;",
        f"fma.rn.f32 %f, {temperature}, %f, {logit};",
        f"selp.b32 {result}, %f, {_f32(-np.inf)}, %p;",
    ]


def _text(k: int) -> str:
    """Operands: k results, k of each: logits, indices, 2 words of the key, temperature, least."""

    def of(argument: int, i: int = 0) -> str:
        return f"${(1 + argument) * k + i}"

    lines = [
        f"{{ .reg .pred %p<{_SIDE_BY_SIDE}>, %q; .reg .b32 %k<3>;",
        f".reg .b32 %x<{_SIDE_BY_SIDE}>, %y<{_SIDE_BY_SIDE}>;",
        f".reg .f32 %f<{_SIDE_BY_SIDE}>, %g<{_SIDE_BY_SIDE}>, %h<{_SIDE_BY_SIDE}>;",
        f"mov.b32 %k0, {of(2)}; mov.b32 %k1, {of(3)};",
        f"xor.b32 %k2, %k0, %k1; xor.b32 %k2, %k2, {PARITY};",
    ]
    for first in range(0, k, _SIDE_BY_SIDE):
        these = range(first, min(k, first + _SIDE_BY_SIDE))
        lines += [f"setp.ge.f32 %p{i - first}, {of(0, i)}, {of(5)};" for i in these]
        lines += [f"mov.b32 ${i}, {_f32(-np.inf)};" for i in these]
        lines.append("mov.pred %q, %p0;")
        lines += [f"or.pred %q, %q, %p{i - first};" for i in these[1:]]
        lines.append(f"vote.sync.any.pred %q, %q, 0xffffffff; @!%q bra over{first};")
        each = [_noisy_lines(f"${i}", of(0, i), of(1, i), of(4)) for i in these]
        for step in zip(*each, strict=True):
            lines += [_numbered(line, number) for number, line in enumerate(step)]
        lines.append(f"over{first}:")
    # A label stands before an instruction.
    lines.append("mov.b32 %k0, 0; }")
    return " ".join(lines)


def _numbered(line: str, number: int) -> str:
    """With the registers of one of the elements side by side."""
    for register in "xyfghp":
        line = line.replace(f"%{register}", f"%{register}{number}")
    return line


_noisy_p = effectful(
    "ffjax_draw_noisy", lambda x, *_, **__: (made(x.shape, jnp.int32), {ORDERED}), results=False
)


@lowered.rule(_noisy_p)
def _(ctx, *args, together):
    arguments = lowered.values(ctx, args)
    constraints = ",".join(["=&r"] * together + ["r"] * (together * len(arguments)))
    result = lowered.like(ctx.avals_out[0].shape, lowered.i32())
    # Whole warps jump.
    text = _text(together)
    return lowered.assembly([result], text, constraints, arguments, together, by_warps=True)[0]


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
    return lax.bitcast_convert_type(_noisy_p.bind(*arrays, together=together), jnp.float32)


def _bits(x: Array) -> Array:
    return x if x.dtype == jnp.int32 else lax.bitcast_convert_type(x, jnp.int32)
