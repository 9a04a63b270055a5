"""The exchange's buffers read back after a step, in the specification's shapes.

Every buffer is written once a layer, so what lies there after a step is that of its last layer. A
word says by its tag whether it is: one that was not written, or in another layer, reads as NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pallas_kernels.stream.exchange_layout import Layout
from pallas_kernels.stream.exchange_order import word_in_exchange
from pallas_kernels.stream.plan import Segment, StreamPlan

__all__ = ["Handed", "read_exchange"]

_RESIDUAL_UNIT = 32.0
_TAG_BITS, _HALF2_TAG_BITS = 0xFF, 0x00010001


class Handed(NamedTuple):
    """A buffer as it was read.

    Attributes:
        values: float32, or int32 of `best_token`; NaN, or -1, where the word has another tag.
        there: bool, the same shape: whether the word has the tag of this layer.
    """

    values: np.ndarray
    there: np.ndarray


def read_exchange(plan: StreamPlan, counters: np.ndarray, step: int) -> dict[str, Handed]:
    """What a step's last layer, and its head, have handed over.

    Args:
        plan: the step's.
        counters: int32, the cache's, after the step.
        step: how many steps had been finished before it.

    Returns:
        By the names of `segments.NAMES`: `x_in`, `qkv`, `parts`, `attn`, `x_mid`, `ffw`, `x_out`,
        `best` and `best_token`; where there are such, `attn_block`, `ffw_block`, `partial` and
        `ffw_copy`.
    """
    return dict(_read(plan, np.asarray(counters), step))


def _read(plan: StreamPlan, words: np.ndarray, step: int) -> Iterator[tuple[str, Handed]]:
    d, down = plan.dims, plan.segments[Segment.DOWN]
    layout = Layout.of(d, down.splits, plan.attention.max_splits, plan.programs)
    tag = step * (d.num_layers + 1) + d.num_layers  # of the last layer
    for name, start, reader, shown, root in (
        ("x_in", layout.x_in, Segment.QKV, tag, False),
        ("attn", layout.attn, Segment.ATTN_OUT, tag, True),
        ("x_mid", layout.x_mid, Segment.GATE_UP, tag, False),
        ("ffw", layout.ffw, Segment.DOWN, tag, True),
        ("x_out", layout.x_head, Segment.HEAD, step + 1, False),
    ):
        yield name, _activations(plan, words, start, reader, shown, root)
    if plan.tuning.hidden_copies == 2:
        yield "ffw_copy", _activations(plan, words, layout.ffw_copy, Segment.DOWN, tag, True)
    if d.features.post_norm:
        for name in ("attn_block", "ffw_block"):
            start = getattr(layout, name)
            yield name, _activations(plan, words, start, Segment.QKV, tag, False)
    shape = d.columns, d.num_heads + 2 * d.num_kv_heads, d.head_dim
    yield "qkv", _words(words[layout.qkv :][: d.columns * d.qkv_dim].reshape(shape), tag)
    shape = d.columns, d.num_heads, plan.attention.max_splits, d.head_dim + 2
    yield "parts", _pairs(words, layout.parts, shape, tag)
    if down.splits > 1:
        shape = d.columns, d.model_dim, down.splits
        yield "partial", _pairs(words, layout.partial, shape, tag)
    best = _pairs(words, layout.best, (plan.programs, d.columns, 2), tag + 1)
    yield "best", Handed(best.values[..., 0], best.there[..., 0])
    token = np.where(best.there[..., 1], best.values[..., 1].view(np.int32), -1)
    yield "best_token", Handed(token, best.there[..., 1])


def _activations(
    plan: StreamPlan, words: np.ndarray, start: int, reader: Segment, tag: int, root: bool
) -> Handed:
    """What every program reads, `[C, in]`, in the order in which warps load it."""
    part = plan.segments[reader]
    column, element = np.arange(plan.dims.columns)[:, None], np.arange(part.inner)
    at = start + word_in_exchange(plan, part, column, element)
    found = words[np.broadcast_to(at, (plan.dims.columns, part.inner))]
    if not plan.half2:
        return _words(found, tag)
    there = (found ^ (tag & 3) * 0x8001) & _HALF2_TAG_BITS == 0
    bits = (found.view(np.uint32) >> (16 * (element & 1)).astype(np.uint32)) & 0xFFFE
    half = bits.astype(np.uint16).view(np.float16).astype(np.float32)
    x = half * np.abs(half) if root else half * np.float32(_RESIDUAL_UNIT)
    return Handed(np.where(there, x, np.float32(np.nan)), there)


def _words(found: np.ndarray, tag: int) -> Handed:
    there = (found ^ tag) & _TAG_BITS == 0
    return Handed(np.where(there, (found & ~_TAG_BITS).view(np.float32), np.float32(np.nan)), there)


def _pairs(words: np.ndarray, start: int, shape: tuple[int, ...], tag: int) -> Handed:
    """Numbers of 32 bits, each followed by its tag, which is odd."""
    both = words[start:][: 2 * int(np.prod(shape))].reshape(*shape, 2)
    there = both[..., 1] == np.array(2 * tag + 1).astype(np.int32)
    values = np.ascontiguousarray(both[..., 0]).view(np.float32)
    return Handed(np.where(there, values, np.float32(np.nan)), there)
