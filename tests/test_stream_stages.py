"""The fused kernel of several programs, interpreted stage by stage."""

from __future__ import annotations

import dataclasses
import functools

import pytest
from decode_cases import (
    dims_of,
    filled_cache,
    random_model,
    random_tokens,
    small_config,
)
from spec_cases import check_buffers
from step_cases import reference
from stream_cases import FAMILIES, check, check_several, machine, run_stages, streamed
from tag_cases import check_tags

from ffjax.decode import DecodeOutput
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.stream.tuning import Tuning

pytestmark = [
    pytest.mark.once("Stages are parts of the steps that other tests have a sample of."),
    pytest.mark.by_numpy(but=["test_programs_hand_over_all_that_others_need[llama-1-2]"]),
    pytest.mark.filterwarnings("error"),
]


def test_inputs_wider_than_a_program_are_split():
    config, lengths = small_config(num_layers=1, model_dim=1040, ffw_dim=1296), [5, 0]
    model = random_model(config)
    cache, tokens = filled_cache(config, lengths, 8), random_tokens(config, 2)
    plan = make_stream_plan(dims_of(config, 2, 8), machine(2))
    assert plan.product_warps == 8
    assert plan.segments[Segment.DOWN].splits == 2
    got = run_stages(plan, model, cache, tokens)
    check(config, got, reference(model, cache, tokens), lengths)


# Of each batch size: how wide the hidden activations are, so that they come in two parts; the
# down projection's tiles of a group of the residual.
SPLIT = {1: (8208, 8), 2: (656, 1)}


@pytest.mark.drawn(
    "What the others have, one of these has as well.",
    sample=[
        "test_programs_hand_over_all_that_others_need[gemma3-2-1]",
        "test_programs_hand_over_all_that_others_need[phi3-1-1]",
        "test_programs_hand_over_all_that_others_need[llama-1-2]",
    ],
)
@pytest.mark.parametrize(
    ("family", "batch", "copies"),
    [("llama", 1, 2), ("gemma3", 2, 1), ("phi3", 1, 1), ("granite_code", 2, 1)],
)
def test_programs_hand_over_all_that_others_need(family, batch, copies):
    """Inputs of the down projection in parts, heads in parts, more programs than some groups.

    A word that is read and was not written would be NaN, in this step or, if it was written
    in the first alone, in the next.
    """
    fields = FAMILIES.get(family, {})
    if "window" in fields:
        fields = fields | {"window": 150, "window_pattern": (True,)}
    ffw_dim, tiles = SPLIT[batch]
    config = small_config(**fields | {"num_layers": 1, "ffw_dim": ffw_dim})
    model = random_model(config)
    lengths = [300, 2][:batch]
    cache, tokens = filled_cache(config, lengths, 310), random_tokens(config, batch)
    tuning = Tuning(hidden_copies=copies)
    plan = make_stream_plan(dims_of(config, batch, 310), machine(19), tuning)
    short = dataclasses.replace(plan.attention, min_split=64, max_splits=4)
    plan = dataclasses.replace(plan, attention=short)
    down, attn_out = plan.segments[Segment.DOWN], plan.segments[Segment.ATTN_OUT]
    assert down.splits == 2
    assert down.teams == 9  # the 19th program has no team
    assert down.rows * tiles == plan.rows
    assert attn_out.groups * plan.rows == 144
    assert attn_out.groups < 19
    got = run_stages(plan, model, cache, tokens)
    check(config, got, reference(model, cache, tokens), lengths)
    check_tags(plan, got[2].counters, lengths)
    check_buffers(plan, model, cache, tokens, got)


@pytest.mark.parametrize("programs", [1, 4])
def test_a_group_of_the_residual_has_several_tiles_of_the_down_projection(programs):
    """All of a group's tiles are one program's, and summed up at once."""
    config = small_config(num_layers=1, ffw_dim=2064)
    model = random_model(config)
    cache, tokens = filled_cache(config, [9], 16), random_tokens(config, 1)
    plan = make_stream_plan(dims_of(config, 1, 16), machine(programs))
    down = plan.segments[Segment.DOWN]
    assert (down.splits, down.run, plan.rows) == (1, 4, 16)
    got = (streamed if programs == 1 else functools.partial(run_stages, plan))(model, cache, tokens)
    check(config, got, reference(model, cache, tokens), [9])


def test_programs_hand_over_several_tokens():
    """Their new positions lie beyond a KV split's end, in two tiles; inputs are split."""
    fields = FAMILIES["gemma3"] | {"num_layers": 1, "window": 150, "window_pattern": (True,)}
    config = small_config(**fields, ffw_dim=2320, num_heads=8, num_kv_heads=2)
    model, lengths = random_model(config), [253, 3]
    cache = filled_cache(config, lengths, 310, tokens=4)
    tokens = random_tokens(config, 8).reshape(2, 4)
    plan = make_stream_plan(dims_of(config, 2, 310, 4), machine(7))
    short = dataclasses.replace(plan.attention, min_split=64, max_splits=4)
    plan = dataclasses.replace(plan, attention=short)
    assert plan.segments[Segment.DOWN].splits > 1
    assert plan.attention.block < 256
    logits, token, after = run_stages(plan, model, cache, tokens)
    got = DecodeOutput(after, logits, token)
    check_several(got, reference(model, cache, tokens), cache, 4)
    assert after.wide_counters is not None
    check_tags(plan, after.wide_counters, lengths)
    check_buffers(plan, model, cache, tokens, (logits, token, after))
