"""Configurations: published sizes, plain data and back, and sentences for impossible ones."""

import dataclasses
import json
import math
import re
from typing import Any

import jax
import pytest
from flax import nnx

from ffjax.config import PRESETS, ModelConfig, RopeScaling, preset
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
        # What their safetensors hold, as the model pages state it.
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("llama3.1-8b", 8_030_261_248),
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


@pytest.mark.parametrize("scaling", [None, RopeScaling(**SCALING)])
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
    assert isinstance(again.rope_scaling, RopeScaling if scaling else type(None))
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
    with pytest.raises(ValueError, match=r"has no field bias, window; its fields are ffw_dim, "):
        ModelConfig.from_dict(SIZES | {"window": 4, "bias": True})
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


@pytest.mark.parametrize(
    ("scaling", "sentence"),
    [
        (
            {"rope_type": "yarn", "factor": 2.0},
            "rope_scaling has the fields factor, high_freq_factor, low_freq_factor, "
            "original_context; got factor, rope_type.",
        ),
        ({}, "rope_scaling has the fields factor, .*; got none."),
        ("llama3", "rope_scaling is a table of fields or null, got 'llama3'."),
    ],
)
def test_rope_scalings_of_another_form_get_a_sentence(scaling, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        ModelConfig.from_dict(SIZES | {"rope_scaling": scaling})
