"""Where models are read and written: what may be replaced, and paths that lead nowhere."""

import os
import shutil
import sys

import pytest
from decode_cases import random_model, small_config
from flax import nnx

import checkpoints
import ffjax
from checkpoints.manifest import CheckpointError
from checkpoints.places import check_apart, check_free, real_path
from ffjax.cli import main

pytestmark = pytest.mark.once(
    "Paths are the system's and ours.",
    sample=[
        "test_an_empty_folder_is_a_place_to_write_to",
        "test_a_link_to_itself",
    ],
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint and a Hugging Face folder of one model."""
    place = tmp_path_factory.mktemp("made")
    checkpoints.save(random_model(small_config(vocab_size=257)), place / "ckpt")
    checkpoints.export_hf(place / "ckpt", place / "hf")
    return place


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """Copies of both in the current folder."""
    for name in ("ckpt", "hf"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _files(place):
    return sorted(str(file.relative_to(place)) for file in place.rglob("*"))


# What is replaced


@pytest.mark.parametrize("extra", ["notes.txt", "folder/notes.txt", ".hidden"])
@pytest.mark.parametrize("command", ["convert hf big", "quantize ckpt big --weights int8"])
def test_what_no_save_has_written_is_never_removed(here, capsys, command, extra):
    shutil.copytree("ckpt", "big")
    (here / "big" / extra).parent.mkdir(exist_ok=True)
    (here / "big" / extra).write_text("precious")
    before = _files(here)
    assert main([*command.split(), "--overwrite"]) == 2
    assert f"also holds {extra.partition('/')[0]}." in capsys.readouterr().err
    assert _files(here) == before


@pytest.mark.parametrize(
    "command",
    [
        "convert big/hf big --overwrite",
        "quantize big/hf big --weights int8 --overwrite",
        "convert hf hf/out",
        "convert hf hf/deep/out",
        "quantize hf hf/out --weights int8",
        "quantize ckpt ckpt/out --weights int8",
        "export ckpt ckpt/out",
    ],
)
def test_input_and_output_lie_apart(here, capsys, command):
    shutil.copytree("ckpt", "big")
    shutil.copytree("hf", "big/hf")
    before = _files(here)
    assert main(command.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert _files(here) == before


def test_a_checkpoint_may_be_replaced_by_what_is_made_of_it(here):
    assert main(["quantize", "ckpt", "ckpt", "--weights", "int8", "--overwrite"]) == 0
    assert str(ffjax.load("ckpt").config.weights).startswith("int8")


def test_an_empty_folder_is_a_place_to_write_to(here):
    for name in ("a", "b"):
        (here / name).mkdir()
    assert main(["convert", "hf", "a"]) == 0
    assert main(["quantize", "a", "b", "--weights", "int8"]) == 0
    assert main(["inspect", "b"]) == 0


@pytest.mark.parametrize("there", ["hf", "file", "folder"])
def test_overwrite_is_not_advised_where_it_would_be_refused(here, there):
    (here / "file").write_text("x")
    (here / "folder").mkdir()
    (here / "folder" / "x").write_text("x")
    with pytest.raises(FileExistsError, match=r"something at .*Write elsewhere\.$"):
        check_free(here / there, overwrite=False)
    with pytest.raises(FileExistsError, match="and nothing else"):
        check_free(here / there, overwrite=True)


def test_places_that_share_the_beginning_of_a_name_are_apart(tmp_path):
    check_apart(tmp_path / "model-int8", tmp_path / "model")
    check_apart(tmp_path / "model", tmp_path / "model")


# Paths


@pytest.mark.parametrize("command", ["inspect", "generate --prompt x --model", "doctor", "export"])
@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("", "A path is empty. Give a folder; . is the one you are in."),
        ("~nobody-at-all/x", "~nobody-at-all stands for the home of a user, and there is no such"),
        ("org/name", "has none called org/name. Nothing is downloaded: get its files with `hf "),
        ("nowhere", "nowhere. Nothing is downloaded: give a folder on this machine."),
        ("hf/model.safetensors", "model.safetensors is a file. Give the folder that it lies in."),
    ],
)
def test_a_path_that_leads_to_no_model_is_a_sentence(here, capsys, command, path, sentence):
    assert main([*command.split(), path, *(["out"] if command == "export" else [])]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="Python 3.13 resolves a link to itself")
def test_a_link_to_itself(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="a symbolic link that leads back to itself"):
        real_path(tmp_path / "loop")


def test_a_checkpoint_by_a_name_that_is_not_utf8(here, capfd):
    odd = os.fsdecode(b"n\xff")
    try:
        os.rename("ckpt", odd)
    except OSError:
        pytest.skip("The file system takes UTF-8 alone.")
    for arguments in (["export", odd, "e"], ["quantize", odd, "q", "--weights", "int8"]):
        assert main(arguments) == 2
        err = capfd.readouterr().err
        assert "The path of a checkpoint is UTF-8, and '" in err
        assert "damaged" not in err
    assert main(["convert", "hf", os.fsdecode(b"m\xff")]) == 2
    assert main(["inspect", "hf"]) == 0


@pytest.mark.parametrize(
    ("out", "cause"),
    [("file/out", "is a file, not a folder."), ("o" * 250, "file name too long.")],
)
def test_a_place_that_cannot_be_made_is_named_as_it_was_given(here, capsys, out, cause):
    (here / "file").write_text("x")
    assert main(["convert", "hf", out]) == 2
    err = capsys.readouterr().err
    assert f"{out} cannot be written: " in err
    assert cause in err
    assert ".partial" not in err
    assert "Errno" not in err


# Folders


def test_quantizing_a_folder_keeps_where_it_comes_from(here):
    assert main(["convert", "hf", "plain"]) == 0
    assert main(["quantize", "plain", "a", "--weights", "int8"]) == 0
    assert main(["quantize", "hf", "b", "--weights", "int8"]) == 0
    first, second = (checkpoints.Manifest.read(here / name).source for name in ("a", "b"))
    assert first == second
    assert second is not None
    assert second["of"]["source"]["format"] == "huggingface"


def _pointer(folder):
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )


def _broken_link(folder, name="model.safetensors"):
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/0123abc")


def _broken_shard(folder):
    _broken_link(folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors"}}')


def _no_index(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_pointer, "is a pointer of Git LFS, which stands for the weights"),
        (_broken_link, "model.safetensors is a link, and ../../blobs/0123abc, to which it leads,"),
        (_broken_shard, "a.safetensors is a link, and ../../blobs/0123abc, to which it leads, is"),
        (_no_index, "has model-00001-of-00002.safetensors, and no model.safetensors.index.json."),
        (lambda folder: (folder / "config.json").write_text("[]"), "is a JSON object with its"),
    ],
)
def test_a_folder_that_lacks_its_weights_says_what_to_get(here, change, sentence):
    change(here / "hf")
    with pytest.raises(CheckpointError, match=sentence):
        ffjax.load("hf")


def test_a_checkpoint_is_not_converted(here, capsys):
    assert main(["convert", "ckpt", "out"]) == 2
    assert "is a checkpoint of ffjax, and no Hugging Face folder." in capsys.readouterr().err


def test_a_tokenizer_that_cannot_be_used_is_told_when_it_is_copied(here, capsys):
    (here / "hf" / "tokenizer.json").write_text("{")
    assert main(["convert", "hf", "out"]) == 0
    assert "and `ffjax generate` will refuse it: " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval hf --text text", "quantize hf out --weights int8"])
def test_rounding_is_said(here, capsys, command):
    model = random_model(small_config(vocab_size=257))
    config = model.config
    float32 = ffjax.Transformer(config, rngs=nnx.Rngs(0), dtype="float32")
    shutil.rmtree("hf")
    checkpoints.save(float32, "ckpt32")
    checkpoints.export_hf("ckpt32", "hf")
    (here / "text").write_text("hello")
    assert main(command.split()) == 0
    name = command.split()[0]
    assert f"ffjax {name}: hf: tensors were rounded to bfloat16: " in capsys.readouterr().err
    if name == "eval":
        assert main([*command.split(), "--dtype", "float32"]) == 0
        assert "rounded" not in capsys.readouterr().err
