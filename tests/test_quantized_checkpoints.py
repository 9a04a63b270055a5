"""A quantized checkpoint comes back bit by bit, and is taken for no other."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import tensors_of, write_folder
from hf_models import MODELS
from quantize_cases import FORMATS, MIXED, model_to_quantize, named_arrays, nbytes
from reference_cases import random_tokens

import checkpoints
from ffjax.cli import main
from ffjax.commands.inspect import inspect
from ffjax.formats import WeightFormats
from ffjax.model import Transformer
from ffjax.quantization import dequantize, quantize

pytestmark = [
    pytest.mark.once(
        "Files are read by ours; a sample makes models of them.",
        sample=[
            "test_a_quantized_model_comes_back_bit_by_bit[bfloat16-mixed]",
            "test_quantize_makes_a_checkpoint_that_everything_reads",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]


def assert_same(a: Transformer, b: Transformer) -> None:
    assert a.config == b.config
    left, right = named_arrays(a), named_arrays(b)
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert (array.dtype, array.shape) == (right[name].dtype, right[name].shape), name
        assert array.tobytes() == right[name].tobytes(), name


def edit_config(path: Path, **changes) -> None:
    file = path / "manifest.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "config": {**data["config"], **changes}}))


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.fixture
def saved(tmp_path) -> Path:
    checkpoints.save(quantize(model_to_quantize(), MIXED), tmp_path / "mixed")
    return tmp_path / "mixed"


@pytest.mark.drawn("Each format, of one of the dtypes.")
@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_quantized_model_comes_back_bit_by_bit(formats, dtype, tmp_path):
    model = quantize(model_to_quantize(dtype), formats)
    checkpoints.save(model, tmp_path / "model")
    loaded = checkpoints.load(tmp_path / "model")
    assert_same(loaded, model)
    tokens = jnp.asarray(random_tokens(model.config, 1, 5))
    assert np.asarray(loaded(tokens)).tobytes() == np.asarray(model(tokens)).tobytes()


def test_a_dtype_casts_what_is_not_quantized_and_nothing_else(saved):
    asked, stored = checkpoints.load(saved, dtype=jnp.float32), checkpoints.load(saved)
    before, after = named_arrays(stored), named_arrays(asked)
    assert asked.dtype == jnp.float32
    kept = [name for name in before if name.endswith("_scale") or f"{name}_scale" in before]
    assert len(kept) == 8
    for name, array in after.items():
        want = before[name] if name in kept else before[name].astype(np.float32)
        assert (array.dtype, array.tobytes()) == (want.dtype, want.tobytes()), name


def test_a_quantized_checkpoint_is_not_loaded_into_another_configuration(saved):
    edit_config(saved, weights={})
    with pytest.raises(checkpoints.CheckpointError, match=r"head is quantized, and in the model"):
        checkpoints.load(saved)
    edit_config(saved, weights=None)
    with pytest.raises(checkpoints.CheckpointError, match=r"no possible model: weights is a table"):
        checkpoints.load(saved)


def test_another_checkpoint_is_not_loaded_into_a_quantized_configuration(tmp_path):
    checkpoints.save(model_to_quantize(), tmp_path / "plain")
    edit_config(tmp_path / "plain", weights={"down": {"bits": 8}})
    sentence = r"layers\.down is not quantized, and in the model there it is quantized\. Copy"
    with pytest.raises(checkpoints.CheckpointError, match=sentence):
        checkpoints.load(tmp_path / "plain")


def test_groups_of_another_size_are_not_those_of_the_manifest(tmp_path):
    model = quantize(model_to_quantize(), WeightFormats.from_dict({"attn_out": _int4(32)}))
    checkpoints.save(model, tmp_path / "model")
    edit_config(tmp_path / "model", weights={"attn_out": _int4(64)})
    sentence = r"attn_out_scale is bfloat16\[3, 96, 6\], .* has bfloat16\[3, 96, 3\]"
    with pytest.raises(checkpoints.CheckpointError, match=sentence):
        checkpoints.load(tmp_path / "model")


def _int4(group_size: int) -> dict[str, int]:
    return {"bits": 4, "group_size": group_size}


def test_arrays_that_the_configuration_does_not_know_are_not_saved(tmp_path):
    model = quantize(model_to_quantize(), MIXED)
    model.layers.down.set_value(model_to_quantize().layers.down[...])
    sentence = r"layers\.down is int8\[3, 96, 160\]; the model has bfloat16\[3, 96, 160\]\. Save"
    with pytest.raises(checkpoints.CheckpointError, match=sentence):
        checkpoints.save(model, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_on_disk_it_takes_what_its_formats_say(tmp_path):
    """And what Orbax and the manifest write beside it, some 40 KB."""
    shipped = checkpoints.load(checkpoints.SHIPPED_MODEL)
    for model, share in ((quantize(shipped, "int8"), 0.52), (quantize(shipped, "int4"), 0.28)):
        path = tmp_path / str(share)
        checkpoints.save(model, path)
        assert nbytes(model) < share * nbytes(shipped)
        assert nbytes(model) < size_of(path) < 1.04 * nbytes(model)


# The command line


def test_quantize_makes_a_checkpoint_that_everything_reads(tmp_path, capsys):
    out, text = tmp_path / "small", tmp_path / "text.py"
    assert main(["quantize", str(checkpoints.SHIPPED_MODEL), str(out), "--weights", "int4"]) == 0
    printed, err = capsys.readouterr()
    assert "python-bytes-3m, int4 in groups of 128: qkv, attn_out, gate_up, down; " in printed
    assert f"{size_of(out):,} bytes" in printed
    assert "quantize took" in err
    assert_same(
        checkpoints.load(out), quantize(checkpoints.load(checkpoints.SHIPPED_MODEL), "int4")
    )
    source = checkpoints.Manifest.read(out).source
    assert source is not None
    assert source["format"] == "quantized"
    assert source["of"]["name"] == "python-bytes-3m"
    assert source["of"]["source"] == checkpoints.Manifest.read(checkpoints.SHIPPED_MODEL).source
    text.write_text("import os\n" * 20)
    assert main(["eval", str(out), "--text", str(text), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["quantized"] == "int4 in groups of 128: qkv, attn_out, gate_up, down"
    assert (report["dtype"], report["bits_per_byte"] < 2) == ("bfloat16", True)
    assert main(["generate", "--model", str(out), "--prompt", "x", "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "int8", "head": "int4", "group_size": 64},
        {"weights": "int4", "head": "int8", "group_size": 32, "offset": "minimum"},
    ],
)
def test_pieces_of_blocks_are_rounded_as_the_model_is(tmp_path, monkeypatch, options):
    """The head is tied: it is rounded on its way, beside the embedding that stays."""
    monkeypatch.setattr("checkpoints.blocks._CHUNK_BYTES", 100_000)
    monkeypatch.setattr("checkpoints.blocks._BLOCK_BYTES", 200_000)
    monkeypatch.setattr("checkpoints.quantizing._PIECE", 5_000)
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in options.items())
    arguments = [one for pair in pairs for one in pair]
    shipped, out = checkpoints.SHIPPED_MODEL, tmp_path / "small"
    assert main(["quantize", str(shipped), str(out), *arguments]) == 0
    kind = options.pop("weights")
    assert_same(checkpoints.load(out), quantize(checkpoints.load(shipped), kind, **options))


def test_a_number_that_is_not_finite_is_a_sentence_and_leaves_nothing(tmp_path, capsys):
    tensors = tensors_of(MODELS["tied"])
    tensors["model.layers.1.mlp.down_proj.weight"][0, 3] = np.inf
    folder = write_folder(tmp_path / "hf", tensors=tensors)
    assert main(["quantize", str(folder), str(tmp_path / "out"), "--weights", "int8"]) == 2
    assert "layers.down of hf holds others" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["hf"]


def test_group_and_head_reach_the_model_and_a_checkpoint_is_replaced_only_when_asked(
    tmp_path, capsys
):
    shipped, out = str(checkpoints.SHIPPED_MODEL), tmp_path / "small"
    arguments = ["quantize", shipped, str(out), "--weights", "int4"]
    assert main([*arguments, "--group-size", "64", "--head", "int8"]) == 0
    config = checkpoints.load(out).config
    assert str(config.weights) == "int4 in groups of 64: qkv, attn_out, gate_up, down; int8: head"
    assert not config.tied_embeddings
    assert main(arguments) == 2
    assert "there is something at" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert checkpoints.load(out).config.weights.head is None
    assert main(["quantize", str(out), str(tmp_path / "again"), "--weights", "int8"]) == 2
    assert "quantized already (int4" in capsys.readouterr().err


def test_a_hugging_face_folder_is_quantized_with_its_tokenizer(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf")
    (folder / "tokenizer.json").write_text("{}")
    assert main(["quantize", str(folder), str(tmp_path / "ours"), "--weights", "int8"]) == 0
    assert checkpoints.tokenizer_directory(tmp_path / "ours") is not None
    assert set(checkpoints.load(tmp_path / "ours").config.weights.quantized) == {
        *("qkv", "attn_out", "gate_up", "down")
    }


def test_inspect_names_the_format(saved, capsys):
    report = inspect(saved)
    assert report["quantized"] == str(MIXED)
    assert report["weight_bytes"] == nbytes(checkpoints.load(saved))
    assert report["dtypes"] == {"bfloat16": 8, "int32": 3, "float32": 1, "int8": 1}
    assert "compute capability 8.0 or newer" in report["why_not_fused"]
    assert main(["inspect", str(saved)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["quantized"] == str(MIXED)
    assert "weights" not in lines["configuration"]
    assert inspect(checkpoints.SHIPPED_MODEL)["quantized"] is None


def test_an_export_refuses_it_and_takes_what_was_dequantized(saved, tmp_path, capsys):
    assert main(["export", str(saved), str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "An export rounds nothing, and Hugging Face's tensors are not quantized" in err
    assert "Traceback" not in err
    model = dequantize(checkpoints.load(saved))
    checkpoints.save(model, tmp_path / "plain")
    checkpoints.export_hf(tmp_path / "plain", tmp_path / "out")
    assert_weights(checkpoints.load(tmp_path / "out"), model)


def assert_weights(a: Transformer, b: Transformer) -> None:
    left, right = named_arrays(a), named_arrays(b)
    assert {k: v.tobytes() for k, v in left.items()} == {k: v.tobytes() for k, v in right.items()}
