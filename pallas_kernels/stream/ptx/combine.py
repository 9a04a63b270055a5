"""Combines what several programs have made of a head's KV splits, as soon as it has come."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax._src import core, state

from pallas_kernels.stream.ptx import lowered
from pallas_kernels.stream.ptx.attend_text import LOWEST
from pallas_kernels.stream.ptx.feed import Feed, feed_lines
from pallas_kernels.stream.ptx.giving_up import LOST, REGISTERS, give_up, leave_line, look_again

__all__ = ["combine_splits"]


def _folded(operation: str, names: list[str]) -> list[str]:
    """Combines numbers two by two; the first register has the result."""
    lines, left = [], list(names)
    while len(left) > 1:
        for a, b in zip(left[::2], left[1::2], strict=False):
            lines.append(f"{operation}.f32 {a}, {a}, {b};")
        left = left[::2]
    return lines


def _combine_text(count: int, lanes: int, step: int, most: int, feed: Feed) -> str:
    """Operands: the result; addresses of the values and the sums; spans; tag; weights; ring."""
    values, sums, there, tag, weights, ring = (f"${i}" for i in range(1, 7))
    names = {x: [f"%{x}{q}" for q in range(count)] for x in ("a", "b", "c", "t", "m", "o")}
    lines = [
        f"{{ .reg .pred %p; .reg .b32 %n, %left, %x, %y; .reg .f32 {', '.join(names['t'])};",
        f".reg .f32 {', '.join(names['m'] + names['o'])}, %h, %top;",
        f".reg .b64 {', '.join(names['a'] + names['b'] + names['c'])}; {REGISTERS}",
        "mov.u32 %n, 0;",
    ]
    # What is not there counts as come.
    lines += [f"mov.b64 {x}, {{0, {tag}}};" for name in "abc" for x in names[name]]
    lines.append("again:")
    for q, (a, b, c) in enumerate(zip(names["a"], names["b"], names["c"], strict=True)):
        lines += [
            f"setp.gt.s32 %p, {there}, {q};",
            f"@%p ld.relaxed.gpu.global.v2.b64 {{{a}, {b}}}, [{sums}+{4 * step * q}];",
            f"@%p ld.relaxed.gpu.global.b64 {c}, [{values}+{4 * step * q}];",
        ]
    lines += [*feed_lines(feed, ring, weights), "mov.b32 %left, 0;"]
    for pair in names["a"] + names["b"] + names["c"]:
        lines.append(f"mov.b64 {{%y, %x}}, {pair}; xor.b32 %x, %x, {tag}; or.b32 %left, %left, %x;")
    lines += [
        "setp.eq.u32 %p, %left, 0;",
        leave_line("done"),
        *look_again("again", ring, feed, most),
    ]
    # The element is no number where the first span's sum of weights is none.
    lines += ["missing:", *give_up(sums, ring, feed), f"mov.b64 %a0, {{{LOST}, {LOST}}}; done:"]
    # Of those that give up, some come by another way; what follows is done by whole warps.
    lines.append(lowered.REJOIN)
    for q in range(count):
        for pair, number in (("a", "t"), ("b", "m"), ("c", "o")):
            lines.append(f"mov.b64 {{%y, %x}}, %{pair}{q}; mov.b32 %{number}{q}, %y;")
        lines.append(f"setp.gt.s32 %p, {there}, {q}; selp.f32 %m{q}, %m{q}, {LOWEST}, %p;")
        lines.append(f"mov.f32 %{'top' if q == 0 else 'h'}, %m{q};")
        if q:
            lines.append("max.f32 %top, %top, %h;")
    steps = [32 // lanes << i for i in range(lanes.bit_length() - 1)]
    for by in steps:
        lines.append(f"shfl.sync.bfly.b32 %h, %top, {by}, 31, 0xffffffff; max.f32 %top, %top, %h;")
    for q in range(count):
        lines += [
            f"sub.f32 %m{q}, %m{q}, %top; ex2.approx.ftz.f32 %m{q}, %m{q};",
            f"mul.f32 %t{q}, %t{q}, %m{q}; mul.f32 %o{q}, %o{q}, %m{q};",
        ]
    lines += [*_folded("add", names["t"]), *_folded("add", names["o"])]
    for by in steps:
        for name in ("%t0", "%o0"):
            lines.append(f"shfl.sync.bfly.b32 %h, {name}, {by}, 31, 0xffffffff;")
            lines.append(f"add.f32 {name}, {name}, %h;")
    lines.append("div.full.f32 $0, %o0, %t0; }")
    return " ".join(lines)


_combine_p = core.Primitive("ffjax_combine")


@_combine_p.def_effectful_abstract_eval
def _(ref, weights, values, *args, count, lanes, step, most, feed):
    effects = {lowered.ORDERED, state.ReadEffect(0), state.ReadEffect(1)}
    return core.ShapedArray(values.shape, jnp.float32), effects


@lowered.rule(_combine_p)
def _(ctx, ref, weights, *args, count, lanes, step, most, feed):
    values, sums, there, tag, ring = lowered.values(ctx, args)
    shape = ctx.avals_out[0].shape
    text = _combine_text(count, lanes, step, most, feed)
    pointer = lowered.spread(lowered.pointer(weights), list(shape))
    places = [lowered.addresses(ref, x, shape) for x in (values, sums)]
    result = lowered.like(shape, lowered.f32())
    arguments = [*places, there, tag, pointer, ring]
    return lowered.assembly([result], text, "=&f,l,l,r,r,l,r", arguments)[0]


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
        values: int32 `[T]`, where each thread's first KV split's weighted value lies: even numbers.
        sums: int32 `[T]`, where the sum of its weights lies, and behind it their maximum:
            multiples of 4.
        there: int32 `[T]`, how many KV splits the thread has.
        tag: int32 scalar.
        count: KV splits of a thread at most.
        lanes: threads that have an element, a power of two.
        step: words from a thread's KV split to its next one, a multiple of 4.
        most: how often to load before the program gives up, a power of two: see `giving_up`.
        weights: as `ref` in `feed_ring`, which is done between two looks.
        ring: int32 scalar, as in `feed_ring`.
        feed: as in `feed_ring`.

    Returns:
        The element, float32 `[T]`, in all of its threads; NaN where one of them gave up.
    """
    scalars = [jnp.full(values.shape, x) for x in (tag, ring)]
    options = {"count": count, "lanes": lanes, "step": step, "most": most, "feed": feed}
    return _combine_p.bind(ref, weights, values, sums, there, *scalars, **options)
