"""Rounding to formats with 16-bit scales and offsets, and what they stand for."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from quantize_cases import GROUPED, by_hand, model_to_quantize, named_arrays

import checkpoints
from ffjax.config import ModelConfig
from ffjax.formats import WeightFormat, WeightFormats, int4
from ffjax.quantization import dequantize, quantize
from ffjax.rounding import expand, random_matrix, round_matrix

pytestmark = pytest.mark.filterwarnings("error")

FORMATS = {
    "float16": int4(32, "float16"),
    "zero": int4(32, "float16", "zero"),
    "minimum": int4(64, "float16", "minimum"),
    "zero, bfloat16": int4(128, "bfloat16", "zero"),
    "int8": WeightFormat(bits=8, group_size=32, scale_dtype="float16"),
}
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def rounded(weight: np.ndarray, format: WeightFormat) -> tuple[np.ndarray, np.ndarray]:
    integers, scale = round_matrix(jnp.asarray(weight), format)
    return np.asarray(integers), np.asarray(scale)


def weights(seed: int = 0, out: int = 16, inputs: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((out, inputs)).astype(np.float32)


@every_format
def test_shapes_and_dtypes_are_those_of_the_format(format):
    integers, scale = rounded(weights(), format)
    assert scale.dtype == format.scale_dtype
    assert scale.shape == format.shape_of_scales(16, 256)
    assert integers.dtype == (np.int32 if format.bits == 4 else np.int8)


@every_format
def test_expanded_weights_are_those_by_hand(format):
    integers, scale = rounded(weights(1), format)
    got = expand(jnp.asarray(integers), jnp.asarray(scale), format, jnp.float32)
    want = by_hand(integers, scale, format)
    assert np.asarray(got).tobytes() == want.astype(np.float32).tobytes()


@pytest.mark.parametrize("offset", ["zero", "minimum"])
def test_weights_are_off_by_half_a_scale_unless_the_range_was_narrowed(offset):
    weight = weights(2)
    integers, scale = rounded(weight, int4(32, "float16", offset))
    error = np.abs(by_hand(integers, scale, int4(32, "float16", offset)) - weight)
    step = np.abs(scale[..., 0].astype(np.float32)).repeat(32, axis=1)
    # A zero point is a whole number: both ends of the range move by half a scale at most.
    assert (error <= 1.01 * step).mean() > 0.9
    assert (error <= 2.5 * step).all()


@pytest.mark.parametrize("offset", ["zero", "minimum"])
def test_an_offset_leaves_less_error_where_weights_are_not_around_zero(offset):
    weight = np.abs(weights(3)) + np.float32(0.5 if offset == "minimum" else 0)
    sizes = []
    for kind in (None, offset):
        integers, scale = rounded(weight, int4(32, "float16", kind))
        exact = by_hand(integers, scale, int4(32, "float16", kind))
        sizes.append(np.linalg.norm(exact - weight))
    assert sizes[1] < 0.7 * sizes[0]


@every_format
def test_rows_of_zeros_and_of_one_number_stay_what_they_are(format):
    weight = weights(4)
    weight[1], weight[2] = 0, 0.25
    integers, scale = rounded(weight, format)
    exact = by_hand(integers, scale, format)
    assert not exact[1].any()
    np.testing.assert_allclose(exact[2], 0.25, rtol=4e-3)


def test_float16_scales_of_small_weights_are_none_that_loses_bits():
    _, scale = rounded(weights(5) * np.float32(1e-6), int4(32, "float16"))
    assert (np.abs(scale) >= np.float16(2**-14)).all()


@every_format
def test_random_ones_have_unit_gain_and_no_mean(format):
    from flax import nnx

    integers, scale = random_matrix(nnx.Rngs(0), (512, 256), format)
    exact = by_hand(np.asarray(integers), np.asarray(scale), format)
    assert 0.9 < exact.std() * 16 < 1.2
    assert abs(exact.mean()) < 0.05 * exact.std()


def test_a_model_is_quantized_with_an_offset(tmp_path):
    model = quantize(model_to_quantize(), "int4", 32, offset="minimum")
    assert model.config.weights == WeightFormats.of_layers(int4(32, "bfloat16", "minimum"))
    checkpoints.save(model, tmp_path / "m")
    again = checkpoints.load(tmp_path / "m")
    assert again.config == model.config
    for name, array in named_arrays(again).items():
        assert array.tobytes() == named_arrays(model)[name].tobytes(), name
    whole = named_arrays(dequantize(model, jnp.float32))["layers.down"]
    first = named_arrays(model_to_quantize())["layers.down"].astype(np.float32)
    assert np.linalg.norm(whole - first) < 0.1 * np.linalg.norm(first)
    with pytest.raises(TypeError, match="offset='zero' was given beside it"):
        quantize(model_to_quantize(), WeightFormats(down=int4(32)), offset="zero")


@pytest.mark.parametrize("name", GROUPED)
def test_a_configuration_of_them_comes_back_from_its_data(name):
    fields = model_to_quantize().config.to_dict()
    sizes = {"model_dim": 256, "ffw_dim": 384, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    config = ModelConfig.from_dict(
        fields | sizes | {"weights": GROUPED[name].to_dict(), "tied_embeddings": False}
    )
    assert config.weights == GROUPED[name]
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"bits": 4, "group_size": 32, "scale_dtype": "float32"}, "bfloat16 or float16, got"),
        ({"bits": 8, "scale_dtype": "float16"}, "of a row is float32, got scale_dtype='float16'"),
        ({"bits": 4, "group_size": 32, "offset": "most"}, "'zero', 'minimum' or None, got"),
        ({"bits": 8, "group_size": 32, "offset": "zero"}, "no second number beside their scales"),
        ({"bits": 8, "group_size": 64}, r"or groups of 32\. Got group_size=64"),
    ],
)
def test_formats_that_cannot_be_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        WeightFormat(**fields)
