"""A cache's exchange after so many steps, but for what its words say.

Tags are what the last hand-over left. What words say is no number, so that whoever takes a stale
one for a fresh one is found out.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.stream.exchange_layout import Layout
from pallas_kernels.stream.exchange_order import word_in_exchange
from pallas_kernels.stream.half2 import HALF2_TAG_BITS, half2_tag
from pallas_kernels.stream.plan import Segment, StreamPlan

from .handovers import HALF2, HEAD_APART, PAIRS, WORDS, Protocol
from .shares import Shares

__all__ = ["Poison", "aged_counters", "poison_of"]

_NAN = 0x7FC00000
_TAG = 0xFF
# Who reads a buffer decides in which order its activations lie, and how many there are.
_READERS = {
    "x_in": Segment.QKV,
    "x_head": Segment.HEAD,
    "x_mid": Segment.GATE_UP,
    "attn": Segment.ATTN_OUT,
    "ffw": Segment.DOWN,
    "ffw_copy": Segment.DOWN,
    "attn_block": Segment.QKV,
    "ffw_block": Segment.QKV,
}


class Poison(NamedTuple):
    """What is done to each word of the exchange: `word & keep | set`, int32."""

    keep: np.ndarray
    set: np.ndarray


def _activations(plan: StreamPlan, start: int, reader: Segment) -> np.ndarray:
    """Words of a buffer that all activations of all tokens are handed over in."""
    part = plan.segments[reader]
    column, e = np.mgrid[: plan.dims.columns, : part.inner]
    return np.unique(start + word_in_exchange(plan, part, column, e))


def _words(plan: StreamPlan, layout: Layout, protocol: Protocol) -> dict[str, np.ndarray]:
    """The words of each buffer that every step writes; of pairs, where the values lie."""
    d, down = plan.dims, plan.segments[Segment.DOWN]
    used = {"x_in", "x_mid", "attn", "ffw", protocol.head}
    if plan.tuning.hidden_copies == 2:
        used.add("ffw_copy")
    if d.features.post_norm:
        used |= {"attn_block", "ffw_block"}
    words = {
        name: _activations(plan, getattr(layout, name), _READERS[name])
        for name in HALF2
        if name in used
    }
    words["qkv"] = layout.qkv + np.arange(d.columns * d.qkv_dim)
    pairs = d.columns * d.model_dim * down.splits if down.splits > 1 else 0
    words["partial"] = layout.partial + 2 * np.arange(pairs)
    words["best"] = layout.best + 2 * np.arange(plan.programs * d.columns * 2)
    return words


def _parts(plan: StreamPlan, layout: Layout, lengths: Sequence[int]) -> dict[bool, np.ndarray]:
    """The pairs of KV splits that a layer hands over, local and other ones: where values lie."""
    d, shares, made = plan.dims, Shares(plan, tuple(lengths)), {}
    for local in set(d.features.local_layers) or {False}:
        pairs = []
        for b, length in enumerate(lengths):
            num_splits = shares.num_splits(length, local)
            if num_splits > 1:
                shape = d.tokens, d.num_heads, num_splits, d.head_dim + 2
                token, q, split, item = np.indices(shape)
                column = b * d.tokens + token
                row = (column * d.num_heads + q) * plan.attention.max_splits + split
                pairs.append((row * (d.head_dim + 2) + item).ravel())
        made[local] = layout.parts + 2 * np.concatenate(pairs or [np.zeros(0, int)])
    return made


def poison_of(plan: StreamPlan, layout: Layout, words: int) -> Poison:
    """Makes what every word of the exchange says NaN; leaves tags, and all the rest, alone.

    Args:
        plan: the step's.
        layout: of its exchange.
        words: of the cache's counters.
    """
    keep, put = np.full(words, -1, np.int32), np.zeros(words, np.int32)
    fields = [field.name for field in dataclasses.fields(layout)]
    for name, following in itertools.pairwise(fields):
        begin, end = getattr(layout, name), getattr(layout, following)
        if name in PAIRS:
            keep[begin:end:2], put[begin:end:2] = 0, _NAN
        elif name in HALF2 and plan.half2:
            keep[begin:end], put[begin:end] = HALF2_TAG_BITS, ~HALF2_TAG_BITS
        elif name in HALF2 or name in WORDS:
            keep[begin:end], put[begin:end] = _TAG, _NAN
    return Poison(keep, put)


def aged_counters(
    plan: StreamPlan,
    layout: Layout,
    step: int,
    words: int,
    lengths: Sequence[int] | None = None,
    protocol: Protocol = HEAD_APART,
) -> np.ndarray:
    """The cache's counters after so many steps, what words say being poisoned.

    Of several tokens they are its `wide_counters`.

    Args:
        plan: the step's.
        layout: of its exchange.
        step: how many steps were finished.
        words: of the counters.
        lengths: of the sequences before the last of them; what KV splits were handed over
            follows from it. None: there were none.
        protocol: what hand-overs have in common.
    """
    layers = plan.dims.num_layers
    made = np.zeros(words, np.int32)
    made[layout.steps] = _int32(step)
    if step == 0:
        return made

    def put(where: np.ndarray, tag: int, name: str) -> None:
        bits = _int32(tag)
        if name in PAIRS:
            made[where], made[where + 1] = _NAN, _int32(protocol.pair_tag(tag))
        elif name in HALF2 and plan.half2:
            made[where] = ~HALF2_TAG_BITS | int(half2_tag(jnp.int32(bits)))
        else:
            made[where] = _NAN | (tag & _TAG)

    local = plan.dims.features.local_layers or (False,) * layers
    last = protocol.tag(layers, step - 1, layers - 1)
    of_head = protocol.head_tag(layers, step - 1)
    for name, where in _words(plan, layout, protocol).items():
        tag = protocol.tag(layers, step - 1, layers) if name == "best" else last
        put(where, of_head if name == protocol.head != "x_in" else tag, name)
    if protocol.head == "x_in":  # in another order, perhaps
        put(_activations(plan, layout.x_in, Segment.HEAD), of_head, "x_in")
    if lengths is not None:
        # In the order of layers: a later one's hand-over is what is left.
        parts = _parts(plan, layout, lengths)
        last_of = {kind: max(i for i, one in enumerate(local) if one == kind) for kind in parts}
        for kind in sorted(parts, key=last_of.__getitem__):
            put(parts[kind], protocol.tag(layers, step - 1, last_of[kind]), "parts")
    return made


def _int32(number: int) -> int:
    """As int32 arithmetic wraps."""
    return (number + 2**31) % 2**32 - 2**31
