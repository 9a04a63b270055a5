"""The streamed kernel of every family of models, and of several programs, interpreted."""

from __future__ import annotations

import dataclasses
import functools

import pytest
from decode_cases import (
    dims_of,
    filled_cache,
    kernel_inputs,
    random_model,
    random_tokens,
    small_config,
)
from numerics import TOLERANCES, assert_close, worst_error
from stream_cases import FAMILIES, WINDOW, check, machine, run_stages, stream, streamed
from test_kernel import CASES, newest, reference

from pallas_kernels.dims import Features
from pallas_kernels.gpu import INTERPRETER
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.planner import make_stream_plan

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_every_family_matches_the_model(name):
    config = small_config(**FAMILIES[name])
    model = random_model(config)
    cache, tokens = filled_cache(config, WINDOW, 110), random_tokens(config, 3)
    got, want = streamed(model, cache, tokens), reference(model, cache, tokens)
    check(config, got, want, WINDOW)
    # Another step reads what this one has stored.
    again, wanted = streamed(model, got[2], want.token), reference(model, want.cache, want.token)
    assert_close(again[0], wanted.logits, "fused_vs_model")
    assert_close(newest(again[2]), newest(wanted.cache), "fused_vs_model")


# Each field in one family: a field costs a compilation.
FIELDS = {
    "mistral": ("window",),
    "granite": ("embed_scale", "residual_scale", "attn_scale", "logit_scale"),
    "gemma2": ("norm_offset", "activation", "attn_softcap", "logit_softcap"),
    "gemma3": ("local_rope",),
}


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_beyond_llama_matters(name):
    """Left at its default, a family's field moves the logits beyond the tolerance.

    Of the other fields the arrays depend: without them there is no step.
    """
    config = small_config(**FAMILIES[name])
    model = random_model(config)
    cache, tokens = filled_cache(config, WINDOW, 110), random_tokens(config, 3)
    dims = dims_of(config, 3, 110)
    weights, state = kernel_inputs(model, cache)
    want, _, _ = streamed(model, cache, tokens)
    for field in FIELDS[name]:
        changes = {field: getattr(Features(), field)}
        if field == "window":
            changes["local_layers"] = ()
        features = dataclasses.replace(dims.features, **changes)
        plan = make_stream_plan(dataclasses.replace(dims, features=features), INTERPRETER)
        logits, _, _ = stream(plan)(weights, state, tokens)
        assert worst_error(logits, want) > TOLERANCES["fused_vs_model"].worst, field


def test_every_field_of_the_features_is_tried():
    names = {field.name for field in dataclasses.fields(Features)}
    arrays = {"pre_norm", "post_norm", "qk_norm", "qkv_bias", "local_layers"}
    assert {field for fields in FIELDS.values() for field in fields} | arrays == names


# Several programs, stage by stage


def test_inputs_wider_than_a_program_are_split():
    config, capacity, [lengths] = CASES["inputs wider than a tile"]
    model = random_model(config)
    cache, tokens = filled_cache(config, lengths, capacity), random_tokens(config, 2)
    plan = make_stream_plan(dims_of(config, 2, capacity), machine(2))
    assert plan.product_warps == 8
    assert plan.segments[Segment.DOWN].splits == 2
    got = run_stages(plan, model, cache, tokens)
    check(config, got, reference(model, cache, tokens), lengths)


# Of each batch size: how wide the hidden activations are, so that they come in two parts; the
# down projection's tiles of a group of the residual.
SPLIT = {1: (8208, 8), 2: (656, 1)}


@pytest.mark.parametrize(("family", "batch"), [("llama", 1), ("gemma3", 2)])
def test_programs_hand_over_all_that_others_need(family, batch):
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
    plan = make_stream_plan(dims_of(config, batch, 310), machine(19))
    short = dataclasses.replace(plan.attention, min_span=64, max_splits=4)
    plan = dataclasses.replace(plan, attention=short)
    down, attn_out = plan.segments[Segment.DOWN], plan.segments[Segment.ATTN_OUT]
    assert down.splits == 2
    assert down.teams == 9  # the 19th program has no team
    assert down.rows * tiles == plan.rows
    assert attn_out.groups * plan.rows == 144
    assert attn_out.groups < 19
    got = run_stages(plan, model, cache, tokens)
    check(config, got, reference(model, cache, tokens), lengths)


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
