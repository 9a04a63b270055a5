"""Combines what several programs have made of a head's KV splits, once all of it has come.

Each of an element's `lanes` threads has every `lanes`-th split. A thread adds its own two by two,
and then the threads add theirs by butterfly shuffles. So the plan alone fixes the order of the
sums, whichever split comes first.
"""

from __future__ import annotations

from typing import Any

from jax import Array

from pallas_kernels.asm import Block, Register
from pallas_kernels.inline_ptx.operation import Operation, Pointer
from pallas_kernels.stream.ptx.attend_text import LOWEST
from pallas_kernels.stream.ptx.feed import Feed, write_feed
from pallas_kernels.stream.ptx.giving_up import LOST, Wait

__all__ = ["combine_splits"]


def _write_sum(b: Block, numbers: list[Register]) -> None:
    """Adds numbers two by two; the first register has the sum."""
    while len(numbers) > 1:
        for one, other in zip(numbers[::2], numbers[1::2], strict=False):
            b.add(one, one, other)
        numbers = numbers[::2]


def _write_combine(
    b: Block,
    element: Register,
    values: Register,
    sums: Register,
    there: Register,
    tag: Register,
    weights: Register,
    ring: Register,
    *,
    count: int,
    lanes: int,
    step: int,
    most: int,
    feed: Feed,
) -> None:
    wait = Wait(b, ring, feed, most)
    left, found, number, tagged = b.u32("left"), b.pred("found"), b.u32("number"), b.u32("tagged")
    # Pairs of a number and a tag, and the numbers: of each split a sum of weights, the maximum that
    # they are relative to, and the element's weighted sum.
    pairs = {x: [b.u64(f"{x}_pair") for _ in range(count)] for x in ("total", "top", "value")}
    totals, tops, parts = ([b.f32(x) for _ in range(count)] for x in ("total", "top", "value"))
    b.comment("What is not there counts as come.")
    for some in pairs.values():
        for pair in some:
            b.pack(pair, 0, tag)
    again = b.marked("again")
    for q, (total, top, value) in enumerate(zip(*pairs.values(), strict=True)):
        is_there = b.pred("is_there")
        b.setp("gt", is_there, there, q)
        with b.when(is_there):
            b.ld_relaxed([total, top], sums + 4 * step * q)
            b.ld_relaxed(value, values + 4 * step * q)
    b.comment("While the look is on its way.")
    write_feed(b, feed, ring, weights)
    b.mov(left, 0)
    for some in pairs.values():
        for pair in some:
            b.unpack(number, tagged, pair)
            b.xor(tagged, tagged, tag)
            b.or_(left, left, tagged)
    b.setp("eq", found, left, 0)
    wait.leave(found, wait.done)
    wait.look_again(again)
    b.mark(wait.missing)
    wait.give_up(sums, left)
    b.comment("The element is no number where the first split's sum of weights is none.")
    b.pack(pairs["total"][0], LOST, LOST)
    b.mark(wait.done)
    b.comment("Some that give up come by another way; what follows is done by whole warps.")
    b.bar_warp()

    largest, other = b.f32("largest"), b.f32("other")
    for q in range(count):
        for some, numbers in zip(pairs.values(), (totals, tops, parts), strict=True):
            b.unpack(number, tagged, some[q])
            b.mov(numbers[q], number)
        is_there = b.pred("is_there")
        b.setp("gt", is_there, there, q)
        b.selp(tops[q], tops[q], LOWEST, is_there)
        b.mov(other if q else largest, tops[q])
        if q:
            b.max(largest, largest, other)
    steps = [32 // lanes << i for i in range(lanes.bit_length() - 1)]
    for by in steps:
        b.shfl_bfly(other, largest, by)
        b.max(largest, largest, other)
    b.comment("Weights of splits: how much lower their own maximum was.")
    for total, top, part in zip(totals, tops, parts, strict=True):
        b.sub(top, top, largest)
        b.ex2(top, top)
        b.mul(total, total, top)
        b.mul(part, part, top)
    _write_sum(b, totals)
    _write_sum(b, parts)
    for by in steps:
        for whole in (totals[0], parts[0]):
            b.shfl_bfly(other, whole, by)
            b.add(whole, whole, other)
    b.div_full(element, parts[0], totals[0])


_combine = Operation("ffjax_combine", _write_combine)


def combine_splits(
    ref: Any,
    values: Array,
    sums: Array,
    there: Array,
    tag: Array,
    count: int,
    lanes: int,
    step: int,
    most: int,
    weights: Any,
    ring: Array,
    feed: Feed,
) -> Array:
    """Waits for some elements of a head's KV splits, and combines them, always in the same order.

    Some threads of a warp, its `32 / lanes`-th ones, have an element: each some of the KV splits.
    What a KV split is made of are pairs of a number and a tag of 32 bits.

    Args:
        ref: int32 array.
        values: int32 `[threads]`, where each thread's first KV split's weighted value lies: even
            numbers.
        sums: int32 `[threads]`, where the sum of its weights lies, and after it their maximum:
            multiples of 4.
        there: int32 `[threads]`, how many KV splits the thread has.
        tag: int32 scalar.
        count: KV splits of a thread at most.
        lanes: threads that have an element, a power of two.
        step: words from a thread's KV split to its next one, a multiple of 4.
        most: how often to load before the program gives up, a power of two: see `giving_up`.
        weights: as `ref` in `feed_ring`, which is done between two looks.
        ring: int32 scalar, as in `feed_ring`.
        feed: as in `feed_ring`.

    Returns:
        The element, float32 `[threads]`, in all of its threads; NaN where one of them gave up.
    """
    options = {"count": count, "lanes": lanes, "step": step, "most": most, "feed": feed}
    places = Pointer(ref, values), Pointer(ref, sums)
    operands = *places, there, tag, Pointer(weights), ring
    return _combine(*operands, results=["float32"], **options)[0]
