"""The fused kernel's own body, interpreted, on weights in the groups that files have."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import dims_of, filled_cache, random_model, random_tokens
from numerics import assert_close, relative_error
from quantize_cases import GROUPED, kernel_config
from spec_cases import alone, check_buffers, check_specification
from step_cases import bits, in_float32, reference
from stream_cases import check, streamed

from ffjax.config import preset
from ffjax.formats import WeightFormats, int4
from ffjax.quantization import dequantize
from pallas_kernels.dims import Grouping, WeightBits, WeightGroups
from pallas_kernels.gpu import INTERPRETER
from pallas_kernels.stream import planner
from pallas_kernels.stream.layout import SharedLayout, offset_pitch
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.planner import make_stream_plan, tuned, why_not, why_not_on
from pallas_kernels.stream.tuning import Tuning, tuning_for
from pallas_kernels.targets import target

pytestmark = [
    pytest.mark.once(
        "Plans are whole numbers; a sample shows what a JAX makes of the interpreted kernel.",
        sample=[
            "test_a_step_matches_the_reference_and_is_closer_to_float32[of files-1]",
        ],
    ),
    pytest.mark.by_numpy(
        but=["test_a_step_matches_the_reference_and_is_closer_to_float32[of files-1]"]
    ),
    pytest.mark.filterwarnings("error"),
]

CAPACITY = 80
LENGTHS = {1: [65], 3: [65, 0, 79]}
H200 = target("h200").gpu


@pytest.mark.parametrize(("name", "batch"), [("of files", 1), ("of files, otherwise", 3)])
def test_a_step_matches_the_reference_and_is_closer_to_float32(name, batch):
    model = random_model(kernel_config(GROUPED[name]))
    lengths = LENGTHS[batch]
    cache = filled_cache(model.config, lengths, CAPACITY)
    tokens = random_tokens(model.config, batch)
    got, want = streamed(model, cache, tokens), reference(model, cache, tokens)
    check(model.config, got, want, lengths)
    plan = alone(model, cache, tokens)
    check_buffers(plan, model, cache, tokens, got)
    check_specification(plan, model, cache, tokens, want)
    assert bits(streamed(model, cache, tokens)) == bits(got)
    exact = reference(dequantize(model, jnp.float32), in_float32(cache), tokens)
    assert_close(got[0], exact.logits, "fused_vs_float32")
    assert relative_error(got[0], exact.logits) < relative_error(want.logits, exact.logits)


# What the kernel is told, and its plan


def test_groups_are_told_where_they_are_not_what_the_bits_have_anyway():
    dims = dims_of(kernel_config(GROUPED["of files"]), 1, 8)
    assert dims.weight_bits == WeightBits(qkv=4, attn_out=4, gate_up=4, down=4, head=8)
    assert dims.weight_groups == WeightGroups(
        qkv=Grouping(size=32, scales="float16"),
        attn_out=Grouping(size=64, offset="zero"),
        gate_up=Grouping(size=32, scales="float16", offset="minimum"),
        down=Grouping(size=128, scales="float16", offset="zero"),
        head=Grouping(size=32, scales="float16"),
    )
    usual = dims_of(kernel_config(WeightFormats.of_layers(int4())), 1, 8)
    assert usual.weight_groups == WeightGroups()
    assert usual.stored("qkv").groups == Grouping()


def grouped_dims(name: str, batch: int, grouping: Grouping, bits: int = 4):
    sizes = dims_of(preset(name), batch, 1024)
    names = ("qkv", "attn_out", "gate_up", "down", "head")
    return dataclasses.replace(
        sizes,
        weight_bits=WeightBits(**dict.fromkeys(names, bits)),
        weight_groups=WeightGroups(**dict.fromkeys(names, grouping)),
    )


@pytest.mark.parametrize("name", ["llama3.2-1b", "llama3.1-8b", "qwen2.5-1.5b"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("offset", [None, "minimum"])
def test_a_plan_has_room_for_every_group(name, batch, size, offset):
    dims = grouped_dims(name, batch, Grouping(size=size, scales="float16", offset=offset))
    plan = make_stream_plan(dims, H200)
    assert plan.slots >= 3 and plan.why_no_room is None
    each = 4 if offset else 2
    for part in plan.segments.values():
        assert part.scale_bytes == each * part.inner // size
        assert part.tile_bytes >= part.rows * (part.row_bytes + part.scale_bytes)
        if part.fine and not plan.chunked:
            assert part.grain * 4 == size  # the four threads of a column have one group
        assert part.width % size == 0 or part.splits == 1
    room = SharedLayout.of(plan)
    assert (room.squares - room.offsets > 0) == (offset is not None)
    if offset and batch == 8:  # a float a sequence and group
        down = plan.segments[Segment.DOWN]
        assert offset_pitch(plan) >= 32 * down.reads


def test_weights_in_other_groups_have_the_tuning_of_weights_of_as_many_bits(monkeypatch):
    other = grouped_dims("llama3.2-1b", 8, Grouping(size=32, scales="float16", offset="zero"))
    head = {"weight_bits": dataclasses.replace(other.weight_bits, head=8)}
    other = dataclasses.replace(
        other, **head, weight_groups=dataclasses.replace(other.weight_groups, head=None)
    )
    usual = dataclasses.replace(other, weight_groups=WeightGroups())
    found = tuning_for(H200.name, usual)
    assert found is not None
    assert tuned(usual, H200) == tuned(other, H200) == found
    # A row whose tiles have no room with these scales is no reason not to run.
    crowded = dataclasses.replace(other, ffw_dim=32_768)
    wide = Tuning(tile_bytes=65_536, cache_tile_bytes=32_768, cache_tiles=6)
    monkeypatch.setattr(planner, "tuning_for", lambda *_: wide)
    assert why_not_on(H200, crowded, wide) is not None
    assert tuned(crowded, H200) is None
    assert make_stream_plan(crowded, H200, tuned(crowded, H200)).why_no_room is None


def test_rows_that_are_not_whole_groups_are_refused():
    dims = dims_of(kernel_config(WeightFormats.of_layers(int4(32)), ffw_dim=416), 1, 8)
    assert why_not(dims, 1, whole=True) is None
    groups = WeightGroups(down=Grouping(size=64))
    sentence = why_not(dataclasses.replace(dims, weight_groups=groups), 1, whole=True)
    assert sentence is not None
    assert "whole 64 elements, of 4 bits each; this model's down has rows of 416" in sentence
    assert make_stream_plan(dims, INTERPRETER).segments[Segment.DOWN].splits == 1


def test_the_bytes_of_a_step_are_those_of_its_scales_and_offsets():
    """By hand: 1.236 billion weights of Llama 3.2 1B."""
    plain = grouped_dims("llama3.2-1b", 1, Grouping())
    pairs = grouped_dims("llama3.2-1b", 1, Grouping(size=32, offset="zero"))
    weights = 16 * 60_817_408 + 128_256 * 2048
    more = weights // 32 * 4 - weights // 128 * 2
    assert pairs.step_weight_bytes - plain.step_weight_bytes == more
    assert np.isclose(pairs.step_weight_bytes / weights, 0.625, rtol=0.001)
