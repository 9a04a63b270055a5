"""The fused kernel of every family of models, interpreted."""

from __future__ import annotations

import dataclasses

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
from spec_cases import alone, check_buffers, check_specification
from step_cases import newest, reference
from stream_cases import FAMILIES, WINDOW, check, stream, streamed

from pallas_kernels.dims import Features
from pallas_kernels.gpu import INTERPRETER
from pallas_kernels.stream.planner import make_stream_plan

pytestmark = [
    pytest.mark.once(
        "A sample of shapes shows what a JAX makes of the interpreted kernel.",
        sample=[
            "test_a_step_of_every_family_matches_the_model[gemma2]",
            "test_every_field_of_the_features_is_tried",
        ],
    ),
    pytest.mark.by_numpy,
    pytest.mark.filterwarnings("error"),
]


@pytest.mark.drawn(
    "What the others have, one of these has as well.",
    sample=[
        "test_a_step_of_every_family_matches_the_model[gemma2]",
        "test_a_step_of_every_family_matches_the_model[gemma3]",
        "test_a_step_of_every_family_matches_the_model[phi3]",
        "test_a_step_of_every_family_matches_the_model[granite_code]",
        "test_a_step_of_every_family_matches_the_model[smollm3]",
        "test_a_step_of_every_family_matches_the_model[olmo3]",
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_every_family_matches_the_model(name):
    config = small_config(**FAMILIES[name])
    # With other weights roundings of OLMo 3, which norms no inputs, come to the tolerance's limit.
    model = random_model(config, 2)
    cache, tokens = filled_cache(config, WINDOW, 110), random_tokens(config, 3)
    got, want = streamed(model, cache, tokens), reference(model, cache, tokens)
    check(config, got, want, WINDOW)
    plan = alone(model, cache, tokens)
    check_buffers(plan, model, cache, tokens, got)
    check_specification(plan, model, cache, tokens, want)
    # Another step reads what this one has stored.
    again, wanted = streamed(model, got[2], want.token), reference(model, want.cache, want.token)
    assert_close(again[0], wanted.logits, "fused_vs_model")
    assert_close(newest(again[2]), newest(wanted.cache), "fused_vs_model")


# Each field in one family: a field costs a compilation.
FIELDS = {
    "mistral": ("window",),
    "granite": ("embed_scale", "residual_scale", "attn_scale", "logit_scale"),
    "gemma2": ("norm_offset", "activation", "attn_softcap", "logit_softcap"),
    "gemma3": ("other_rope",),
    "phi3": ("rope_scale", "rotary_pairs"),
    "smollm3": ("other_rope",),
    "olmo3": ("rope_scale",),
}


@pytest.mark.drawn(
    "What is compared elsewhere does not change with the kernel.",
    sample=[
        "test_what_is_beyond_llama_matters[gemma3]",
        "test_what_is_beyond_llama_matters[phi3]",
    ],
)
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
        logits, *_ = stream(plan)(weights, state, tokens)
        assert worst_error(logits, want) > TOLERANCES["fused_vs_model"].worst, field


def test_every_field_of_the_features_is_tried():
    names = {field.name for field in dataclasses.fields(Features)}
    arrays = {"pre_norm", "post_norm", "qk_norm", "local_layers"}
    arrays |= {"qkv_bias", "attn_out_bias", "mlp_bias"}
    assert {field for fields in FIELDS.values() for field in fields} | arrays == names
