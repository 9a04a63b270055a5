"""config.json: what is understood becomes ours, and what is not supported is refused by name.

What the other fields do is in test_hf_fields.py.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hf_folders import config_json, every_model
from hf_models import MODELS
from test_hf_goldens import config_of

import checkpoints
from checkpoints import CheckpointError
from checkpoints.hf_config import config_from_hf, config_to_hf
from ffjax.config import (
    LinearRopeScaling,
    LongRopeScaling,
    ModelConfig,
    RopeScaling,
    YarnRopeScaling,
    preset,
)
from ffjax.presets import RELEASED as RELEASED_SIZES

pytestmark = pytest.mark.filterwarnings("error")

WHERE = Path("some/folder")

# Files of released models, the fields that concern the model and some of those that do not.
_LLAMA_32_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
_MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
_SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 130000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "vocab_size": 49152,
}
_QWEN_25: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN_3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_OLMO_2: dict[str, Any] = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "num_attention_heads": 16,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}
_GRANITE: dict[str, Any] = {
    "architectures": ["GraniteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.1,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "logits_scaling": 8.0,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "granite",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
_GEMMA_2: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
_GEMMA_3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
_PHI4_MINI: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 199999,
    "embd_pdrop": 0.0,
    "eos_token_id": 199999,
    "full_attn_mod": 1,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "phi3",
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 199999,
    "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": list(RELEASED_SIZES["phi4-mini"]["rope_scaling"]["long_factors"]),
        "short_factor": [1.0] * 48,
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 200064,
}
_SMOLLM3: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 128012,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
_OLMO_3: dict[str, Any] = {
    "architectures": ["Olmo3ForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
    "max_position_embeddings": 65536,
    "model_type": "olmo3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "rope_theta": 500000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 100278,
}
_MISTRAL_NEMO: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 131072,
}
RELEASED = {
    "mistral-nemo-12b": _MISTRAL_NEMO,
    "phi4-mini": _PHI4_MINI,
    "smollm3-3b": _SMOLLM3,
    "olmo3-7b": _OLMO_3,
    "llama3.2-1b": _LLAMA_32_1B,
    "mistral-7b-v0.1": _MISTRAL_7B,
    "smollm2-1.7b": _SMOLLM2,
    "qwen2.5-1.5b": _QWEN_25,
    "qwen3-0.6b": _QWEN_3,
    "olmo2-1b": _OLMO_2,
    "granite3.1-2b": _GRANITE,
    "gemma2-2b": _GEMMA_2,
    "gemma3-1b": _GEMMA_3,
}


def read(data: dict[str, Any], **changes: Any) -> ModelConfig:
    """The configuration of a file with some fields changed; `...` removes one."""
    data = {key: value for key, value in {**data, **changes}.items() if value is not ...}
    return config_from_hf(data, WHERE, name="it")


def refused(data: dict[str, Any], match: str, **changes: Any) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        read(data, **changes)
    text = str(caught.value)
    assert text.endswith(".")
    assert str(WHERE) in text


# What it means


@pytest.mark.parametrize("name", RELEASED)
def test_files_of_released_models_give_our_presets(name):
    assert config_from_hf(RELEASED[name], WHERE, name=name) == preset(name)


@every_model
def test_the_layout_of_transformers_5_gives_the_models_of_the_records(name):
    """`config_of` is another reading of the same fields, held against recorded logits."""
    wanted = config_of(MODELS[name])
    got = read(config_json(MODELS[name]))
    for field in dataclasses.fields(ModelConfig):
        if field.name not in ("name", "family", "window_pattern", "rope_pattern", "max_context"):
            assert getattr(got, field.name) == getattr(wanted, field.name), field.name
    assert got.local_layers == wanted.local_layers
    assert got.rotating_layers == wanted.rotating_layers


@pytest.mark.parametrize("name", RELEASED)
def test_both_layouts_of_rope_mean_the_same(name):
    data = dict(RELEASED[name])
    table = data.pop("rope_scaling", None) or {}
    table = {"rope_type": table.get("type", "default"), **table}
    table["rope_theta"] = data.pop("rope_theta", 10_000.0)
    if name in ("gemma3-1b", "olmo3-7b"):
        theta = data.pop("rope_local_base_freq", table["rope_theta"])
        local = {"rope_type": "default", "rope_theta": theta}
        table = {"full_attention": table, "sliding_attention": local}
    data["rope_parameters"] = table
    assert config_from_hf(data, WHERE, name=name) == preset(name)


def test_the_smallest_file_of_a_model_that_sees():
    """Gemma 3 4B's file, which leaves nearly everything to transformers' defaults."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    got = read(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "eos_token_id": [1, 106],
            "image_token_index": 262144,
            "initializer_range": 0.02,
            "mm_tokens_per_image": 256,
            "model_type": "gemma3",
            "text_config": text,
            "torch_dtype": "bfloat16",
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
        }
    )
    assert (got.vocab_size, got.num_heads, got.num_kv_heads, got.head_dim) == (262_208, 8, 4, 256)
    assert (got.rope_theta, got.rope_theta_local) == (1e6, 1e4)
    assert got.rope_scaling == LinearRopeScaling(factor=8.0)
    assert got.window == 1024
    assert got.window_pattern == (True, True, True, True, True, False)
    assert (got.tied_embeddings, got.max_context, got.family) == (True, 131_072, "gemma3")


def test_silent_fields_mean_what_transformers_assumes():
    silent = dict.fromkeys(
        ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rms_norm_eps"), ...
    )
    got = read(_LLAMA_32_1B, **silent, tie_word_embeddings=..., max_position_embeddings=...)
    assert (got.num_kv_heads, got.head_dim) == (32, 64)
    assert (got.rope_theta, got.rope_scaling, got.norm_eps) == (1e4, None, 1e-6)
    assert (got.tied_embeddings, got.max_context) == (False, 2048)
    assert read(_LLAMA_32_1B, architectures=...).family == "llama"  # by its model_type


def test_windows():
    assert read(_MISTRAL_7B, sliding_window=None).window is None
    qwen = {**_QWEN_25, "use_sliding_window": True, "max_window_layers": 21}
    got = read(qwen)
    assert got.window == 131_072
    assert got.local_layers == (False,) * 21 + (True,) * 7
    assert read(qwen, max_window_layers=28).window is None
    assert read(qwen, max_window_layers=0).window_pattern == (True,)
    kinds = ["full_attention", "sliding_attention"] * 14
    assert read(qwen, layer_types=kinds).window_pattern == (False, True)
    assert read(_GEMMA_3, _sliding_window_pattern=6).window_pattern[5:] == (False,)
    assert read(_GEMMA_3, layer_types=["full_attention"] * 26).window is None
    assert read(_LLAMA_32_1B, layer_types=["full_attention"] * 16).window is None


def test_a_llama3_table_without_its_context_means_the_models():
    table = {**_LLAMA_32_1B["rope_scaling"], "original_max_position_embeddings": None}
    got = read(_LLAMA_32_1B, rope_scaling=table, max_position_embeddings=999).rope_scaling
    assert isinstance(got, RopeScaling)
    assert got.original_context == 999


def test_yarn_is_read_as_transformers_reads_it():
    """Its `_compute_yarn_parameters`: attention_factor, or two mscales, or neither."""
    table = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    wanted = YarnRopeScaling(
        factor=4.0, original_context=32768, attention_factor=0.1 * math.log(4) + 1
    )
    assert read(_QWEN_3, rope_scaling=table).rope_scaling == wanted
    assert read(_LLAMA_32_1B, rope_scaling=table).rope_scaling == wanted

    def factor(**more: Any) -> float:
        got = read(_QWEN_3, rope_scaling={**table, **more}).rope_scaling
        assert isinstance(got, YarnRopeScaling)
        return got.attention_factor

    assert factor(mscale=1.0) == factor(mscale=2.0, mscale_all_dim=0.0) == wanted.attention_factor
    assert factor(mscale=2.0, mscale_all_dim=1.0) == (0.2 * math.log(4) + 1) / (
        0.1 * math.log(4) + 1
    )
    assert factor(attention_factor=1.5, mscale=2.0, mscale_all_dim=1.0) == 1.5
    # What stands beside the table is taken first, and the model's own positions last.
    for changes, original in (
        ({"original_max_position_embeddings": 999}, 999),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 40960),
    ):
        got = read(_QWEN_3, **{"rope_scaling": table, **changes}).rope_scaling
        assert isinstance(got, YarnRopeScaling)
        assert got.original_context == original


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_phi_3_calls_one_stretching_by_three_names(kind):
    table = {**_PHI4_MINI["rope_scaling"], "type": kind}
    assert read(_PHI4_MINI, rope_scaling=table) == read(_PHI4_MINI)
    assert read(_PHI4_MINI, rope_scaling=None).rope_scaling is None


def test_long_factors_of_other_families():
    table = {
        **{"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 512},
        **{"short_factor": [1.0] * 32, "long_factor": [2] * 32},
    }
    assert read(_LLAMA_32_1B, rope_scaling=table).rope_scaling == LongRopeScaling(
        short_factors=(1.0,) * 32,
        long_factors=(2.0,) * 32,
        original_context=512,
        attention_factor=math.sqrt(1 + math.log(4) / math.log(512)),
    )


def test_a_stretching_by_length_is_left_out_within_the_models_positions():
    table = {"rope_type": "dynamic", "factor": 2.0}
    match = r"type 'dynamic' \(factor 2\) of some/folder .* more than 999 tokens"
    with pytest.warns(checkpoints.HFFolderWarning, match=match):
        got = read(_LLAMA_32_1B, rope_scaling=table, max_position_embeddings=999)
    assert (got.rope_scaling, got.max_context) == (None, 999)


@pytest.mark.parametrize("data", [_LLAMA_32_1B, _GRANITE, _SMOLLM3])
def test_biases(data):
    got = read(data, attention_bias=True, mlp_bias=None)
    assert (got.qkv_bias, got.attn_out_bias, got.mlp_bias) == (True, True, False)
    got = read(data, attention_bias=..., mlp_bias=True)
    assert got.biased == {"gate_up", "down"}


def test_layers_that_do_not_rotate():
    every_third = {"no_rope_layers": None, "no_rope_layer_interval": 3}
    assert read(_SMOLLM3, **every_third).rope_pattern == (True, True, False)
    got = read(_SMOLLM3, no_rope_layers=[0, 1, 1, 0], layer_types=None, num_hidden_layers=3)
    assert got.rotating_layers == (False, True, True)
    windows = {"use_sliding_window": True, "sliding_window": 9, "layer_types": None}
    got = read(_SMOLLM3, **windows)
    assert (got.window, got.window_pattern) == (9, (False, False, False, True))
    assert read(_SMOLLM3, **{**windows, "use_sliding_window": False}).window is None


def test_granite_3_3():
    """Its fields are those of 3.1, with other values."""
    got = read(
        _GRANITE,
        hidden_size=4096,
        intermediate_size=12800,
        attention_multiplier=0.0078125,
        logits_scaling=16.0,
        rope_theta=10000000.0,
        vocab_size=49159,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=True,
        torch_dtype="bfloat16",
    )
    assert (got.attn_scale, got.logit_scale, got.rope_theta) == (1 / 128, 1 / 16, 1e7)


# What is refused


@pytest.mark.parametrize("kind", ["proportional", "mrope"])
def test_a_stretching_we_do_not_have(kind):
    match = f"rope_scaling type '{kind}' is not supported; supported: default, linear, llama3, yarn"
    table = {"type": kind, "factor": 4.0}
    refused(_LLAMA_32_1B, match, rope_scaling=table)
    refused(_LLAMA_32_1B, match, rope_scaling=None, rope_parameters=table)
    nested = {"full_attention": table, "sliding_attention": {"rope_type": "default"}}
    refused(_GEMMA_3, match, rope_parameters=nested, rope_scaling=None)


@pytest.mark.parametrize(
    ("data", "changes", "match"),
    [
        (
            _QWEN_3,
            {"attention_bias": True},
            r"attention_bias \(true: biases; supported: false",
        ),
        (_QWEN_3, {"mlp_bias": True}, r"mlp_bias \(true: biases"),
        (_LLAMA_32_1B, {"mlp_bias": 1}, "mlp_bias is true or false, got 1"),
        (_LLAMA_32_1B, {"hidden_act": "relu"}, "hidden_act 'relu' is not .* silu, gelu_pytorch"),
        (_GEMMA_2, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: gelu_p"),
        (
            _LLAMA_32_1B,
            {"partial_rotary_factor": 0.5},
            r"partial_rotary_factor \(0.5: .*supported: 1.0",
        ),
        (
            _LLAMA_32_1B,
            {"quantization_config": {"bits": 4}},
            r'quantization_config \({"bits": 4}: .*: null\)',
        ),
        (_LLAMA_32_1B, {"sliding_window": 99}, r"would change .* sliding_window \(99: .*: null\)"),
        (_LLAMA_32_1B, {"rope_interleaved": True}, r"rope_interleaved \(true: .*: false\)"),
        (_LLAMA_32_1B, {"model_type": "mistral"}, "model_type beside LlamaForC.* 'mistral' is not"),
        (_GEMMA_3, {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping \(50.0: .*: null\)"),
        (
            _GEMMA_3,
            {"use_bidirectional_attention": True},
            r"use_bidirectional_attention \(true: .*: false\)",
        ),
        (_GEMMA_3, {"rope_parameters": {"rope_type": "default"}}, "rope_parameters with rope_type"),
        (
            _GEMMA_3,
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "sliding_attention with the rope_scaling .*linear.* is not .* supported: default",
        ),
        (
            _LLAMA_32_1B,
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling beside another rope_parameters",
        ),
        (
            _LLAMA_32_1B,
            {"rope_scaling": {"rope_type": "default", "factor": 2.0}},
            "rope_scaling of type 'default' with factor 2.0",
        ),
        (_LLAMA_32_1B, {"rope_scaling": "linear"}, "rope_scaling 'linear' is not supported"),
        (_LLAMA_32_1B, {"rope_scaling": {"type": "linear"}}, "lacks factor"),
        (_LLAMA_32_1B, {"layer_types": ["chunked_attention"] * 16}, "'chunked_attention' is not"),
        (_LLAMA_32_1B, {"layer_types": ["sliding_attention"] * 16}, "'sliding_attention' is not"),
        (_QWEN_25, {"layer_types": ["sliding_attention"] * 28}, "with no sliding_window"),
        (_GEMMA_2, {"layer_types": ["full_attention"] * 25}, "of length 25 is not .* 26"),
        (_QWEN_25, {"use_sliding_window": True, "max_window_layers": "x"}, "max_window_layers 'x'"),
        (_GEMMA_3, {"_sliding_window_pattern": 5}, "_sliding_window_pattern 5 is not"),
        (_LLAMA_32_1B, {"architectures": ["PhiForCausalLM"]}, "architecture PhiForCausalLM is not"),
        (_LLAMA_32_1B, {"architectures": None, "model_type": "phi"}, "model_type 'phi' is not"),
        (_LLAMA_32_1B, {"architectures": ["A", "B"]}, r"architecture \['A', 'B'\] is not"),
        (_LLAMA_32_1B, {"hidden_size": ...}, "lacks hidden_size"),
        (_LLAMA_32_1B, {"hidden_size": "wide"}, "hidden_size is a positive integer, got 'wide'"),
        (_LLAMA_32_1B, {"hidden_size": True}, "hidden_size is a positive integer, got True"),
        (_LLAMA_32_1B, {"rms_norm_eps": -1}, "rms_norm_eps is a positive number, got -1"),
        (_LLAMA_32_1B, {"tie_word_embeddings": 1}, "tie_word_embeddings is true or false, got 1"),
        (_LLAMA_32_1B, {"head_dim": None, "hidden_size": 2049}, "2049 does not divide among 32"),
        (_LLAMA_32_1B, {"num_key_value_heads": 7}, "describes no possible model: .*multiple of"),
        (_GEMMA_3, {"architectures": ["Gemma3ForConditionalGeneration"]}, "lacks text_config"),
        (
            _PHI4_MINI,
            {"partial_rotary_factor": 0.12},
            "partial_rotary_factor 0.12 is not .* even number of the 128 elements",
        ),
        (_PHI4_MINI, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "default, longrope"),
        (
            _PHI4_MINI,
            {"rope_scaling": {"type": "su", "long_factor": [1.0] * 47, "short_factor": []}},
            r"rope_scaling with short_factor \[\] is not .* 48 positive numbers, one a rot",
        ),
        (_SMOLLM3, {"no_rope_layers": [1, 0]}, r"no_rope_layers \[1, 0\] is not .* 36 layers"),
        (_SMOLLM3, {"no_rope_layers": [2] * 36}, "no_rope_layers .* null, or 1 or 0 for each"),
        (_SMOLLM3, {"layer_types": ["sliding_attention"] * 36}, "with no sliding_window"),
        (_OLMO_3, {"rope_theta": 1e6}, "rope_theta outside of rope_parameters 1000000.0 is not"),
        (
            _OLMO_3,
            {"rope_scaling": {**_OLMO_3["rope_scaling"], "truncate": False}},
            "rope_scaling with truncate False is not supported; supported: True",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(data, changes, match):
    refused(data, match, **changes)


# The way back


@pytest.mark.parametrize("name", RELEASED)
def test_the_way_back_gives_the_same_configuration(name):
    config = preset(name)
    data = config_to_hf(config, "bfloat16", {"eos_token_id": 7})
    assert config_from_hf(data, WHERE, name=name) == config
    assert data["architectures"] == RELEASED[name]["architectures"]
    assert data["eos_token_id"] == 7
    # Not only do we read it back: each field that the release has says the same there.
    unused = "sliding_window" if RELEASED[name].get("use_sliding_window") is False else ""
    for field, value in RELEASED[name].items():
        if field in data and field not in ("eos_token_id", unused) and value is not None:
            assert data[field] == value, field


@every_model
def test_the_way_back_of_every_setting(name):
    config = read(config_json(MODELS[name]))
    assert config_from_hf(config_to_hf(config, "float32", {}), WHERE, name="it") == config


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"norm_offset": 1.0}, "family 'llama' cannot say norm_offset=1.0, as"),
        ({"window": 7}, "cannot say window=7"),
        ({"logit_softcap": 9.0, "embed_scale": 2.0}, "cannot say embed_scale=2.0, logit_softcap="),
        ({"family": "qwen3"}, "family 'qwen3' cannot say qk_norm=None"),
        ({"family": "granite"}, "cannot say attn_scale=None"),
        ({"family": "own"}, "are of the families llama, .* is of the family 'own'"),
    ],
)
def test_what_config_json_cannot_say_is_refused(changes, match):
    config = dataclasses.replace(preset("llama3.2-1b"), **changes)
    with pytest.raises(CheckpointError, match=match):
        config_to_hf(config, "bfloat16", {})
