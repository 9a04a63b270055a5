"""Sums of a group's activations, for weights whose groups have an offset.

A weight of such a group is s * (n - 8) + o. What o adds to a row's product is o times the sum of
the group's activations: a number that all rows of the matrix share. So it is made once, when the
activations become digits: exactly, as whole numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax._src import core

from pallas_kernels.stream.ptx import lowered

__all__ = ["GroupSums", "sum_groups"]


@dataclasses.dataclass(frozen=True)
class GroupSums:
    """What summing up needs to know when it is traced.

    Attributes:
        reads: of each row, by a thread.
        by_sixteen: whether sums are stored as 16 times what they are, as the products of int4 are.
        chunked: whether the operand is that of one sequence.
        fine: whether groups are. Of one sequence, a chunk has several groups of each line then.
        threads: that take part, from the first on.
        products: of tensor cores, that a group of one sequence takes where groups are fine.
    """

    reads: int
    by_sixteen: bool
    chunked: bool
    fine: bool
    threads: int
    products: int = 1

    @property
    def pitch(self) -> int:
        """Bytes from the sums of a read to those of a thread's next one."""
        if not self.chunked:
            return 32
        return 64 if self.fine else 16


def _sum_text(s: GroupSums, words: int) -> str:
    """Operands: result $0, unused; address $1, then the operand's words."""
    if s.chunked and s.fine:
        return _fine_text(s, words)
    each = words // s.reads
    lines = [
        "{ .reg .pred %p, %odd; .reg .b32 %t, %s, %h; .reg .f32 %f; mov.u32 $0, 0;",
        f"mov.u32 %t, %tid.x; setp.ge.u32 %p, %t, {s.threads}; @%p bra idle;",
        # What is there may still be read by others of the warp.
        f"{lowered.REJOIN} mov.u32 %t, %laneid; and.b32 %h, %t, 4; setp.ne.u32 %odd, %h, 0;",
    ]
    # One thread stores what several have.
    mask = 7 if s.chunked else 3
    lines.append(f"and.b32 %h, %t, {mask}; setp.eq.u32 %p, %h, 0;")
    for q in range(s.reads):
        some = [f"${2 + q * each + i}" for i in range(each)]
        high, low = (some, []) if s.chunked else (some[: each // 2], some[each // 2 :])
        lines.append("mov.b32 %s, 0;")
        lines += [f"dp4a.s32.s32 %s, {word}, 0x01010101, %s;" for word in high]
        if s.chunked:  # every other four threads have the low digits
            lines.append("shl.b32 %h, %s, 8; selp.b32 %s, %s, %h, %odd;")
        else:
            lines.append("shl.b32 %s, %s, 8;")
            lines += [f"dp4a.s32.s32 %s, {word}, 0x01010101, %s;" for word in low]
        for step in [4] * s.chunked + [1, 2]:
            lines.append(f"shfl.sync.bfly.b32 %h, %s, {step}, 31, 0xffffffff; add.s32 %s, %s, %h;")
        if s.by_sixteen:
            lines.append("shl.b32 %s, %s, 4;")
        lines.append(f"cvt.rn.f32.s32 %f, %s; @%p st.shared.f32 [$1+{s.pitch * q}], %f;")
    return " ".join([*lines, f"{lowered.REJOIN} idle: }}"])


def _fine_text(s: GroupSums, words: int) -> str:
    """Of one sequence and groups that are fine; operands as those of `_sum_text`.

    A product by weights that are all the same number has the sums of each column's digits, in the
    threads that make use of them.
    """
    each, one = words // s.reads, "0x10101010" if s.by_sixteen else "0x01010101"
    lines = [
        "{ .reg .pred %p; .reg .b32 %t, %s, %one, %zero; mov.u32 $0, 0;",
        f"mov.u32 %t, %tid.x; setp.ge.u32 %p, %t, {s.threads}; @%p bra idle;",
        # What is there may still be read by others of the warp.
        f"{lowered.REJOIN} mov.u32 %t, %laneid; setp.lt.u32 %p, %t, 4;",
        f"mov.b32 %zero, 0; mov.b32 %one, {one};",
    ]
    for q in range(s.reads):
        sums = []
        for first in range(0, each, 2 * s.products):
            d = [f"%d{q}_{first}_{k}" for k in range(4)]
            lines.append(f".reg .b32 {', '.join(d)};")
            for word in range(first, first + 2 * s.products, 2):
                at = 2 + q * each + word
                before = ["%zero"] * 4 if word == first else d
                lines.append(
                    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                    f"{{{', '.join(d)}}}, {{%one, %one, %one, %one}}, {{${at}, ${at + 1}}}, "
                    f"{{{', '.join(before)}}};"
                )
            sums.append(f"%f{q}_{first}")
            lines.append(f".reg .f32 {sums[-1]}; mad.lo.s32 %s, {d[0]}, 256, {d[1]};")
            lines.append(f"cvt.rn.f32.s32 {sums[-1]}, %s;")
        some = f".v{len(sums)}.f32 [$1+{s.pitch * q}], {{{', '.join(sums)}}}"
        lines.append(f"@%p st.shared{some};")
    return " ".join([*lines, f"{lowered.REJOIN} idle: }}"])


_sum_p = core.Primitive("ffjax_sum_groups")


@_sum_p.def_effectful_abstract_eval
def _(address, *words, sums):
    return core.ShapedArray(address.shape, jnp.int32), {lowered.ORDERED}


@lowered.rule(_sum_p)
def _(ctx, *args, sums):
    args = lowered.values(ctx, args)
    result = lowered.like(ctx.avals_out[0].shape, lowered.i32())
    text, constraints = _sum_text(sums, len(args) - 1), "=&r" + ",r" * len(args)
    return lowered.assembly([result], text, constraints, args, by_warps=True)[0]


def sum_groups(address: Array, words: Sequence[Array], sums: GroupSums) -> Array:
    """Stores the sum of the activations of each group, in units of the operand's scale.

    Of a read of one sequence, 4 floats side by side for each of 4 chunks, where groups are fine:
    its groups of the line; else one for each chunk. Of several sequences, 8 floats: one for each.

    Args:
        address: int32 `[T]`, where in shared memory what each thread stores begins.
        words: int32 `[T]`, the operand, from `pack_digits`.
        sums: the rest.

    Returns:
        Nothing of use: a branch of a `cond` must have a result.
    """
    return _sum_p.bind(address, *words, sums=sums)
