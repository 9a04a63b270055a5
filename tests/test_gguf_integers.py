"""GGUF files whose integers stay: Q4_0, Q4_1 and Q8_0, number by number."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import blocks, interleaved, whole, write_gguf
from gguf_vocabularies import byte_vocabulary
from hf_models import MODELS, HFModel
from quantize_cases import INT8_GROUPS, by_hand, named_arrays, numbers_of

import checkpoints
from checkpoints.gguf import GGUFFile
from ffjax.cli import main
from ffjax.formats import FLOATING, WeightFormats, int4
from ffjax.quantization import dequantize

pytestmark = pytest.mark.filterwarnings("error")

_MODEL = HFModel(
    7,
    {
        **MODELS["tied"].settings,
        "num_hidden_layers": 2,
        "vocab_size": 40,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "tie_word_embeddings": False,
    },
)
_SHAPES = {
    "attn_q": (64, 64),
    "attn_k": (32, 64),
    "attn_v": (32, 64),
    "attn_output": (64, 64),
    "ffn_gate": (96, 64),
    "ffn_up": (96, 64),
    "ffn_down": (64, 96),
}
_FORMATS = {
    "Q4_0": int4(32, "float16"),
    "Q4_1": int4(32, "float16", "minimum"),
    "Q8_0": INT8_GROUPS,
}
_PARTS = {
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "attn_out": ("attn_output",),
    "gate_up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
}


def written(tmp_path: Path, kind: str, **kinds: str) -> tuple[Path, dict[str, np.ndarray]]:
    """A file of random blocks: all of one kind but some; and their bytes by GGUF's name."""
    raw = {}
    for layer in range(2):
        for name, (rows, inputs) in _SHAPES.items():
            called = f"blk.{layer}.{name}.weight"
            own = kinds.get(f"{name}_{layer}", kind)
            stored = blocks(own, rows, inputs, 10 * layer + len(raw))
            raw[called] = (stored, own)
    raw["output.weight"] = (
        blocks(kinds.get("output", kind), 40, 64, 99),
        kinds.get("output", kind),
    )
    file = write_gguf(tmp_path / f"{kind}.gguf", _MODEL, raw=raw, **byte_vocabulary())
    return file, raw


def in_our_order(name: str, rows: np.ndarray) -> np.ndarray:
    """Rows as ours are: GGUF's of queries and keys have RoPE's pairs side by side."""
    heads = {"attn_q": 2, "attn_k": 1}.get(name, 0)
    if not heads:
        return rows
    made = np.empty_like(rows)
    made[interleaved(np.arange(len(rows)), heads)] = rows
    return made


@pytest.mark.parametrize("kind", _FORMATS)
def test_the_integers_and_scales_are_those_of_the_blocks(kind, tmp_path):
    file, raw = written(tmp_path, kind)
    model = checkpoints.load(file)
    format = _FORMATS[kind]
    assert model.config.weights == WeightFormats.of_layers(format, format)
    arrays = named_arrays(model)
    for ours, parts in _PARTS.items():
        for layer in range(2):
            stored = np.concatenate(
                [in_our_order(n, raw[f"blk.{layer}.{n}.weight"][0]) for n in parts]
            )
            split = stored.reshape(len(stored), -1, {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind])
            scale, integers = arrays[f"layers.{ours}_scale"][layer], arrays[f"layers.{ours}"][layer]
            halves = np.ascontiguousarray(split[..., : 4 if kind == "Q4_1" else 2])
            assert scale.tobytes() == halves.tobytes(), ours
            if kind == "Q8_0":
                assert integers.tobytes() == split[..., 2:].tobytes(), ours
                continue
            nibbles = split[..., 4 if kind == "Q4_1" else 2 :]
            numbers = np.concatenate([nibbles % 16, nibbles // 16], axis=-1)
            assert (numbers_of(integers) == numbers.reshape(len(stored), -1)).all(), ours
    exact = whole(kind, raw["output.weight"][0])
    np.testing.assert_array_equal(
        by_hand(arrays["head"], arrays["head_scale"], format), exact.astype(np.float64)
    )


@pytest.mark.parametrize("kind", _FORMATS)
def test_weights_are_those_of_the_file_made_whole(kind, tmp_path):
    file, _ = written(tmp_path, kind)
    kept, made = checkpoints.load(file), checkpoints.load(file, dtype="float32", integers=False)
    assert made.config.weights == FLOATING
    want = named_arrays(made)
    for name, found in named_arrays(dequantize(kept, jnp.float32)).items():
        np.testing.assert_allclose(found, want[name], rtol=1e-6, atol=1e-9, err_msg=name)


def test_a_matrix_of_several_types_is_kept_where_one_format_holds_them(tmp_path):
    """Q4_0 is Q4_1 whose minimum is -8 scales; Q8_0 and Q6_K are neither."""
    mixed = {"ffn_down_1": "Q4_1", "attn_v_0": "Q8_0", "output": "Q5_1"}
    file, raw = written(tmp_path, "Q4_0", **mixed)
    model = checkpoints.load(file)
    four, both = int4(32, "float16"), int4(32, "float16", "minimum")
    assert model.config.weights == WeightFormats(attn_out=four, gate_up=four, down=both)
    arrays = named_arrays(model)
    for layer, kind in enumerate(("Q4_0", "Q4_1")):
        got = by_hand(arrays["layers.down"][layer], arrays["layers.down_scale"][layer], both)
        np.testing.assert_array_equal(got, whole(kind, raw[f"blk.{layer}.ffn_down.weight"][0]))
    incoming = GGUFFile.open(file)
    assert incoming.dtypes == {"BF16": 1, "F32": 5, "Q4_0": 12, "Q4_1": 1, "Q5_1": 1, "Q8_0": 1}
    # Those that are made whole; integers are not rounded.
    assert incoming.rounded("bfloat16") == {"F32": 5, "Q4_0": 5, "Q5_1": 1, "Q8_0": 1}


def test_a_checkpoint_keeps_them_and_a_whole_one_does_not(tmp_path, capsys):
    file, _ = written(tmp_path, "Q4_1")
    assert main(["convert", str(file), str(tmp_path / "kept")]) == 0
    said = capsys.readouterr().out
    assert "Kept the integers of int4 in groups of 32 with float16 scales and minima: qkv" in said
    want, got = named_arrays(checkpoints.load(file)), checkpoints.load(tmp_path / "kept")
    assert {k: v.tobytes() for k, v in named_arrays(got).items()} == {
        k: v.tobytes() for k, v in want.items()
    }
    assert main(["inspect", str(tmp_path / "kept")]) == 0
    assert "int4 in groups of 32 with float16 scales and minima" in capsys.readouterr().out
    assert main(["convert", str(file), str(tmp_path / "whole"), "--whole"]) == 0
    assert checkpoints.load(tmp_path / "whole").config.weights == FLOATING
    # What is to be rounded anew is made whole before.
    asked = ["quantize", str(file), str(tmp_path / "int8"), "--weights", "int8"]
    assert main(asked) == 0
    assert str(checkpoints.load(tmp_path / "int8").config.weights).startswith("int8: qkv")


def test_a_minimum_that_float16_does_not_hold_is_refused(tmp_path):
    file, raw = written(tmp_path, "Q4_0", ffn_down_1="Q4_1")
    data = bytearray(file.read_bytes())
    stored = raw["blk.0.ffn_down.weight"][0]
    at = bytes(data).index(stored.tobytes())
    data[at : at + 2] = np.float16(60_000).tobytes()
    file.write_bytes(data)
    with pytest.raises(checkpoints.CheckpointError, match=r"so large that its minimum is no float"):
        checkpoints.load(file)


def test_the_package_decodes_the_same(tmp_path):
    """Against ggml's own arithmetic, in numpy."""
    for kind, format in _FORMATS.items():
        file, raw = written(tmp_path, kind)
        arrays = named_arrays(checkpoints.load(file))
        stored, _ = raw["blk.1.ffn_down.weight"]
        exact = gguf.dequantize(stored, gguf.GGMLQuantizationType[kind])
        got = by_hand(arrays["layers.down"][1], arrays["layers.down_scale"][1], format)
        np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-9)


def test_a_format_of_the_head_alone_leaves_the_layers(tmp_path):
    file, _ = written(tmp_path, "Q5_0", output="Q8_0")
    config = checkpoints.load(file).config
    assert config.weights == WeightFormats(head=INT8_GROUPS)
    assert dataclasses.replace(config, weights=FLOATING).tied_embeddings is False
