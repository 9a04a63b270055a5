"""Attention over the cache's tiles that have come to shared memory."""

from __future__ import annotations

from typing import Any

from jax import Array

from pallas_kernels.inline_ptx.operation import Operation, Pointer
from pallas_kernels.stream.ptx.attend_text import write_attention
from pallas_kernels.stream.ptx.cache import CacheFeed

__all__ = ["attend_split"]

_attend = Operation("ffjax_attend", write_attention)


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
    _attend(Pointer(keys), Pointer(values), ring, parts, row, layer, feed=feed, most=most)
