"""Attention over the cache's tiles that have come to shared memory."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax._src import core, state

from pallas_kernels.stream.ptx import lowered
from pallas_kernels.stream.ptx.attend_text import attend_lines
from pallas_kernels.stream.ptx.cache import CacheFeed, pointers

__all__ = ["attend_split"]

_attend_p = core.Primitive("ffjax_attend")


@_attend_p.def_effectful_abstract_eval
def _(keys, values, ring, parts, row, layer, *, feed, most):
    effects = {lowered.ORDERED, state.ReadEffect(0), state.ReadEffect(1)}
    return core.ShapedArray((1,), jnp.int32), effects


@lowered.rule(_attend_p)
def _(ctx, keys, values, *args, feed, most):
    lines = attend_lines(feed, "$3", "$1", "$2", "$4", "$5", "$6", most)
    text = " ".join(["{", *lines, "mov.u32 $0, 0; }"])
    arguments = [*pointers([keys, values]), *lowered.values(ctx, args)]
    result = lowered.like((1,), lowered.i32())
    return lowered.assembly([result], text, "=&r,l,l,r,r,r,r", arguments)[0]


def attend_split(
    keys: Any,
    values: Any,
    ring: Array,
    parts: Array,
    row: Array,
    layer: Array,
    feed: CacheFeed,
    most: int,
) -> None:
    """Attention of up to 8 queries over a part's positions, on tensor cores.

    Of 4 queries at most, even and odd positions are attended to apart, by the two rows of each: so
    no thread's work is for nothing, and keys and values need no second order.

    Queries, and the new position's key and value, lie in shared memory: a barrier stands before.
    Each warp has its own positions of every tile, and its own softmax, taken online; what it
    makes of them lies in shared memory when all are done. Tiles that have been used are asked for
    anew, as far as the layer has any.

    Args:
        keys: ref of the cache's keys.
        values: ref of its values.
        ring: int32 scalar, the ring's address.
        parts: int32 scalar, address of the rows of the layer's parts.
        row: int32 scalar, address of the row of this one.
        layer: int32 scalar.
        feed: the rest.
        most: how often to look whether a tile has come before the launch ends in an error.
    """
    scalars = [jnp.full((1,), x) for x in (ring, parts, row, layer)]
    _attend_p.bind(keys, values, *scalars, feed=feed, most=most)
