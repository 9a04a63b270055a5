"""Sums of a group's activations, for weights whose groups have an offset.

A weight of such a group is s * (n - 8) + o. What o adds to a row's product is o times the sum of
the group's activations: a number that all rows of the matrix share. So it is made once, when the
activations become digits: exactly, as whole numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax import Array

from pallas_kernels.asm import LANE, TID, Block, Register
from pallas_kernels.inline_ptx.operation import Operation

__all__ = ["GroupSums", "sum_groups"]

# A word of four bytes that are 1.
_ONES = 0x01010101


@dataclasses.dataclass(frozen=True)
class GroupSums:
    """What summing up needs to know when it is traced.

    Attributes:
        reads: of each row, by a thread.
        by_sixteen: whether sums are stored as 16 times what they are, as the products of int4 are.
        chunked: whether the activations are those of one sequence.
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


def _write_sums(b: Block, address: Register, *words: Register, sums: GroupSums) -> None:
    s, thread, idle, is_idle = sums, b.u32("thread"), b.label("idle"), b.pred("is_idle")
    b.warps_jump_whole = True
    b.mov(thread, TID)
    b.setp("ge", is_idle, thread, s.threads)
    b.bra_if(is_idle, idle)
    b.comment("What is there may still be read by others of the warp.")
    b.bar_warp()
    # The lane comes in the thread's place.
    write = _write_fine if s.chunked and s.fine else _write_each
    write(b, address, words, s, thread)
    b.bar_warp()
    b.mark(idle)


def _write_each(
    b: Block, address: Register, words: Sequence[Register], s: GroupSums, lane: Register
) -> None:
    """Where threads have digits of whole groups: the sums of several threads are added up."""
    each, total, more = len(words) // s.reads, b.u32("total"), b.u32("more")
    odd, stores, number = b.pred("odd"), b.pred("stores"), b.f32("number")
    b.mov(lane, LANE)
    b.and_(more, lane, 4)
    b.setp("ne", odd, more, 0)
    b.comment("One thread stores what several have.")
    b.and_(more, lane, 7 if s.chunked else 3)
    b.setp("eq", stores, more, 0)
    for q in range(s.reads):
        some = words[q * each : (q + 1) * each]
        high, low = (some, ()) if s.chunked else (some[: each // 2], some[each // 2 :])
        b.mov(total, 0)
        for word in high:
            b.dp4a(total, word, _ONES, total)
        if s.chunked:
            b.comment("Every other four threads have the low digits.")
            b.shl(more, total, 8)
            b.selp(total, total, more, odd)
        else:
            b.shl(total, total, 8)
            for word in low:
                b.dp4a(total, word, _ONES, total)
        for step in [4] * s.chunked + [1, 2]:
            b.shfl_bfly(more, total, step)
            b.add(total, total, more)
        if s.by_sixteen:
            b.shl(total, total, 4)
        b.to_float(number, total.as_("s32"))
        with b.when(stores):
            b.st_shared(address + s.pitch * q, number)


def _write_fine(
    b: Block, address: Register, words: Sequence[Register], s: GroupSums, lane: Register
) -> None:
    """Of one sequence and groups that are fine.

    A product by weights that are all the same number has the sums of each column's digits, in the
    threads that make use of them.
    """
    each, total, one, zero = len(words) // s.reads, *b.u32s("total", "one", "zero")
    stores = b.pred("stores")
    b.mov(lane, LANE)
    b.setp("lt", stores, lane, 4)
    b.mov(zero, 0)
    b.mov(one, 16 * _ONES if s.by_sixteen else _ONES)
    for q in range(s.reads):
        numbers = []
        for first in range(0, each, 2 * s.products):
            sums = b.u32s(*["sum"] * 4)
            for word in range(first, first + 2 * s.products, 2):
                at = q * each + word
                before = [zero] * 4 if word == first else sums
                b.mma_s8(sums, [one] * 4, words[at : at + 2], before)
            numbers.append(b.f32("number"))
            b.mad_lo(total.as_("s32"), sums[0], 256, sums[1])
            b.to_float(numbers[-1], total.as_("s32"))
        with b.when(stores):
            b.st_shared(address + s.pitch * q, numbers)


_sum_groups = Operation("ffjax_sum_groups", _write_sums)


def sum_groups(address: Array, words: Sequence[Array], sums: GroupSums) -> Array:
    """Stores the sum of the activations of each group, in units of the activations' scale.

    Of a read of one sequence, 4 floats side by side for each of 4 chunks, where groups are fine:
    its groups of the line; else one for each chunk. Of several sequences, 8 floats: one for each.

    Args:
        address: int32 `[threads]`, where in shared memory what each thread stores begins.
        words: int32 `[threads]`, the activations, from `pack_digits`.
        sums: the rest.

    Returns:
        Nothing of use: a branch of a `cond` must have a result.
    """
    return _sum_groups(address, *words, sums=sums)[0]
