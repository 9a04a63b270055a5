"""Configurations: published sizes, plain data and back, and sentences for impossible ones."""

import dataclasses
import json
import math
import re
from typing import Any

import jax
import pytest
from flax import nnx

from ffjax.config import (
    PRESETS,
    LinearRopeScaling,
    LongRopeScaling,
    ModelConfig,
    RopeScaling,
    YarnRopeScaling,
    preset,
)
from ffjax.model import Transformer

pytestmark = pytest.mark.filterwarnings("error")

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "num_layers": 3,
    "model_dim": 37,
    "ffw_dim": 53,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 14,
}
SCALING: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_context": 24,
}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # What their safetensors hold, as the model pages on huggingface.co state it.
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("llama3.1-8b", 8_030_261_248),
        ("llama3.1-70b", 70_553_706_496),
        ("tinyllama-1.1b", 1_100_048_384),  # TinyLlama/TinyLlama-1.1B-Chat-v1.0
        ("smollm2-1.7b", 1_711_376_384),  # HuggingFaceTB/SmolLM2-1.7B
        ("smollm2-135m", 134_515_008),  # HuggingFaceTB/SmolLM2-135M
        ("mistral-7b-v0.1", 7_241_732_096),  # mistralai/Mistral-7B-v0.1
        ("qwen2.5-1.5b", 1_543_714_304),  # Qwen/Qwen2.5-1.5B
        # Qwen/Qwen3-0.6B and 1.7B, whose files hold the tied head once more.
        ("qwen3-0.6b", 751_632_384 - 151_936 * 1024),
        ("qwen3-1.7b", 2_031_739_904 - 151_936 * 2048),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-14b", 14_768_307_200),
        ("qwen3-32b", 32_762_123_264),
        ("olmo2-1b", 1_484_916_736),  # allenai/OLMo-2-0425-1B
        ("olmo3-7b", 7_298_011_136),  # allenai/Olmo-3-1025-7B
        ("smollm3-3b", 3_075_098_624),  # HuggingFaceTB/SmolLM3-3B
        ("phi4-mini", 3_836_021_760),  # microsoft/Phi-4-mini-instruct
        ("phi4-14b", 14_659_507_200),  # microsoft/phi-4
        ("mistral-nemo-12b", 12_247_782_400),  # mistralai/Mistral-Nemo-Instruct-2407
        ("mistral-small-24b", 23_572_403_200),  # mistralai/Mistral-Small-24B-Instruct-2501
        ("granite3.1-2b", 2_533_525_504),  # ibm-granite/granite-3.1-2b-base
        ("gemma2-2b", 2_614_341_888),  # google/gemma-2-2b
        ("gemma3-1b", 999_885_952),  # google/gemma-3-1b-pt
    ],
)
def test_presets_have_the_released_number_of_weights(name, count):
    assert preset(name).num_params == count


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_describes_a_model_of_as_many_weights(name):
    config = preset(name)
    assert config.name == name
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(model))]
    assert sum(map(math.prod, shapes)) == config.num_params


def test_the_shipped_model_is_small():
    # Two bytes a weight: under the 8 MB that a checkpoint in the package may have.
    assert 1e6 < preset("python-bytes-3m").num_params < 4e6


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(ValueError, match=r"No preset is called 'gpt-2'; there are llama3\.2-1b, "):
        preset("gpt-2")


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_counts_once(tied):
    config = ModelConfig(**SIZES, tied_embeddings=tied)
    layer = 37 * (6 + 2 + 2 + 6) * 14 + 3 * 37 * 53 + 2 * 37
    assert config.num_params == 3 * layer + 37 + (1 if tied else 2) * 101 * 37
    assert config.q_per_kv == 3


def test_family_weights_count():
    llama = ModelConfig(**SIZES).num_params
    more: list[tuple[dict[str, Any], int]] = [
        ({"qkv_bias": True}, (6 + 2 + 2) * 14),
        ({"attn_out_bias": True}, 37),
        ({"mlp_bias": True}, 2 * 53 + 37),
        ({"qk_norm": "head"}, 2 * 14),
        ({"qk_norm": "full"}, (6 + 2) * 14),
        ({"post_norm": True}, 2 * 37),
        ({"post_norm": True, "pre_norm": False}, 0),
    ]
    for fields, a_layer in more:
        assert ModelConfig(**SIZES, **fields).num_params == llama + 3 * a_layer, fields


def test_which_layers_are_local():
    def local(**fields: Any) -> tuple[bool, ...]:
        return ModelConfig(**{**SIZES, "num_layers": 5, **fields}).local_layers

    assert local() == (False,) * 5
    assert local(window=3) == (True,) * 5
    assert local(window=3, window_pattern=(True, True, False)) == (True, True, False, True, True)
    assert local(window=3, window_pattern=(False,)) == (False,) * 5
    assert local(window_pattern=(False,)) == (False,) * 5


# Every field that tells a family from Llama, at a value that is not its default.
FAMILY_FIELDS: dict[str, Any] = {
    "family": "gemma3",
    "rope_theta_local": 50.0,
    "rotary_pairs": 5,
    "rope_pattern": (True, True, True),
    "norm_offset": 1.0,
    "pre_norm": False,
    "post_norm": True,
    "qk_norm": "head",
    "qkv_bias": True,
    "attn_out_bias": True,
    "mlp_bias": True,
    "activation": "gelu_tanh",
    "embed_scale": 3.0,
    "residual_scale": 0.5,
    "attn_scale": 0.25,
    "logit_scale": 0.125,
    "attn_softcap": 50.0,
    "logit_softcap": 30.0,
    "window": 7,
    "window_pattern": (True, False),
}


def test_a_family_as_plain_data_and_back():
    sized = {*SIZES, "name", "rope_theta", "rope_scaling", "norm_eps", "tied_embeddings"}
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert set(FAMILY_FIELDS) == fields - sized - {"max_context", "weights"}
    config = ModelConfig(**SIZES, **FAMILY_FIELDS)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.window_pattern == (True, False)
    assert hash(again) == hash(config)
    for name, value in FAMILY_FIELDS.items():
        assert getattr(again, name) == value


def test_which_layers_rotate():
    def config(**fields: Any) -> ModelConfig:
        return ModelConfig(**{**SIZES, "num_layers": 5, **fields})

    assert config().rotating_layers == (True,) * 5
    assert config().other_rope_layers == (False,) * 5
    some = config(rope_pattern=(True, False))
    assert some.rotating_layers == (True, False, True, False, True)
    assert some.other_rope_layers == (False, True, False, True, False)
    assert config(rope_pattern=(True,) * 5 + (False,)).other_rope_layers == (False,) * 5
    two = config(rope_theta_local=50.0, window=3, window_pattern=(False, True))
    assert two.other_rope_layers == two.local_layers


@pytest.mark.parametrize(
    "scaling",
    [
        LinearRopeScaling(factor=3.0),
        RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64),
        YarnRopeScaling(factor=8.0, original_context=64, truncate=False, attention_factor=1.25),
        LongRopeScaling(short_factors=(1.0,) * 7, long_factors=(2.5,) * 7, original_context=64),
    ],
)
def test_every_stretching_as_plain_data_and_back(scaling):
    config = ModelConfig(**SIZES, rope_scaling=scaling)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_long_factors_are_those_of_rotated_pairs():
    short, long = (1.0,) * 7, (2.0,) * 7
    scaling = LongRopeScaling(short_factors=short, long_factors=long, original_context=9)
    with pytest.raises(ValueError, match=r"each rotated pair of a head, here 5; .* has 7\.$"):
        ModelConfig(**SIZES, rope_scaling=scaling, rotary_pairs=5)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: YarnRopeScaling(factor=0.5, original_context=64),
            "RoPE scaling stretches: factor must be at least 1, got 0.5.",
        ),
        (
            lambda: YarnRopeScaling(factor=2.0, original_context=64, beta_slow=40.0),
            "YaRN needs 0 < beta_slow <= beta_fast, got 40.0 and 32.0.",
        ),
        (
            lambda: YarnRopeScaling(factor=2.0, original_context=0),
            "RoPE scaling needs a positive original_context, got 0.",
        ),
        (
            lambda: YarnRopeScaling(factor=2.0, original_context=64, attention_factor=-1.0),
            "RoPE scaling needs a positive attention_factor, got -1.0.",
        ),
        (
            lambda: LongRopeScaling(short_factors=(), long_factors=(), original_context=64),
            "LongRoPE needs short_factors that are a tuple of positive numbers, got ().",
        ),
        (
            lambda: LongRopeScaling(
                short_factors=(1.0,), long_factors=(1.0, 0.0), original_context=64
            ),
            "LongRoPE needs long_factors that are a tuple of positive numbers, got (1.0, 0.0).",
        ),
        (
            lambda: LongRopeScaling(
                short_factors=(1.0,), long_factors=(1.0, 2.0), original_context=64
            ),
            "LongRoPE needs as many short_factors as long_factors, got 1 and 2.",
        ),
    ],
)
def test_stretchings_that_cannot_be_get_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        make()


def test_data_from_before_the_families_is_llama():
    """The fields of the shipped model's manifest, which knows no others."""
    old = {**SIZES, "name": "old", "rope_theta": 1e4, "rope_scaling": None, "norm_eps": 1e-5}
    config = ModelConfig.from_dict(old | {"tied_embeddings": True, "max_context": 2048})
    assert config.family == "llama"
    assert config.local_layers == (False,) * 3
    assert (config.pre_norm, config.post_norm, config.qk_norm) == (True, False, None)


@pytest.mark.parametrize(
    "scaling", [None, RopeScaling(**SCALING), LinearRopeScaling(factor=8.0)], ids=type
)
def test_plain_data_and_back(scaling):
    config = ModelConfig(
        **SIZES,
        name="small",
        rope_theta=300.0,
        rope_scaling=scaling,
        norm_eps=1e-2,
        tied_embeddings=True,
        max_context=99,
    )
    data = json.loads(json.dumps(config.to_dict()))
    assert set(data) == {field.name for field in dataclasses.fields(ModelConfig)}
    again = ModelConfig.from_dict(data)
    assert again == config
    assert type(again.rope_scaling) is type(scaling)
    assert hash(again) == hash(config)  # a static argument of jit


def test_data_may_leave_out_what_has_a_default():
    assert ModelConfig.from_dict(SIZES) == ModelConfig(**SIZES)


def test_from_dict_leaves_its_argument_alone():
    data = SIZES | {"rope_scaling": dict(SCALING)}
    ModelConfig.from_dict(data)
    assert data == SIZES | {"rope_scaling": SCALING}


def test_a_configuration_is_frozen():
    config = ModelConfig(**SIZES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_unknown_and_missing_fields_are_named():
    match = r"has no field bias, rotary; its fields are activation, attn_out_bias, "
    with pytest.raises(ValueError, match=match):
        ModelConfig.from_dict(SIZES | {"rotary": 4, "bias": True})
    with pytest.raises(ValueError, match=r"A model configuration needs head_dim, num_layers\."):
        ModelConfig.from_dict(
            {k: v for k, v in SIZES.items() if k not in ("num_layers", "head_dim")}
        )


@pytest.mark.parametrize("field", [*SIZES, "max_context"])
@pytest.mark.parametrize("value", [0, -2, 2.0, "2", None])
def test_sizes_are_positive_integers(field, value):
    sentence = f"ModelConfig.{field} must be a positive integer, got {value!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        ModelConfig(**(SIZES | {field: value}))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"num_heads": 6, "num_kv_heads": 4},
            "Every key/value head serves the same number of query heads: num_heads must be a "
            "multiple of num_kv_heads, got 6 and 4.",
        ),
        (
            {"num_heads": 2, "num_kv_heads": 4},
            "Every key/value head serves the same number of query heads: num_heads must be a "
            "multiple of num_kv_heads, got 2 and 4.",
        ),
        ({"head_dim": 15}, "RoPE rotates pairs: head_dim must be even, got 15."),
        ({"rope_theta": 0.0}, "rope_theta and norm_eps must be positive, got 0.0 and 1e-05."),
        ({"norm_eps": -1e-5}, "rope_theta and norm_eps must be positive, got 10000.0 and -1e-05."),
        ({"qkv_bias": 1}, "ModelConfig.qkv_bias must be true or false, got 1."),
        ({"mlp_bias": "no"}, "ModelConfig.mlp_bias must be true or false, got 'no'."),
        ({"pre_norm": None}, "ModelConfig.pre_norm must be true or false, got None."),
        ({"post_norm": "yes"}, "ModelConfig.post_norm must be true or false, got 'yes'."),
        ({"tied_embeddings": 0}, "ModelConfig.tied_embeddings must be true or false, got 0."),
        ({"qk_norm": "all"}, "ModelConfig.qk_norm must be one of 'head', 'full', got 'all'."),
        (
            {"activation": "relu"},
            "ModelConfig.activation must be one of 'silu', 'gelu_tanh', got 'relu'.",
        ),
        (
            {"activation": None},
            "ModelConfig.activation must be one of 'silu', 'gelu_tanh', got None.",
        ),
        ({"embed_scale": 0}, "ModelConfig.embed_scale must be a positive number, got 0."),
        ({"embed_scale": None}, "ModelConfig.embed_scale must be a positive number, got None."),
        (
            {"residual_scale": -1.0},
            "ModelConfig.residual_scale must be a positive number, got -1.0.",
        ),
        ({"logit_scale": math.inf}, "ModelConfig.logit_scale must be a positive number, got inf."),
        ({"logit_scale": True}, "ModelConfig.logit_scale must be a positive number, got True."),
        ({"attn_scale": 0.0}, "ModelConfig.attn_scale must be a positive number or None, got 0.0."),
        (
            {"attn_softcap": -50.0},
            "ModelConfig.attn_softcap must be a positive number or None, got -50.0.",
        ),
        (
            {"logit_softcap": math.nan},
            "ModelConfig.logit_softcap must be a positive number or None, got nan.",
        ),
        (
            {"rope_theta_local": "1e4", "window": 2},
            "ModelConfig.rope_theta_local must be a positive number or None, got '1e4'.",
        ),
        ({"norm_offset": math.nan}, "ModelConfig.norm_offset must be a finite number, got nan."),
        ({"norm_offset": None}, "ModelConfig.norm_offset must be a finite number, got None."),
        ({"window": 0}, "ModelConfig.window must be a positive integer or None, got 0."),
        ({"window": 4.0}, "ModelConfig.window must be a positive integer or None, got 4.0."),
        ({"window": True}, "ModelConfig.window must be a positive integer or None, got True."),
        (
            {"window": 2, "window_pattern": ()},
            "ModelConfig.window_pattern must be a tuple of one or more booleans, got ().",
        ),
        (
            {"window": 2, "window_pattern": (1, 0)},
            "ModelConfig.window_pattern must be a tuple of one or more booleans, got (1, 0).",
        ),
        (
            {"window": 2, "window_pattern": "local"},
            "ModelConfig.window_pattern must be a tuple of one or more booleans, got 'local'.",
        ),
        (
            {"pre_norm": False},
            "A block is normed before it or after it, or both: pre_norm and post_norm are both "
            "false.",
        ),
        (
            {"window_pattern": (True, False)},
            "window_pattern (True, False) tells local layers from others: it needs a window.",
        ),
        (
            {"rope_theta_local": 50.0},
            "rope_theta_local=50.0 is for local layers: it needs a window and a window_pattern "
            "that makes one of the layers local.",
        ),
        (
            {"rope_theta_local": 50.0, "window": 2, "window_pattern": (False,) * 3 + (True,)},
            "rope_theta_local=50.0 is for local layers: it needs a window and a window_pattern "
            "that makes one of the layers local.",
        ),
        (
            {"rope_pattern": (1, 0)},
            "ModelConfig.rope_pattern must be a tuple of one or more booleans, got (1, 0).",
        ),
        ({"rotary_pairs": 7}, "ModelConfig.rotary_pairs must be None, or 1 to 6, got 7."),
        ({"rotary_pairs": True}, "ModelConfig.rotary_pairs must be None, or 1 to 6, got True."),
        (
            {"rope_theta_local": 50.0, "window": 2, "rope_pattern": (True, False)},
            "Layers rotate in two ways at most: rope_theta_local=50.0 and a rope_pattern (True, "
            "False) make three. Leave out one of them.",
        ),
    ],
)
def test_impossible_sizes_get_a_sentence(fields, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        ModelConfig(**(SIZES | fields))
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        ModelConfig.from_dict(SIZES | fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"factor": 0.5}, "RoPE scaling stretches: factor must be at least 1, got 0.5."),
        (
            {"low_freq_factor": 0.0},
            "RoPE scaling needs 0 < low_freq_factor < high_freq_factor, got 0.0 and 4.0.",
        ),
        (
            {"high_freq_factor": 1.0},
            "RoPE scaling needs 0 < low_freq_factor < high_freq_factor, got 1.0 and 1.0.",
        ),
        ({"original_context": 0}, "RoPE scaling needs a positive original_context, got 0."),
    ],
)
def test_impossible_rope_scalings_get_a_sentence(fields, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        RopeScaling(**(SCALING | fields))
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        ModelConfig.from_dict(SIZES | {"rope_scaling": SCALING | fields})


def test_an_even_stretching_shortens_no_wave():
    sentence = "RoPE scaling stretches: factor must be at least 1, got 0.5."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        LinearRopeScaling(factor=0.5)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        ModelConfig.from_dict(SIZES | {"rope_scaling": {"factor": 0.5}})


@pytest.mark.parametrize(
    ("scaling", "sentence"),
    [
        (
            {"rope_type": "yarn", "factor": 2.0},
            "rope_scaling has the fields factor, high_freq_factor, low_freq_factor, "
            "original_context; or factor; or attention_factor, beta_fast, beta_slow, factor, "
            "original_context, truncate; or attention_factor, long_factors, original_context, "
            "short_factors; got factor, rope_type.",
        ),
        ({}, "rope_scaling has the fields factor, .*; got none."),
        ("llama3", "rope_scaling is a table of fields or null, got 'llama3'."),
    ],
)
def test_rope_scalings_of_another_form_get_a_sentence(scaling, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        ModelConfig.from_dict(SIZES | {"rope_scaling": scaling})
