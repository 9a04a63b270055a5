"""The reference model against logits recorded from Hugging Face transformers.

`record_hf_logits.py` made the records; neither torch nor transformers is needed here.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_models import GOLDENS, LLAMA_ROPES, MODELS
from numerics import assert_close
from reference_cases import DTYPES, filled_model

from ffjax.cache import KVCache
from ffjax.config import ModelConfig, RopeScaling, preset
from ffjax.model import Transformer
from ffjax.rope import inverse_frequencies

pytestmark = pytest.mark.filterwarnings("error")

PREFILL = 17  # of 29 tokens; the rest comes step by step

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_model = pytest.mark.parametrize("name", MODELS)


def config_of(settings: dict[str, Any]) -> ModelConfig:
    """Hugging Face's settings as ours."""
    rope, scaling = settings["rope_parameters"], None
    if rope["rope_type"] == "llama3":
        scaling = RopeScaling(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_context=rope["original_max_position_embeddings"],
        )
    return ModelConfig(
        vocab_size=settings["vocab_size"],
        num_layers=settings["num_hidden_layers"],
        model_dim=settings["hidden_size"],
        ffw_dim=settings["intermediate_size"],
        num_heads=settings["num_attention_heads"],
        num_kv_heads=settings["num_key_value_heads"],
        head_dim=settings["head_dim"],
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling,
        norm_eps=settings["rms_norm_eps"],
        tied_embeddings=settings["tie_word_embeddings"],
    )


@functools.cache
def build(name: str, dtype: str) -> Transformer:
    """The model with the recipe's weights; bfloat16 holds them exactly."""
    config, weights = config_of(MODELS[name].settings), MODELS[name].weights()

    def stacked(*parts: str) -> np.ndarray:
        return np.stack(
            [
                np.concatenate([weights.pop(f"model.layers.{i}.{part}.weight") for part in parts])
                for i in range(config.num_layers)
            ]
        )

    ours = {
        "embed": weights.pop("model.embed_tokens.weight"),
        "layers.attn_norm": stacked("input_layernorm"),
        "layers.qkv": stacked(*(f"self_attn.{x}_proj" for x in "qkv")),
        "layers.attn_out": stacked("self_attn.o_proj"),
        "layers.mlp_norm": stacked("post_attention_layernorm"),
        "layers.gate_up": stacked("mlp.gate_proj", "mlp.up_proj"),
        "layers.down": stacked("mlp.down_proj"),
        "final_norm": weights.pop("model.norm.weight"),
    }
    if not config.tied_embeddings:
        ours["head"] = weights.pop("lm_head.weight")
    assert not weights
    return filled_model(config, ours, dtype)


def recorded(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


@every_dtype
@every_model
def test_whole_sequences_match_hugging_face(name, dtype):
    golden = recorded(name)
    assert golden["tokens"].shape[1] >= 24
    logits = nnx.jit(lambda model, tokens: model(tokens))(build(name, dtype), golden["tokens"])
    assert_close(logits, golden["logits"], f"model_vs_hugging_face_{dtype}")


@every_dtype
@every_model
def test_prefill_and_steps_match_hugging_face(name, dtype):
    model, golden = build(name, dtype), recorded(name)
    tokens, want = golden["tokens"], golden["logits"]
    batch, count = tokens.shape
    grow = nnx.jit(lambda model, tokens, cache: model(tokens, cache))
    cache = KVCache.create(model.config, batch, count, model.dtype)
    logits, cache = grow(model, tokens[:, :PREFILL], cache)
    assert_close(logits, want[:, :PREFILL], f"model_vs_hugging_face_{dtype}")
    for t in range(PREFILL, count):
        logits, cache = grow(model, tokens[:, t : t + 1], cache)
        assert_close(logits, want[:, t : t + 1], f"model_vs_hugging_face_{dtype}")
    assert cache.lengths.tolist() == [count] * batch


@pytest.mark.parametrize("name", LLAMA_ROPES)
def test_rope_of_the_presets_matches_hugging_face(name):
    got = inverse_frequencies(preset(name))
    assert_close(got[:, None], recorded("rope")[name][:, None], "frequencies_vs_hugging_face")


def test_records_say_what_made_them_and_are_small():
    files = sorted(GOLDENS.glob("*.npz"))
    assert {file.stem for file in files} == {*MODELS, "rope"}
    for file in files:
        golden = recorded(file.stem)
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
