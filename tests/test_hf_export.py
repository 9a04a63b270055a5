"""A checkpoint goes out as Hugging Face has it, and comes back bit by bit."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import config_json, every_model, tensors_of, write_folder
from hf_models import MODELS
from safetensors import safe_open
from test_checkpoints import CONFIG, assert_same, build

import checkpoints
from checkpoints.hf_files import TensorWriter
from ffjax.cli import main
from ffjax.config import preset

pytestmark = [
    pytest.mark.once(
        "Files are written by ours; a sample makes models of them.",
        sample=[
            "test_import_after_export_is_the_same_model[gemma2]",
            "test_a_model_of_ours_goes_out_and_comes_back",
            "test_what_is_no_checkpoint",
            "test_a_full_disk_is_a_sentence",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]


def read_all(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor, as the safetensors library reads it, by our bytes of bfloat16."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}  # without it transformers loads nothing
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                found[name] = opened.get_tensor(name)
    return found


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A checkpoint that came in, with what lay beside the weights."""
    folder = write_folder(tmp_path_factory.mktemp("hf") / "gemma", "gemma3", shards=2)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    edited = config_json(MODELS["gemma3"], eos_token_id=[1, 2], bos_token_id=3)
    (folder / "config.json").write_text(json.dumps(edited))
    out = folder.parent / "ours"
    checkpoints.convert_hf(folder, out)
    return out


# What goes out


@every_model
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_what_came_in_goes_out_under_the_same_names_bit_by_bit(name, dtype, tmp_path):
    folder = write_folder(tmp_path / "hf", name, dtype=dtype, shards=2)
    checkpoints.convert_hf(folder, tmp_path / "ours", dtype=dtype)
    checkpoints.export_hf(tmp_path / "ours", tmp_path / "out")
    theirs, ours = tensors_of(MODELS[name], dtype), read_all(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert ours[key].shape == array.shape, key
        assert ours[key].tobytes() == array.tobytes(), key


@pytest.mark.parametrize("name", ["untied_stretched_rope", "qwen2_window", "olmo2", "gemma2"])
def test_import_after_export_is_the_same_model(name, tmp_path):
    folder = write_folder(tmp_path / "it", name)
    checkpoints.convert_hf(folder, tmp_path / "ours")
    checkpoints.export_hf(tmp_path / "ours", tmp_path / "again" / "it", shard_bytes=20_000)
    checkpoints.convert_hf(tmp_path / "again" / "it", tmp_path / "second")
    assert_same(checkpoints.load(tmp_path / "second"), checkpoints.load(tmp_path / "ours"))
    assert_same(checkpoints.load(tmp_path / "again" / "it"), checkpoints.load(folder))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_model_of_ours_goes_out_and_comes_back(dtype, tmp_path):
    checkpoints.save(build(dtype=dtype), tmp_path / "ours")
    checkpoints.export_hf(tmp_path / "ours", tmp_path / CONFIG.name)
    assert_same(checkpoints.load(tmp_path / CONFIG.name, dtype=dtype), build(dtype=dtype))
    assert json.loads((tmp_path / CONFIG.name / "config.json").read_text())["torch_dtype"] == (
        jnp.dtype(dtype).name
    )


def test_odd_numbers_go_out_bit_by_bit(tmp_path):
    model = build()
    odd = np.array([0x0000, 0x8000, 0x0001, 0x7F80, 0x7FA5], np.uint16).view(jnp.bfloat16)
    model.final_norm[...] = model.final_norm[...].at[:5].set(odd)
    checkpoints.save(model, tmp_path / "ours")
    checkpoints.export_hf(tmp_path / "ours", tmp_path / CONFIG.name)
    assert_same(checkpoints.load(tmp_path / CONFIG.name), model)


def test_large_models_go_out_in_shards(tmp_path):
    checkpoints.save(build(), tmp_path / "ours")
    told = []
    made = checkpoints.export_hf(
        tmp_path / "ours",
        tmp_path / "out",
        shard_bytes=4000,
        progress=lambda *x: told.append(x),
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = read_all(tmp_path / "out")
    assert len(made.files) > 3
    assert sorted(made.files) == made.files == sorted(set(index["weight_map"].values()))
    assert index["weight_map"].keys() == tensors.keys()
    total = sum(array.nbytes for array in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert told[-1] == (total, total)
    for file in made.files:
        with safe_open(tmp_path / "out" / file, framework="numpy") as opened:
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
        assert len(sizes) == 1 or sum(sizes) <= 4000


def test_one_file_needs_no_index(converted, tmp_path):
    made = checkpoints.export_hf(converted, tmp_path / "out")
    assert made.files == ["model.safetensors"]
    assert sorted(os.listdir(tmp_path / "out")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]


def test_what_lay_beside_the_weights_goes_out_too(converted, tmp_path):
    checkpoints.export_hf(converted, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (data["eos_token_id"], data["bos_token_id"]) == ([1, 2], 3)
    assert data["pad_token_id"] is None  # not what transformers assumes of a Gemma
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"bos_token": "<s>"}'


def test_the_command_line(converted, tmp_path, capsys):
    assert main(["export", str(converted), str(tmp_path / "out"), "--shard-gb", "0.00001"]) == 0
    out = capsys.readouterr().out
    count = len(MODELS["gemma3"].weights())
    assert f"out: Gemma3ForCausalLM, {count} tensors in " in out
    assert out.endswith(" files, bfloat16\n")
    assert main(["export", str(converted), str(tmp_path / "out")]) == 2
    assert "ffjax export: An export replaces nothing" in capsys.readouterr().err


# What cannot go out


def test_nothing_is_replaced(converted, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="replaces nothing, and there is something at"):
        checkpoints.export_hf(converted, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_what_is_no_checkpoint(converted, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint or Hugging Face folder at"):
        checkpoints.export_hf(tmp_path / "none", tmp_path / "out")
    folder = write_folder(tmp_path / "hf")
    with pytest.raises(
        checkpoints.CheckpointError,
        match="starts from a checkpoint of ffjax",
    ):
        checkpoints.export_hf(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="shard_bytes must be at least 1, got 0"):
        checkpoints.export_hf(converted, tmp_path / "out", shard_bytes=0)


def test_a_damaged_checkpoint(converted, tmp_path):
    copy = Path(shutil.copytree(converted, tmp_path / "copy"))
    largest = max((copy / "weights").rglob("*"), key=lambda file: file.stat().st_size)
    whole = largest.read_bytes()
    os.truncate(largest, 100)
    with pytest.raises(checkpoints.CheckpointError, match="has 100 bytes, and was saved with"):
        checkpoints.export_hf(copy, tmp_path / "out")
    largest.write_bytes(bytes(len(whole)))  # as long as it was
    with pytest.raises(checkpoints.CheckpointError, match=r"array .* cannot be read"):
        checkpoints.export_hf(copy, tmp_path / "out")
    largest.write_bytes(whole)
    (copy / "huggingface" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(checkpoints.CheckpointError, match=r"tokenizer_config.json has 2 bytes"):
        checkpoints.export_hf(copy, tmp_path / "out")
    assert os.listdir(tmp_path) == ["copy"]


def test_a_model_that_hugging_face_has_not(tmp_path):
    checkpoints.save(build(dataclasses.replace(CONFIG, logit_softcap=7.0)), tmp_path / "ours")
    with pytest.raises(checkpoints.CheckpointError, match=r"cannot say logit_softcap=7.0"):
        checkpoints.export_hf(tmp_path / "ours", tmp_path / "out")


def test_an_array_that_a_family_has_not(tmp_path):
    checkpoints.save(build(), tmp_path / "ours")
    file = tmp_path / "ours" / "manifest.json"
    data = json.loads(file.read_text())
    data["config"] |= {"post_norm": True}
    file.write_text(json.dumps(data))
    with pytest.raises(checkpoints.CheckpointError, match=r"'llama' have no layers.attn_post_norm"):
        checkpoints.export_hf(tmp_path / "ours", tmp_path / "out")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_an_export_that_is_broken_off_leaves_nothing(converted, tmp_path, monkeypatch, error):
    write, count = TensorWriter.write, []

    def fails(self, name, tensor):
        count.append(name)
        if len(count) == 20:
            raise error
        write(self, name, tensor)

    monkeypatch.setattr(TensorWriter, "write", fails)
    with pytest.raises(type(error)):
        checkpoints.export_hf(converted, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_a_full_disk_is_a_sentence():
    numbers = np.ones(4, np.float32)
    with (
        pytest.raises(checkpoints.CheckpointError, match="tensor x cannot be written: No space"),
        TensorWriter(Path("/dev/full"), np.float32, {"x": (4,)}) as writer,
    ):
        writer.write("x", numbers)


def test_the_shipped_model_goes_out(tmp_path):
    made = checkpoints.export_hf(checkpoints.SHIPPED_MODEL, tmp_path / "python-bytes-3m")
    assert made.architecture == "LlamaForCausalLM"
    loaded = checkpoints.load(tmp_path / "python-bytes-3m")
    assert_same(loaded, checkpoints.load(checkpoints.SHIPPED_MODEL))
    assert loaded.config == preset("python-bytes-3m")
