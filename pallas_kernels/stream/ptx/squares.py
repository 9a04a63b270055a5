"""Sums of squares of several sequences, for the norm that stands in the way of every product."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax._src import core

from pallas_kernels.stream.plan import QUAD
from pallas_kernels.stream.ptx import lowered

__all__ = ["sum_squares"]

# Sums that grow side by side: each addition waits for the one before it.
_CHAINS = 4

_sum_squares_p = core.Primitive("ffjax_sum_squares")


@_sum_squares_p.def_effectful_abstract_eval
def _(address, *values, warps):
    return core.ShapedArray(values[0].shape, jnp.float32), {lowered.ORDERED}


def _sum_squares_text(count: int, warps: int) -> str:
    """Operands: the sum, the address, then `count` values."""
    chains = min(_CHAINS, count)
    sums = [f"%s{i}" for i in range(max(chains, warps))]
    lines = [f"{{ .reg .f32 {', '.join(sums)}, %h; .reg .b32 %l, %a; .reg .pred %p;"]
    for i in range(count):
        x, to = f"${2 + i}", sums[i % chains]
        lines.append(
            f"mul.rn.f32 {to}, {x}, {x};" if i < chains else f"fma.rn.f32 {to}, {x}, {x}, {to};"
        )
    lines += _added(sums[:chains])
    for step in (1, 2):
        lines.append(f"shfl.sync.bfly.b32 %h, %s0, {step}, 31, 0xffffffff; add.f32 %s0, %s0, %h;")
    # A sequence's sums of all warps lie side by side.
    lines += [
        "mov.u32 %l, %laneid; shr.u32 %a, %l, 2;",
        f"mad.lo.u32 %a, %a, {4 * warps}, $1; and.b32 %l, %l, {QUAD - 1};",
        "setp.eq.u32 %p, %l, 0; mov.u32 %l, %tid.x; shr.u32 %l, %l, 5;",
        f"mad.lo.u32 %l, %l, 4, %a; @%p st.shared.f32 [%l], %s0; {lowered.MEET}",
    ]
    for first in range(0, warps, 4):
        lines.append(
            f"ld.shared.v4.f32 {{{', '.join(sums[first : first + 4])}}}, [%a+{4 * first}];"
        )
    return " ".join([*lines, *_added(sums[:warps]), "mov.f32 $0, %s0; }"])


def _added(names: list[str]) -> list[str]:
    """Adds them up, two by two, into the first."""
    lines, apart = [], 1
    while apart < len(names):
        lines += [
            f"add.f32 {names[i]}, {names[i]}, {names[i + apart]};"
            for i in range(0, len(names) - apart, 2 * apart)
        ]
        apart *= 2
    return lines


@lowered.rule(_sum_squares_p)
def _(ctx, *args, warps):
    args = lowered.values(ctx, args)
    text = _sum_squares_text(len(args) - 1, warps)
    result = lowered.like(ctx.avals_out[0].shape, lowered.f32())
    constraints = "=&f,r" + ",f" * (len(args) - 1)
    return lowered.assembly([result], text, constraints, args)[0]


def sum_squares(address: Array, values: Sequence[Array], warps: int) -> Array:
    """The sum of the squares of each thread's sequence, always in the same order: float32 `[T]`.

    The barrier in it is not enough for a second call at once: another must stand between.

    Args:
        address: int32 scalar, a multiple of 16: 4 bytes a sequence and warp of shared memory.
        values: float32 `[T]`. Each 4 neighbouring threads of every warp have the same sequence's.
        warps: of the program, 4 or 8.
    """
    addresses = jnp.full(values[0].shape, address)
    return _sum_squares_p.bind(addresses, *values, warps=warps)
