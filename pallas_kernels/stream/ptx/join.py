"""Joins what a program's warps have made of different positions, each by a softmax of its own."""

from __future__ import annotations

from typing import NamedTuple

from jax import Array

from pallas_kernels.asm import Block, Register
from pallas_kernels.inline_ptx.operation import Operation
from pallas_kernels.stream.ptx.attend_text import LOWEST

__all__ = ["Joined", "join_warps"]


class Joined(NamedTuple):
    """Float32 `[threads]` each.

    Attributes:
        top: the largest score, in base 2.
        total: the sum of the weights, which are relative to it.
        out: weighted values of neighbouring elements.
    """

    top: Array
    total: Array
    out: list[Array]


def _write_join(
    b: Block, *registers: Register, count: int, all_there: bool, step: int, out_step: int
) -> None:
    top, total, *out, sums, values, there = registers
    tops, totals = ([b.f32(x) for _ in range(count)] for x in ("warp_top", "warp_total"))
    parts = [[b.f32("warp_value") for _ in out] for _ in range(count)]
    for warp in range(count):
        made = [tops[warp], totals[warp]]
        if all_there:
            b.ld_shared(made, sums + step * warp)
            b.ld_shared(parts[warp], values + out_step * warp)
            continue
        is_there = b.pred("is_there")
        b.setp("gt", is_there, there, warp)
        b.mov(tops[warp], LOWEST)
        for number in (totals[warp], *parts[warp]):
            b.mov(number, 0.0)
        with b.when(is_there):
            b.ld_shared(made, sums + step * warp)
            b.ld_shared(parts[warp], values + out_step * warp)
    b.mov(top, tops[0])
    for other in tops[1:]:
        b.max(top, top, other)
    for warp in range(count):
        weight = tops[warp]
        b.sub(weight, weight, top)
        b.ex2(weight, weight)
        for to, number in zip((total, *out), (totals[warp], *parts[warp]), strict=True):
            if warp == 0:
                b.mul(to, number, weight)
            else:
                b.fma(to, number, weight, to)


_join = Operation("ffjax_join_warps", _write_join)


def join_warps(
    sums: Array,
    values: Array,
    there: Array | None,
    width: int,
    count: int,
    step: int,
    out_step: int,
) -> Joined:
    """Each thread joins some neighbouring elements of a query, of all warps, always in this order.

    Args:
        sums: int32 `[threads]`, where in shared memory the first warp's maximum lies, and after
            it its sum: multiples of 8.
        values: int32 `[threads]`, where the first of its weighted values lies: multiples of
            4 * `width`.
        there: int32 scalar, how many warps have made something; None: all have.
        width: elements of a thread, 2 or 4.
        count: warps at most.
        step: bytes from a warp's maximum to the next one's.
        out_step: bytes from its values to the next one's.
    """
    top, total, *out = _join(
        sums,
        values,
        count if there is None else there,
        results=["float32"] * (2 + width),
        early=False,
        count=count,
        all_there=there is None,
        step=step,
        out_step=out_step,
    )
    return Joined(top, total, out)
