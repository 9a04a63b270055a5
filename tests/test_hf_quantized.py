"""Quantized Hugging Face folders: their integers, number by number, and what is refused."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hf_folders import config_json, tensors_of
from hf_models import MODELS, HFModel
from hf_quantized_cases import (
    MODEL,
    PARTS,
    RECORDED,
    RECORDED_TOKENS,
    Folder,
    recorded,
    write_quantized,
)
from numerics import assert_close
from quantize_cases import named_arrays, numbers_of
from reference_cases import quick_jit
from safetensors.numpy import save_file
from test_hf_goldens import by_halves

import checkpoints
from ffjax.cli import main
from ffjax.formats import FLOATING, INT8, Offset, ScaleType, WeightFormats, int4
from ffjax.quantization import dequantize

pytestmark = [
    pytest.mark.once(
        "A sample of formats shows that a JAX takes the arrays.",
        sample=[
            "test_matrices_and_logits_are_those_of_the_formats_own_library[packed]",
            "test_matrices_and_logits_are_those_of_the_formats_own_library[gptq]",
            "test_matrices_and_logits_are_those_of_the_formats_own_library[awq]",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

LAYOUTS = ("gptq", "gptq_v2", "awq", "packed")


def check_integers(
    folder: Folder, size: int, offset: Offset | None, dtype: ScaleType = "float16"
) -> Any:
    """Whether our integers and scales are the folder's, bit by bit."""
    model = checkpoints.load(folder.path)
    assert model.config.weights == WeightFormats.of_layers(int4(size, dtype, offset))
    arrays = named_arrays(model)
    for ours in PARTS:
        for layer in range(2):
            n = folder.fused(ours, layer, "numbers")
            assert (numbers_of(arrays[f"layers.{ours}"][layer]) == n).all(), ours
            scale = folder.fused(ours, layer, "scales").astype(dtype)
            times = n.shape[1] // size // scale.shape[1]
            scale = scale.repeat(times, axis=1)
            kept = arrays[f"layers.{ours}_scale"][layer]
            if offset is None:
                assert kept.tobytes() == scale.tobytes(), ours
                continue
            assert kept[..., 0].tobytes() == scale.tobytes(), ours
            z = folder.fused(ours, layer, "zeros").repeat(times, axis=1)
            assert (kept[..., 1].astype(np.int64) == z).all(), ours
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", [128, 64, 32])
def test_integers_zero_points_and_scales_are_those_of_the_folder(layout, group, tmp_path):
    check_integers(write_quantized(tmp_path / "m", layout, group=group), group, "zero")


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "packed"])
def test_symmetric_ones_have_no_zero_points(layout, tmp_path):
    check_integers(write_quantized(tmp_path / "m", layout, symmetric=True), 128, None)


@pytest.mark.parametrize("layout", ["gptq", "packed"])
def test_a_scale_of_a_whole_row_stands_for_each_of_its_groups(layout, tmp_path):
    folder = write_quantized(tmp_path / "m", layout, group=None, symmetric=True)
    model = check_integers(folder, 128, None)
    scales = named_arrays(model)["layers.down_scale"]
    assert scales.shape == (2, 128, 2)
    assert (scales[..., 0] == scales[..., 1]).all()


def test_bfloat16_scales_stay_bfloat16(tmp_path):
    folder = write_quantized(tmp_path / "m", "packed", symmetric=True, dtype=ml_dtypes.bfloat16)
    check_integers(folder, 128, None, "bfloat16")


def test_zero_points_that_are_not_packed_are_read(tmp_path):
    folder = write_quantized(tmp_path / "m", "packed")
    name = "model.layers.0.mlp.down_proj"
    extra = {f"{name}.weight_zero_point": (folder.zeros[name] - 8).astype(np.int8)}
    check_integers(write_quantized(tmp_path / "n", "packed", extra=extra), 128, "zero")


def test_int8_with_a_scale_a_row(tmp_path):
    folder = write_quantized(tmp_path / "m", "int8", group=None, dtype=ml_dtypes.bfloat16)
    model = checkpoints.load(folder.path)
    assert model.config.weights == WeightFormats.of_layers(INT8)
    arrays = named_arrays(model)
    for ours in PARTS:
        n, scale = (folder.fused(ours, 1, what) for what in ("numbers", "scales"))
        assert arrays[f"layers.{ours}"][1].tobytes() == n.tobytes()
        assert (arrays[f"layers.{ours}_scale"][1] == scale[:, 0].astype(np.float32)).all()


PARTLY = HFModel(
    8,
    {
        **MODELS["phi3"].settings,
        "num_hidden_layers": 2,
        "vocab_size": 40,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {
            **MODELS["phi3"].settings["rope_parameters"],
            **{"short_factor": [1.0] * 24, "long_factor": [2.0] * 24},
        },
    },
    "phi3",
)


@pytest.mark.parametrize("layout", ["gptq", "int8"])
def test_heads_of_which_a_part_is_rotated_are_put_in_our_order(layout, tmp_path):
    """Integers, scales and zero points alike."""
    group = None if layout == "int8" else 64
    folder = write_quantized(tmp_path / "m", layout, model=PARTLY, group=group)
    model = checkpoints.load(folder.path)
    arrays, name = named_arrays(model), "model.layers.{}.self_attn.qkv_proj"
    n, z, s = (
        by_halves(np.stack([getattr(folder, what)[name.format(i)] for i in range(2)]), model.config)
        for what in ("numbers", "zeros", "scales")
    )
    assert not (n == np.stack([folder.numbers[name.format(i)] for i in range(2)])).all()
    kept = arrays["layers.qkv_scale"]
    if layout == "int8":
        assert (arrays["layers.qkv"] == n).all()
        assert (kept == s[..., 0].astype(np.float32)).all()
        return
    assert (np.stack([numbers_of(words) for words in arrays["layers.qkv"]]) == n).all()
    assert (kept[..., 0] == s).all()
    assert (kept[..., 1] == z).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_made_whole_are_those_that_integers_stand_for(layout, tmp_path):
    folder = write_quantized(tmp_path / "m", layout, group=64)
    exact = named_arrays(dequantize(checkpoints.load(folder.path), jnp.float32))
    made = checkpoints.load(folder.path, dtype="float32", integers=False)
    assert made.config.weights == FLOATING
    for name, array in named_arrays(made).items():
        assert array.tobytes() == exact[name].tobytes(), name
    name = "model.layers.1.mlp.down_proj"
    n, z, s = (getattr(folder, what)[name] for what in ("numbers", "zeros", "scales"))
    want = (n - z.repeat(64, axis=1)) * s.astype(np.float64).repeat(64, axis=1)
    np.testing.assert_array_equal(exact["layers.down"][1], want.astype(np.float32))


def test_the_model_computes_with_them(tmp_path):
    folder = write_quantized(tmp_path / "m", "awq")
    model, tokens = checkpoints.load(folder.path), jnp.arange(6)[None]
    run = quick_jit(lambda model, tokens: model(tokens))
    whole = checkpoints.load(folder.path, integers=False)
    assert_close(np.asarray(run(model, tokens)), np.asarray(run(whole, tokens)), "fused_vs_model")


def test_a_checkpoint_keeps_them_and_inspect_says_so(tmp_path, capsys):
    folder = write_quantized(tmp_path / "m", "gptq", biases=True)
    assert main(["inspect", str(folder.path)]) == 0
    said = capsys.readouterr().out
    assert "int4 in groups of 128 with float16 scales and zero points" in said
    assert main(["convert", str(folder.path), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "Kept the integers of int4 in groups of 128 with float16 scales and zero points" in out
    assert "Left out 14 tensors that the model has no use for" in out
    want, got = checkpoints.load(folder.path), checkpoints.load(tmp_path / "out")
    assert got.config == want.config
    for name, array in named_arrays(got).items():
        assert array.tobytes() == named_arrays(want)[name].tobytes(), name


# float8


def write_fp8(path: Path, scales: str) -> dict[str, np.ndarray]:
    """A folder of float8, with a scale a "tensor", "row" or "square"; its weights, float32."""
    rng, tensors, want = np.random.default_rng(5), {}, {}
    for name, array in tensors_of(MODEL).items():
        tensors[name] = array
        if array.ndim != 2 or not name.startswith("model.layers."):
            continue
        out, inputs = array.shape
        numbers = rng.standard_normal(array.shape).astype(ml_dtypes.float8_e4m3fn)
        shape = {"tensor": (1,), "row": (out, 1), "square": (-(-out // 128), -(-inputs // 128))}
        scale = rng.uniform(0.01, 0.02, shape[scales]).astype(np.float32)
        tensors[name] = numbers
        tensors[f"{name}_scale{'_inv' if scales == 'square' else ''}"] = scale
        wide = scale
        if scales == "square":
            wide = scale.repeat(128, axis=0).repeat(128, axis=1)[:out, :inputs]
        want[name] = numbers.astype(np.float32) * wide
    said: dict[str, Any] = {"quant_method": "fp8"}
    if scales == "square":
        said["weight_block_size"] = [128, 128]
    if scales == "row":
        said = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    path.mkdir()
    data = config_json(MODEL, quantization_config=said)
    (path / "config.json").write_text(json.dumps(data))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return want


@pytest.mark.parametrize("scales", ["tensor", "row", "square"])
def test_float8_is_made_whole(scales, tmp_path):
    want = write_fp8(tmp_path / "m", scales)
    model = checkpoints.load(tmp_path / "m", dtype="float32")
    assert model.config.weights == FLOATING
    arrays = named_arrays(model)
    for ours, parts in PARTS.items():
        rows = np.concatenate([want[f"model.layers.1.{part}.weight"] for part in parts])
        assert arrays[f"layers.{ours}"][1].tobytes() == rows.tobytes(), ours


# What is refused


def refused(folder: Folder, sentence: str, **how: Any) -> None:
    with pytest.raises(checkpoints.CheckpointError, match=sentence):
        checkpoints.load(folder.path, **how)


@pytest.mark.parametrize(
    ("layout", "fields", "sentence"),
    [
        ("gptq", {"bits": 8}, r"says bits=8, which is not supported\. Supported: 4\."),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ("awq", {"version": "gemv"}, r"version='gemv'.*Supported: 'gemm'"),
        ("packed", {"format": "marlin-24"}, "format='marlin-24'"),
        ("packed", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ("packed", {"quant_method": "bitsandbytes"}, "quantization_config .*: quantized weights"),
    ],
)
def test_other_layouts_are_refused(layout, fields, sentence, tmp_path):
    refused(write_quantized(tmp_path / "m", layout, **fields), sentence)


def test_inputs_in_an_order_of_their_own_are_refused(tmp_path):
    order = np.random.default_rng(0).permutation(np.arange(256) // 128)
    folder = write_quantized(tmp_path / "m", "gptq", g_idx=order, desc_act=True)
    refused(folder, r"down_proj\.g_idx of .* in the order of their activations \(desc_act\)")
    # Made whole, each input has its own group's scale.
    made = named_arrays(checkpoints.load(folder.path, dtype="float32", integers=False))
    name = "model.layers.1.mlp.down_proj"
    n, z, s = (getattr(folder, what)[name] for what in ("numbers", "zeros", "scales"))
    want = (n - z[:, order]) * s.astype(np.float64)[:, order]
    np.testing.assert_array_equal(made["layers.down"][1], want.astype(np.float32))


def test_an_order_of_groups_of_other_sizes_is_refused(tmp_path):
    order = np.arange(256) // 128
    order[128] = 0
    folder = write_quantized(tmp_path / "m", "gptq", g_idx=order, desc_act=True)
    refused(folder, "in the order of their activations", integers=False)


def test_a_symmetric_model_whose_zero_points_are_not_is_refused(tmp_path):
    folder = write_quantized(tmp_path / "m", "gptq", sym=True)
    refused(folder, r"says that 8 stands for 0 \(sym\), and .*qzeros says otherwise")


def test_scales_that_no_16_bits_hold_are_refused_unless_made_whole(tmp_path):
    rough = write_quantized(tmp_path / "m", "packed", symmetric=True, dtype=np.float32)
    refused(rough, r"Scales of groups are 16-bit numbers; .*weight_scale .* is F32.*--whole")
    model = checkpoints.load(rough.path, dtype="float32", integers=False)
    name = "model.layers.0.self_attn.o_proj"
    want = (rough.numbers[name] - 8).astype(np.float32) * rough.scales[name].repeat(128, axis=1)
    assert named_arrays(model)["layers.attn_out"][0].tobytes() == want.tobytes()


def test_float32_scales_that_16_bits_hold_are_taken(tmp_path):
    folder = write_quantized(tmp_path / "m", "packed", symmetric=True)
    exact = {
        f"{name}.weight_scale": scale.astype(np.float32) for name, scale in folder.scales.items()
    }
    again = write_quantized(tmp_path / "n", "packed", symmetric=True, extra=exact)
    check_integers(again, 128, None)


@pytest.mark.parametrize("lost", ["qzeros", "scales"])
def test_a_part_that_is_missing_is_named(lost, tmp_path):
    from safetensors.numpy import load_file

    folder = write_quantized(tmp_path / "m", "gptq")
    file = folder.path / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.mlp.up_proj.{lost}"]
    save_file(tensors, file)
    refused(folder, rf"has no model\.layers\.1\.mlp\.up_proj\.{lost}")


# What the formats' own libraries make of the same bytes


@functools.cache
def goldens() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "goldens" / "quantized.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", RECORDED)
def test_matrices_and_logits_are_those_of_the_formats_own_library(name, tmp_path):
    """Recorded by `record_hf_quantized.py`: each number as float16 rounds it, and the logits."""
    folder = recorded(tmp_path / "m", name)
    model = dequantize(checkpoints.load(folder.path), jnp.float32)
    arrays = named_arrays(model)
    for ours, parts in PARTS.items():
        for layer in range(2):
            rows = np.cumsum([len(folder.numbers[f"model.layers.{layer}.{p}"]) for p in parts])
            each = np.split(arrays[f"layers.{ours}"][layer], rows[:-1])
            for part, own in zip(parts, each, strict=True):
                stem = f"model.layers.{layer}.{part}"
                digest = hashlib.sha256(own.astype(np.float16).tobytes()).hexdigest()
                assert digest == str(goldens()[f"{name}/{stem}"]), stem
    whole = checkpoints.load(folder.path, dtype="float32", integers=False)
    for ours in PARTS:
        param = getattr(whole.layers, ours)
        param[...] = param[...].astype(jnp.float16).astype(jnp.float32)
    logits = quick_jit(lambda model, tokens: model(tokens))(whole, jnp.array(RECORDED_TOKENS))
    assert_close(logits, goldens()[f"{name}/logits"], "model_vs_hugging_face_float32")
