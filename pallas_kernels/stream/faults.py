"""What the record of a wait that ran out says, as a sentence: see `ptx.giving_up`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pallas_kernels.stream import ptx
from pallas_kernels.stream.exchange_layout import Layout
from pallas_kernels.stream.plan import LAYER_SEGMENTS, Segment, StreamPlan

__all__ = ["Fault", "fault_of"]

# What each buffer of the exchange hands over, and who waits for it.
_HANDED = {
    "x_in": ("the residual", "the query, key and value projections"),
    "x_head": ("the residual", "the head"),
    "x_mid": ("the residual after attention", "the gate and up projections"),
    "qkv": ("queries, keys and values", "attention"),
    "attn": ("attention's output", "the output projection"),
    "ffw": ("hidden activations", "the down projection"),
    "ffw_copy": ("hidden activations", "the down projection"),
    "attn_block": ("attention's block", "its norm"),
    "ffw_block": ("the feed-forward block", "its norm"),
    "partial": ("partial sums of the down projection", "the residual's owner"),
    "parts": ("a KV split's attention", "who combines a head's KV splits"),
    "best": ("a program's best logit", "the greedy token"),
}


class Fault(NamedTuple):
    """A hand-over that did not come.

    Attributes:
        buffer: the field of `exchange_layout.Layout` that the missing word belongs to.
        word: its number in the buffer.
        layer: the layer it was awaited in, from 0 on; L for the head.
        program: who waited.
        programs: how many there are.
        layers: L.
    """

    buffer: str
    word: int
    layer: int
    program: int
    programs: int
    layers: int

    def __str__(self) -> str:
        what, who = _HANDED[self.buffer]
        where = "the head" if self.layer == self.layers else f"layer {self.layer}"
        return (
            f"A decode step gave up in {where}: {what} (word {self.word} of '{self.buffer}') never "
            f"came for {who}, in program {self.program} of {self.programs}."
        )


def fault_of(plan: StreamPlan, record: np.ndarray, layout: Layout) -> Fault | None:
    """What a record says; None if no wait ran out.

    Args:
        plan: of the step that left it.
        record: int32 `[2]`, the exchange's words from `layout.fault` on.
        layout: of the exchange.
    """
    low, high = (int(x) & 0xFFFFFFFF for x in np.asarray(record, np.int32))
    if not (low or high):
        return None
    used, distance, program = ptx.said_by(high << 32 | low)
    word, starts = layout.fault + distance, {name: getattr(layout, name) for name in _HANDED}
    name = max((n for n in starts if starts[n] <= word), key=lambda n: starts[n])
    return Fault(
        buffer=name,
        word=word - starts[name],
        layer=_layer_of(plan, used - 1, name),
        program=program,
        programs=plan.programs,
        layers=plan.dims.num_layers,
    )


def _layer_of(plan: StreamPlan, tile: int, buffer: str) -> int:
    """The layer of what is awaited after a tile of the stream; L after the layers."""
    if tile < 1:  # the embedding's
        return 0
    layer, within = divmod(tile - 1, plan.layer_tiles)
    before_down = sum(plan.segments[s].tiles for s in LAYER_SEGMENTS if s != Segment.DOWN)
    # After the down projection, the next layer's residual is awaited, or the head's.
    following = within >= before_down and buffer in ("x_in", "x_head")
    return min(layer + following, plan.dims.num_layers)
