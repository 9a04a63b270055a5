"""What racecheck would report of the kernel though it is right, taken out of its sight.

racecheck counts accesses of the same byte, whatever becomes of the values. Of the kernel as it is
it reports four kinds of pairs, all looked up in the machine code. Each is a harmless use of a
place that others use too. To explain them by the instructions' names would explain real races of
the same instructions too. So for racecheck each use is given a place of its own, or an order, and
whatever is still found is no such pair.

- Of a single sequence, most of what a thread makes of a tile is of no use. All threads of a warp
  store that to one spare place (`fragment_layout.place_aside`), which nobody reads: a write after a
  write. Here each thread has a spare place.
- Rows are read a whole span at a time, beyond a row's end too, and from a slot's last rows on into
  the next slot, to which a copy may be on its way. What is read there is multiplied by activations
  of 0: whichever bytes they are, they are numbers, as `ring.start_ring` sees to, or are left out
  (`product.multiply`). Here a slot is so long that nothing beyond it is read. What is left is a
  tile that has come, by a barrier that each thread has seen complete.
- When the program feeds its ring, all threads of one warp, or of each warp, load the feed's words,
  and the first stores them anew. Before it does, they vote on what they have loaded (`ptx.feed`),
  so that nobody loads later; racecheck does not take a vote for a meeting. Where a tile is more
  than two bulk copies, a barrier of the warp stands between as well. Here it always does.
- A tensor map is made in the first slot (`ring.start_ring`) while other warps already multiply what
  lies there: the step's first tile, the embedding's, which is empty. Nothing is copied for it, its
  activations are 0, and its products are not summed up. Here a barrier of the program stands after
  the making of the map.

None of them changes what is computed: logits have the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax.numpy as jnp

from ffjax import decode
from pallas_kernels.dims import Dims, ceil_div
from pallas_kernels.gpu import Gpu
from pallas_kernels.inline_ptx import lowered
from pallas_kernels.program import iota
from pallas_kernels.stream import layout, product
from pallas_kernels.stream.fragment_layout import place_aside
from pallas_kernels.stream.layout import ALIGNMENT, SPARE_BYTES
from pallas_kernels.stream.plan import SegmentPlan, StreamPlan
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.stream.tuning import Tuning

__all__ = ["APART", "plan_apart", "put_apart"]

APART = "apart"
"""Names the kernel so changed."""

_WARP = 32
# A tile that comes as a box; the map of all of them, and where those come who do not make it.
_BOX, _MAP, _MADE = "cp.async.bulk.tensor", "tensormap.cp_fenceproxy", "over:"
# Copies of 16 bytes a thread, as the ring is fed with them where bulk copies are not to be had.
_SHARED, _VOTE = ".shared.global.L2::cache_hint", "vote.sync.all.pred %go, %go, 0xffffffff;"
# Of feeding by a whole warp: what its threads agree on, and the first one's first store after it.
_TOGETHER, _STORE = "vote.sync.all.pred %go, %go,", "@%lead st.shared.v4.b32"


def plan_apart(dims: Dims, gpu: Gpu, tuning: Tuning | None = None) -> StreamPlan:
    """A plan whose slots are as long as what is read from their beginning on.

    Within `put_apart`, else spare places are those of warps.
    """
    plan = make_stream_plan.__wrapped__(dims, gpu, tuning or Tuning())
    size = ALIGNMENT * ceil_div(plan.slot_bytes + plan.tail_bytes, ALIGNMENT)
    slots = min(plan.slots, plan.room // (size + 8))
    plan = dataclasses.replace(plan, slot_bytes=size, slots=slots)
    if slots < 2:
        raise RuntimeError("The slots of this case have no room to be kept apart: make it smaller.")
    return plan


def _place_apart(plan: StreamPlan, part: SegmentPlan, start: Any, spare: Any) -> Any:
    """As `place_aside`, each thread's spare place after that of the one before it."""
    thread = iota((plan.threads,), 0)
    before = thread - jnp.right_shift(thread, 5)  # less the warps, which it adds
    return place_aside(plan, part, start, spare + SPARE_BYTES * before)


@contextlib.contextmanager
def put_apart() -> Iterator[None]:
    """Changes all fused steps that are planned and traced meanwhile, as the module says.

    Raises:
        RuntimeError: no text of a fused step was changed: they are others than they were.
    """
    changed, streams = [], []
    original = lowered.assembly

    def assembly(results: Any, text: str, *rest: Any, **more: Any) -> Any:
        streams.append(None)
        if _MAP in text:
            assert text.count(_MADE) == 1, "All threads come there once."
            text = text.replace(_MADE, f"{_MADE} {lowered.MEET} ")
        if _BOX in text:  # one thread feeds
            changed.append(None)
        elif _SHARED in text:  # each warp feeds by words of its own
            text = text.replace(_VOTE, f"{_VOTE} {lowered.REJOIN}")
            changed.append(None)
        elif _TOGETHER in text:
            assert text.count(_STORE) == 1, "The warp that feeds stores the feed's words once."
            text = text.replace(_STORE, f"{lowered.REJOIN} {_STORE}")
            changed.append(None)
        return original(results, text, *rest, **more)

    with (
        mock.patch.object(layout, "SPARE_BYTES", _WARP * SPARE_BYTES),
        mock.patch.object(product, "place_aside", _place_apart),
        mock.patch.object(decode, "make_stream_plan", plan_apart),
        mock.patch.object(lowered, "assembly", assembly),
    ):
        yield
    if streams and not changed:
        raise RuntimeError(
            "The kernel feeds its ring by other texts than those that tests/sanitize/apart.py "
            "knows. Write it anew."
        )
