"""Where in memory a tile begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.inline_ptx import lowered
from pallas_kernels.primitives import made, pure

__all__ = ["UNIT", "Begin", "begin_words"]

UNIT = 16
"""Bytes of which every copy is a multiple."""


class Begin(NamedTuple):
    """Where a tile of the first layer begins: int32.

    An address: `low` and `high` are the halves of its distance from a base, and `stride` is a
    layer's length, all in units: 16 bytes, or `StreamPlan.scale_unit` of scales. Interpreted,
    arrays have no addresses: `low` is the distance in the array, and `high` the array's number.
    """

    low: Array
    high: Array
    stride: Array


_begin_words_p = pure("ffjax_begin_words", lambda *args, **_: [made(args[-1].shape, jnp.int32)] * 3)


@lowered.rule(_begin_words_p)
def _(ctx, base, *args, strides, unit):
    *beyond, start = lowered.values(ctx, args[len(strides) :])
    shape = list(ctx.avals_out[0].shape)
    wide = lowered.like(shape, lowered.i64())

    def constant(value: int, element: Any) -> Any:
        return lowered.spread(lowered.arith.constant(element, value), shape)

    base, *addresses = (lowered.pointer(x) for x in (base, *args[: len(strides)]))
    chosen = lowered.spread(lowered.arith.subi(addresses[0], base), shape)
    stride = constant(strides[0], lowered.i32())
    for condition, address, size in zip(beyond, addresses[1:], strides[1:], strict=True):
        distance = lowered.spread(lowered.arith.subi(address, base), shape)
        chosen = lowered.arith.select(condition, distance, chosen)
        stride = lowered.arith.select(condition, constant(size, lowered.i32()), stride)
    # Arrays begin at multiples of a unit.
    chosen = lowered.arith.shrsi(chosen, constant(unit.bit_length() - 1, lowered.i64()))
    chosen = lowered.arith.addi(chosen, lowered.arith.extsi(wide, start))
    low = lowered.arith.trunci(lowered.like(shape, lowered.i32()), chosen)
    high = lowered.arith.trunci(
        lowered.like(shape, lowered.i32()), lowered.arith.shrsi(chosen, constant(32, lowered.i64()))
    )
    return [low, high, stride]


def begin_words(
    base: Any,
    refs: Sequence[Any],
    strides: Sequence[int],
    beyond: Sequence[Array],
    start: Array,
    *,
    unit: int,
    interpret: bool,
) -> list[Array]:
    """The three fields of the `Begin` of some tiles, int32 `[threads]` each.

    Args:
        base: array from whose beginning distances count.
        refs: arrays of weights, or of scales.
        strides: units of a layer of each; 0 where there are no layers.
        beyond: bool `[threads]`, one for each array but the first: the last array whose condition
            holds is the tile's, or the first.
        start: int32 `[threads]`, where in a layer's matrix the tiles begin, in units.
        unit: bytes, a power of two, at a multiple of which every array begins.
        interpret: whether the kernel is interpreted.
    """
    if interpret:
        which, stride = jnp.zeros_like(start), jnp.full_like(start, strides[0])
        for number, condition in enumerate(beyond, start=1):
            which = jnp.where(condition, number, which)
            stride = jnp.where(condition, strides[number], stride)
        return [start, which, stride]
    return _begin_words_p.bind(base, *refs, *beyond, start, strides=tuple(strides), unit=unit)
