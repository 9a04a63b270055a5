"""Models in the Hugging Face cache: found by their folders and by their names on the hub."""

import shutil
from pathlib import Path

import pytest
from decode_cases import random_model, small_config

import checkpoints
import ffjax
from checkpoints.hub_cache import hub_cache, hub_name
from checkpoints.manifest import CheckpointError
from checkpoints.places import model_path
from ffjax.cli import main

OLD, NEW = "0" * 40, "a" * 40


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A Hugging Face folder."""
    place = tmp_path_factory.mktemp("made")
    checkpoints.save(random_model(small_config(vocab_size=257)), place / "ckpt")
    checkpoints.export_hf(place / "ckpt", place / "hf")
    return place / "hf"


@pytest.fixture
def repository(made, tmp_path, monkeypatch):
    """The cache's folder of org/name, as `hf download` leaves it: files are links to blobs."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    folder = cache / "models--org--name"
    for part in (f"snapshots/{OLD}", f"snapshots/{NEW}", "blobs", "refs"):
        (folder / part).mkdir(parents=True)
    for number, file in enumerate(sorted(made.iterdir())):
        shutil.copyfile(file, folder / "blobs" / str(number))
        (folder / "snapshots" / NEW / file.name).symlink_to(f"../../blobs/{number}")
    (folder / "refs" / "main").write_text(NEW)
    return folder


def test_a_name_stands_for_the_files_of_its_newest_commit(repository, capsys):
    snapshot = repository / "snapshots" / NEW
    for path in ("org/name", Path("org/name"), repository, snapshot):
        assert model_path(path) == snapshot.resolve()
    assert ffjax.load("org/name").config.name == "name"
    assert checkpoints.tokenizer_directory("org/name") is None
    for command in (["inspect", "org/name"], ["convert", "org/name", "out"]):
        assert main(command) == 0, capsys.readouterr().err
    assert checkpoints.Manifest.read(Path("out")).config.name == "name"


def test_a_path_comes_before_a_name(repository, made):
    shutil.copytree(made, "org/name")
    assert model_path("org/name") == Path("org/name").resolve()


def test_without_a_branch_the_only_commit_is_meant(repository):
    (repository / "refs" / "main").unlink()
    with pytest.raises(CheckpointError, match=rf"names none of .+ as \S+{NEW}\. `hf download"):
        model_path("org/name")
    (repository / "snapshots" / OLD).rmdir()
    assert model_path("org/name").name == NEW


def test_a_commit_whose_files_are_not_there(repository):
    (repository / "refs" / "main").write_text("f" * 40)
    with pytest.raises(CheckpointError, match="refs/main names none of the commits"):
        model_path(repository)
    shutil.rmtree(repository / "snapshots")
    (repository / "snapshots").mkdir()
    with pytest.raises(CheckpointError, match=r"has none\. `hf download org/name` gets"):
        model_path("org/name")


@pytest.mark.parametrize("command", ["inspect", "doctor", "generate --prompt x --model"])
def test_nothing_is_downloaded(repository, capsys, command):
    assert main([*command.split(), "org/other"]) == 2
    err = capsys.readouterr().err
    assert "has none called org/other. Nothing is downloaded: get its files with" in err
    assert "`hf download org/other`, or give a folder on this machine." in err
    assert str(repository.parent) in err


def test_a_folder_named_as_the_cache_names_them_may_be_a_model(repository, made):
    """A repository is known by its snapshots; what has a config.json is a model."""
    shutil.copyfile(made / "config.json", repository / "config.json")
    assert model_path(repository) == repository.resolve()


@pytest.mark.parametrize(
    ("path", "is_name"),
    [
        ("org/name", True),
        ("Qwen/Qwen3-0.6B", True),
        ("name", False),
        ("./name", False),
        ("../name", False),
        ("/org/name", False),
        ("~/name", False),
        ("org/name/", False),
        ("a/b/c", False),
    ],
)
def test_what_may_be_a_name(path, is_name):
    assert hub_name(path) == (path if is_name else None)


def test_the_cache_lies_where_its_own_tools_put_it(monkeypatch):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert hub_cache() == Path.home() / ".cache" / "huggingface" / "hub"
    for name, value, where in (
        ("XDG_CACHE_HOME", "/x", "/x/huggingface/hub"),
        ("HF_HOME", "/h", "/h/hub"),
        ("HF_HUB_CACHE", "~/c", str(Path.home() / "c")),
    ):
        monkeypatch.setenv(name, value)
        assert hub_cache() == Path(where)
