"""The reference model against logits recorded from Hugging Face transformers.

`record_hf_logits.py` made the records; neither torch nor transformers is needed here.
"""

import ast
import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_models import GOLDENS, LLAMA_ROPES, MODELS, HFModel
from numerics import TOLERANCES, assert_close, relative_error
from reference_cases import DTYPES, filled_model, quick_jit

from ffjax.cache import KVCache
from ffjax.config import (
    AnyRopeScaling,
    LinearRopeScaling,
    LongRopeScaling,
    ModelConfig,
    RopeScaling,
    YarnRopeScaling,
    preset,
)
from ffjax.model import Transformer
from ffjax.rope import inverse_frequencies

pytestmark = [
    pytest.mark.once(
        "A sample of families shows what a JAX makes of the model.",
        sample=[
            "test_prefill_and_steps_match_hugging_face[gemma3_stretched_rope-bfloat16]",
            "test_prefill_and_steps_match_hugging_face[mistral-bfloat16]",
            "test_prefill_and_steps_match_hugging_face[qwen3-float32]",
            "test_whole_sequences_match_hugging_face[olmo2-float32]",
            "test_records_say_what_made_them_and_are_small",
            "test_rope_of_the_presets_matches_hugging_face",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

PREFILL = 17  # of 29 tokens; the rest comes step by step

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_model = pytest.mark.parametrize("name", MODELS)


def rope_scaling_of(rope: dict[str, Any], settings: dict[str, Any]) -> AnyRopeScaling | None:
    """Hugging Face's table of rotary settings as our scaling."""
    if rope["rope_type"] == "longrope":
        original = settings["original_max_position_embeddings"]
        longer = settings["max_position_embeddings"] / original
        return LongRopeScaling(
            short_factors=tuple(rope["short_factor"]),
            long_factors=tuple(rope["long_factor"]),
            original_context=original,
            attention_factor=(1 + math.log(longer, original)) ** 0.5,
        )
    if rope["rope_type"] == "yarn":
        factor = rope["factor"]
        weights = rope.get("mscale", 1.0), rope.get("mscale_all_dim", 0.0)
        above, below = (1 + 0.1 * weight * math.log(factor) for weight in weights)
        return YarnRopeScaling(
            factor=factor,
            original_context=rope["original_max_position_embeddings"],
            beta_fast=rope.get("beta_fast", 32.0),
            beta_slow=rope.get("beta_slow", 1.0),
            truncate=rope.get("truncate", True),
            attention_factor=rope.get("attention_factor", above / below),
        )
    if rope["rope_type"] == "linear":
        return LinearRopeScaling(factor=rope["factor"])
    if rope["rope_type"] == "llama3":
        return RopeScaling(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_context=rope["original_max_position_embeddings"],
        )
    assert rope["rope_type"] in ("default", "dynamic")  # which changes longer texts alone
    return None


def family_fields(family: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of ours that differ from Llama's, for Hugging Face's `model_type`."""
    if family == "mistral":
        return {"window": settings["sliding_window"]}
    if family == "qwen2":
        fields: dict[str, Any] = {"qkv_bias": True}
        if settings.get("use_sliding_window"):
            layers = range(settings["num_hidden_layers"])
            local = tuple(i >= settings["max_window_layers"] for i in layers)
            fields |= {"window": settings["sliding_window"], "window_pattern": local}
        return fields
    if family == "qwen3":
        return {"qk_norm": "head"}
    if family == "olmo3":
        return {
            "qk_norm": "full",
            "pre_norm": False,
            "post_norm": True,
            "window": settings["sliding_window"],
            "window_pattern": (True, True, True, False),
            "rope_theta_local": settings["rope_parameters"]["sliding_attention"]["rope_theta"],
        }
    if family == "smollm3":
        layers = range(settings["num_hidden_layers"])
        rotates = settings.get("no_rope_layers") or [
            (i + 1) % settings["no_rope_layer_interval"] for i in layers
        ]
        fields = {"rope_pattern": tuple(map(bool, rotates))}
        if settings.get("use_sliding_window"):
            fields["window"] = settings["sliding_window"]
            fields["window_pattern"] = tuple(not one for one in rotates)
        return fields
    if family == "olmo2":
        return {"qk_norm": "full", "pre_norm": False, "post_norm": True}
    if family == "granite":
        return {
            "embed_scale": settings["embedding_multiplier"],
            "residual_scale": settings["residual_multiplier"],
            "attn_scale": settings["attention_multiplier"],
            "logit_scale": 1 / settings["logits_scaling"],
        }
    if family in ("gemma2", "gemma3_text"):
        gemma: dict[str, Any] = {
            "norm_offset": 1.0,
            "post_norm": True,
            "activation": "gelu_tanh",
            "embed_scale": settings["hidden_size"] ** 0.5,
            "attn_scale": settings["query_pre_attn_scalar"] ** -0.5,
            "window": settings["sliding_window"],
        }
        if family == "gemma2":
            return gemma | {
                "attn_softcap": settings["attn_logit_softcapping"],
                "logit_softcap": settings["final_logit_softcapping"],
                "window_pattern": (True, False),
            }
        local = tuple(kind == "sliding_attention" for kind in settings["layer_types"])
        return gemma | {
            "qk_norm": "head",
            "window_pattern": local,
            "rope_theta_local": settings["rope_parameters"]["sliding_attention"]["rope_theta"],
        }
    if family == "phi3":
        width = settings["hidden_size"] // settings["num_attention_heads"]
        rotated = int(width * settings["rope_parameters"]["partial_rotary_factor"])
        return {
            "window": settings["sliding_window"],
            "rotary_pairs": None if rotated == width else rotated // 2,
        }
    assert family == "llama"
    attention, mlp = settings.get("attention_bias", False), settings.get("mlp_bias", False)
    return {"qkv_bias": attention, "attn_out_bias": attention, "mlp_bias": mlp}


def config_of(model: HFModel) -> ModelConfig:
    """Hugging Face's settings as ours."""
    settings = model.settings
    rope = settings["rope_parameters"]
    rope = rope.get("full_attention", rope)
    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    return ModelConfig(
        vocab_size=settings["vocab_size"],
        num_layers=settings["num_hidden_layers"],
        model_dim=width,
        ffw_dim=settings["intermediate_size"],
        num_heads=heads,
        num_kv_heads=settings["num_key_value_heads"],
        head_dim=settings.get("head_dim", width // heads),
        rope_theta=rope["rope_theta"],
        rope_scaling=rope_scaling_of(rope, settings),
        norm_eps=settings["rms_norm_eps"],
        tied_embeddings=settings["tie_word_embeddings"],
        **family_fields(model.family, settings),
    )


def by_halves(qkv: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Rows of heads whose rotated elements come first, so that each half begins with its own."""
    if (pairs := config.rotary_pairs) is None:
        return qkv
    heads = qkv.reshape(config.num_layers, -1, config.head_dim, qkv.shape[-1])
    first, second, still = np.split(heads, [pairs, 2 * pairs], axis=2)
    near, far = np.split(still, 2, axis=2)
    turned = np.concatenate([first, near, second, far], axis=2)
    values = config.num_heads + config.num_kv_heads
    turned[:, values:] = heads[:, values:]
    return turned.reshape(qkv.shape)


@functools.cache
def build(name: str, dtype: str) -> Transformer:
    """The model with the recipe's weights; bfloat16 holds them exactly."""
    config, weights = config_of(MODELS[name]), MODELS[name].weights()

    def stacked(*parts: str, of: str = "weight") -> np.ndarray:
        return np.stack(
            [
                np.concatenate([weights.pop(f"model.layers.{i}.{part}.{of}") for part in parts])
                for i in range(config.num_layers)
            ]
        )

    projections = [f"self_attn.{x}_proj" for x in "qkv"]
    gate_up = ["mlp.gate_proj", "mlp.up_proj"]
    if MODELS[name].family == "phi3":
        projections, gate_up = ["self_attn.qkv_proj"], ["mlp.gate_up_proj"]
    ours = {
        "embed": weights.pop("model.embed_tokens.weight"),
        "layers.qkv": by_halves(stacked(*projections), config),
        "layers.attn_out": stacked("self_attn.o_proj"),
        "layers.gate_up": stacked(*gate_up),
        "layers.down": stacked("mlp.down_proj"),
        "final_norm": weights.pop("model.norm.weight"),
    }
    parts = {"qkv": projections, "attn_out": ["self_attn.o_proj"]}
    parts |= {"gate_up": gate_up, "down": ["mlp.down_proj"]}
    for matrix in config.biased:
        ours[f"layers.{matrix}_bias"] = stacked(*parts[matrix], of="bias")
    if config.qk_norm:
        ours["layers.q_norm"] = stacked("self_attn.q_norm")
        ours["layers.k_norm"] = stacked("self_attn.k_norm")
    # After the attention stands what Llama has before the feed-forward block: its name there
    # says where it stands, and means the one or the other.
    if config.post_norm:
        ours["layers.attn_post_norm"] = stacked("post_attention_layernorm")
        ours["layers.mlp_post_norm"] = stacked("post_feedforward_layernorm")
    if config.pre_norm:
        before = "pre_feedforward_layernorm" if config.post_norm else "post_attention_layernorm"
        ours["layers.attn_norm"] = stacked("input_layernorm")
        ours["layers.mlp_norm"] = stacked(before)
    if not config.tied_embeddings:
        ours["head"] = weights.pop("lm_head.weight")
    assert not weights
    return filled_model(config, ours, dtype)


def recorded(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


@quick_jit
def whole(model, tokens):
    return model(tokens)


@quick_jit
def grow(model, tokens, cache):
    return model(tokens, cache)


@pytest.mark.drawn("Each family, in one of the dtypes.")
@every_dtype
@every_model
def test_whole_sequences_match_hugging_face(name, dtype):
    golden = recorded(name)
    assert golden["tokens"].shape[1] >= 24
    logits = whole(build(name, dtype), golden["tokens"])
    assert_close(logits, golden["logits"], f"model_vs_hugging_face_{dtype}")


@pytest.mark.drawn("Each family, in one of the dtypes.")
@every_dtype
@every_model
def test_prefill_and_steps_match_hugging_face(name, dtype):
    model, golden = build(name, dtype), recorded(name)
    tokens, want = golden["tokens"], golden["logits"]
    batch, count = tokens.shape
    cache = KVCache.create(model.config, batch, count, model.dtype)
    logits, cache = grow(model, tokens[:, :PREFILL], cache)
    assert_close(logits, want[:, :PREFILL], f"model_vs_hugging_face_{dtype}")
    for t in range(PREFILL, count):
        logits, cache = grow(model, tokens[:, t : t + 1], cache)
        assert_close(logits, want[:, t : t + 1], f"model_vs_hugging_face_{dtype}")
    assert cache.lengths.tolist() == [count] * batch


# Fields that change no weight's shape: without one of them, the same weights are another model.
_NUMBERS = (
    *("norm_offset", "activation", "embed_scale", "residual_scale", "attn_scale", "logit_scale"),
    *("attn_softcap", "logit_softcap", "rope_scaling", "rope_theta_local", "window"),
    *("window_pattern", "rope_pattern"),
)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
_SET = [
    (name, field)
    for name, model in MODELS.items()
    for field in _NUMBERS
    if getattr(config_of(model), field) != _DEFAULTS[field]
]


@pytest.mark.parametrize(("name", "field"), _SET)
def test_every_setting_of_a_family_shows_in_the_record(name, field):
    """A window longer than the sequence, or a cap far above the scores, would test nothing."""
    model, golden = build(name, "float32"), recorded(name)
    unset = {field: _DEFAULTS[field]}
    if field == "window":  # which the others need
        unset |= {"window_pattern": (True,), "rope_theta_local": None}
    graph, state = nnx.split(model)
    other = nnx.merge(graph, state)
    other.config = dataclasses.replace(model.config, **unset)
    difference = relative_error(whole(other, golden["tokens"])[:, -1], golden["logits"][:, -1])
    assert difference > 4 * TOLERANCES["model_vs_hugging_face_bfloat16"].relative


@pytest.mark.parametrize("name", LLAMA_ROPES)
def test_rope_of_the_presets_matches_hugging_face(name):
    got = inverse_frequencies(preset(name))
    assert_close(got[:, None], recorded("rope")[name][:, None], "frequencies_vs_hugging_face")


def test_records_say_what_made_them_and_are_small():
    files = sorted(GOLDENS.glob("*.npz"))
    assert {file.stem for file in files} == {*MODELS, "rope", "lora", "quantized"}
    for file in files:
        golden = recorded(file.stem)
        if file.stem == "quantized":
            golden = dict(one.split() for one in golden["versions"])
            assert golden["gptqmodel"][0].isdigit() and golden["compressed-tensors"][0].isdigit()
        if file.stem == "lora":
            golden = ast.literal_eval(str(golden["versions"]))
            assert golden["peft"][0].isdigit(), file
        assert str(golden["torch"])[0].isdigit(), file
        assert str(golden["transformers"])[0].isdigit(), file
    assert sum(file.stat().st_size for file in files) < 1 << 20


def test_records_were_made_from_todays_recipe():
    """Weights are drawn anew for every test, and logits of others would tell nothing."""
    for name, model in MODELS.items():
        np.testing.assert_array_equal(recorded(name)["tokens"], model.tokens(), err_msg=name)
        for weight in model.weights().values():
            assert weight.dtype == np.float32
            np.testing.assert_array_equal(weight.astype(jnp.bfloat16).astype(np.float32), weight)
