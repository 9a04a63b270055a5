"""What a record of a wait that ran out says: the buffer, the word, the layer and the program.

On a GPU, `test_gpu_giving_up.py` has kernels leave them.
"""

import numpy as np
import pytest
from stream_cases import PLANS

from pallas_kernels.stream.faults import fault_of
from pallas_kernels.stream.launch import layout_of
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.ptx.giving_up import record_of

PLAN = PLANS["8B on an H200, 2 sequences"]()
LAST = PLAN.dims.num_layers - 1
# What is awaited after a segment's last tile of a layer, and the layer that it is said to be of.
AWAITED = [
    (Segment.QKV, 0, "qkv", 0),
    (Segment.QKV, 3, "parts", 3),
    (Segment.QKV, 3, "attn", 3),
    (Segment.ATTN_OUT, 3, "x_mid", 3),
    (Segment.GATE_UP, LAST, "ffw", LAST),
    (Segment.DOWN, 3, "partial", 3),
    (Segment.DOWN, 3, "x_in", 4),
    (Segment.DOWN, LAST, "x_head", LAST + 1),
    (Segment.HEAD, LAST + 1, "best", LAST + 1),
]


def fault(used: int, buffer: str, word: int):
    layout = layout_of(PLAN)
    record = record_of(used, getattr(layout, buffer) + word - layout.fault, 131)
    halves = np.array([record & 0xFFFFFFFF, record >> 32], np.uint32).view(np.int32)
    return fault_of(PLAN, halves, layout)


@pytest.mark.parametrize(("segment", "layer", "buffer", "said"), AWAITED)
def test_what_is_awaited_behind_a_segment_is_named(segment, layer, buffer, said):
    used = PLAN.first_tile(segment, layer) + PLAN.segments[segment].tiles
    for word in (0, 77):
        found = fault(used, buffer, word)
        assert found is not None
        assert (found.buffer, found.word, found.layer, found.program) == (buffer, word, said, 131)
        where = "the head" if said > LAST else f"layer {said}"
        assert f"gave up in {where}: " in str(found)
        assert f"(word {word} of '{buffer}') never came" in str(found)
        assert str(found).endswith("in program 131 of 132.")


def test_behind_the_embedding_the_first_layer_is_awaited():
    found = fault(1, "x_in", 0)
    assert found is not None
    assert found.layer == 0


def test_no_record_is_no_fault():
    assert fault_of(PLAN, np.zeros(2, np.int32), layout_of(PLAN)) is None
