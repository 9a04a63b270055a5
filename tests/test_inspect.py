"""`ffjax inspect` says what a checkpoint is, and whether the fused kernel can run it here."""

import json
import os
import shutil

import jax.numpy as jnp
import pytest
from flax import nnx
from hf_folders import FOLDERS, write_folder
from hf_models import MODELS
from test_checkpoints import CONFIG, build

import checkpoints
from ffjax.cli import main
from ffjax.commands.inspect import inspect
from ffjax.model import Transformer
from pallas_kernels.gpu import Gpu

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "model"
    checkpoints.save(build(dtype=jnp.float32), path, source={"from": "a test"})
    return path


def test_a_checkpoint(ours):
    report = inspect(ours)
    sizes = [file.stat().st_size for file in ours.rglob("*") if file.is_file()]
    assert report["kind"] == "ffjax checkpoint"
    assert (report["name"], report["family"]) == ("little", "llama")
    assert report["config"] == CONFIG.to_dict()
    assert report["weights"] == CONFIG.num_params
    assert report["dtypes"] == {"float32": 9}
    assert report["weight_bytes"] == 4 * CONFIG.num_params
    assert report["disk_bytes"] == sum(sizes)
    assert report["source"] == {"from": "a test"}


def test_a_hugging_face_folder(tmp_path):
    report = inspect(write_folder(tmp_path / "it", "gemma2", shards=2))
    count = len(MODELS["gemma2"].weights())
    assert report["kind"] == "Hugging Face Gemma2ForCausalLM"
    assert (report["name"], report["family"]) == ("it", "gemma2")
    assert report["dtypes"] == {"BF16": count}
    assert report["weight_bytes"] == 2 * report["weights"]
    assert "its tokens are bytes" in report["tokenizer"]


def test_weights_are_counted_as_the_model_has_them(tmp_path):
    for name in FOLDERS:
        report = inspect(write_folder(tmp_path / name, name))
        assert report["weight_bytes"] == 2 * report["weights"], name


def test_no_weight_is_read_or_made(ours, monkeypatch):
    def never(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("tensorstore.open", never)
    inspect(ours)


def test_why_the_kernel_cannot_run_it_here(ours, monkeypatch):
    monkeypatch.setattr(Gpu, "of", lambda device: None)
    assert "runs on NVIDIA GPUs" in inspect(ours)["why_not_fused"]
    # On a GPU, what is asked next is the model and the batch.
    monkeypatch.setattr(Gpu, "of", lambda device: Gpu.named("H100", "9.0", 132))
    assert "bfloat16 weights; these are float32" in inspect(ours)["why_not_fused"]
    shipped = checkpoints.SHIPPED_MODEL
    assert inspect(shipped)["why_not_fused"] is None
    assert "there are 9" in inspect(shipped, batch=9)["why_not_fused"]


def test_the_command_line_prints_a_table_or_json(ours, capsys):
    assert main(["inspect", str(ours)]) == 0
    out, err = capsys.readouterr()
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert err == ""
    assert lines["kind"] == "ffjax checkpoint"
    assert lines["model"] == "little, llama"
    assert lines["layers"] == "3 of width 24, feed-forward 40"
    assert lines["heads"] == "4 of 10, 2 of keys and values"
    assert lines["dtypes"] == "9 arrays of float32"
    assert "rope_theta=12345.0" in lines["configuration"]
    assert "kernel" in lines["fused"]
    assert main(["inspect", str(ours), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(inspect(ours)))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda path: shutil.rmtree(path),
            "ffjax inspect: There is no checkpoint or Hugging Face folder at",
        ),
        (lambda path: os.truncate(path / "weights" / "_METADATA", 9), "_METADATA has 9 bytes"),
        (
            lambda path: (path / "manifest.json").unlink(),
            "a Hugging Face folder one with",
        ),
    ],
)
def test_what_is_damaged_is_a_sentence_and_code_2(ours, tmp_path, capsys, damage, sentence):
    copy = shutil.copytree(ours, tmp_path / "copy")
    damage(copy)
    assert main(["inspect", str(copy)]) == 2
    assert sentence in capsys.readouterr().err


def test_a_batch_of_none(ours, capsys):
    assert main(["inspect", str(ours), "--batch", "0"]) == 2
    assert "--batch: a whole number from 1 is needed, got '0'." in capsys.readouterr().err


def test_a_checkpoint_of_a_family(tmp_path):
    folder = write_folder(tmp_path / "it", "olmo2")
    checkpoints.convert_hf(folder, tmp_path / "ours")
    report = inspect(tmp_path / "ours")
    assert report["source"]["architecture"] == "Olmo2ForCausalLM"
    assert report["config"]["qk_norm"] == "full"
    model = checkpoints.load(tmp_path / "ours")
    assert isinstance(model, Transformer)
    assert report["dtypes"] == {"bfloat16": len(nnx.to_flat_state(nnx.state(model)))}
