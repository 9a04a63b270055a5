"""Programs are kept from one command to the next, and nothing wrong with them stops one."""

import argparse
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

import checkpoints
from ffjax import compiled, loop
from ffjax.cli import main
from ffjax.config import ModelConfig
from ffjax.model import Transformer
from ffjax.prefill import padded

pytestmark = pytest.mark.filterwarnings("error")

CONFIG = ModelConfig(
    name="tiny-bytes",
    vocab_size=257,
    num_layers=1,
    model_dim=32,
    ffw_dim=48,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
)
EVENTS = "/jax/compilation_cache/"
_seen: dict[str, int] = {}
jax.monitoring.register_event_listener(
    lambda event, **_: _seen.update({event: _seen.get(event, 0) + 1})
)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    checkpoints.save(Transformer(CONFIG, rngs=nnx.Rngs(2)), path)
    return str(path)


# JAX's own settings, where nobody has said anything.
DEFAULTS = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
    "jax_persistent_cache_enable_xla_caches": "xla_gpu_per_fusion_autotune_cache_dir",
}


@pytest.fixture
def user_setting():
    """Sets JAX's configuration as a user's environment variable does, for a test."""
    before = {}

    def set_to(name, value):
        before.setdefault(name, jax.config.values[name])
        jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX looks once a process

    yield set_to
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def folder(tmp_path, monkeypatch, user_setting) -> Path:
    """Where this test's commands keep their programs; nobody has made it yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    for name, value in DEFAULTS.items():
        monkeypatch.delenv(name.upper(), raising=False)
        user_setting(name, value)
    return tmp_path / "caches" / "ffjax" / "compiled"


def _small(args: argparse.Namespace) -> int:
    """Stands for a command: two programs, or another and one of the same."""
    first = np.float32(2 if args.temperature else 3) + np.arange(4, dtype=np.float32)
    scaled = jax.jit(lambda x: x * (5 if args.temperature else 7))(first)
    tokens = jax.jit(lambda x: (x + 1).astype(np.int32))(scaled)
    print(json.dumps({"tokens": tokens.tolist()}))
    return 0


@pytest.fixture
def generate(path, capsys):
    """A command in a process that has compiled nothing: exit code, tokens, stderr, hits, misses."""

    def run(*more: str) -> tuple[int, list[int], str, int, int]:
        jax.clear_caches()
        for programs in (loop._programs, loop._started, padded._programs):
            programs.cache_clear()
        _seen.clear()
        arguments = ["generate", "--model", path, "--prompt", "x = ", "--max-new-tokens", "4"]
        code = main([*arguments, "--json", *more])
        out, err = capsys.readouterr()
        hits, misses = (_seen.get(f"{EVENTS}cache_{what}", 0) for what in ("hits", "misses"))
        return code, json.loads(out)["tokens"], err, hits, misses

    return run


@pytest.fixture
def ask(generate, monkeypatch):
    """The same of a command that compiles little."""
    monkeypatch.setattr("ffjax.commands.generate.run", _small)
    return generate


def _settings() -> dict:
    return {name: value for name, value in jax.config.values.items() if "cache" in name}


def test_the_second_command_compiles_nothing(generate, folder):
    before = _settings()
    code, tokens, err, hits, misses = generate()
    assert (code, err) == (0, "")
    # Every program is kept, also those that take no time to compile.
    assert misses == len(list(folder.iterdir())) > 2
    # A program may have been asked for twice in the first, too.
    assert generate() == (0, tokens, "", hits + misses, 0)
    assert _settings() == before


def test_a_process_has_a_folder_for_each_command(ask, folder, tmp_path, monkeypatch):
    ask()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "others"))
    assert ask()[3:] == (0, 2)
    assert len(list((tmp_path / "others" / "ffjax" / "compiled").iterdir())) == 2


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_nobody_else_can_write_to_the_folder(ask, folder):
    before = os.umask(0)
    try:
        ask()
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


_COUNTS = """
import sys, jax
seen = []
jax.monitoring.register_event_listener(lambda name, **_: seen.append(name.rpartition("/")[2]))
from ffjax.cli import main
code = main(sys.argv[1:])
print(seen.count("cache_hits"), seen.count("cache_misses"), file=sys.stderr)
sys.exit(code)
"""


def test_a_second_process_compiles_nothing(path, folder):
    ended = []
    for _ in range(2):
        arguments = ["generate", "--model", path, "--prompt", "x = ", "--max-new-tokens", "4"]
        done = subprocess.run(
            [sys.executable, "-c", _COUNTS, *arguments, "--temperature", "1"],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        figures, counts = done.stderr.splitlines()  # nor does XLA say anything
        assert figures.startswith("tiny-bytes: 4 tokens")
        ended.append((done.stdout, *map(int, counts.split())))
    (first, hits, misses), second = ended
    assert misses > 2
    assert second == (first, hits + misses, 0)


# Switches


def test_with_the_option_nothing_is_kept_or_read(ask, folder):
    code, tokens, err, hits, misses = ask("--no-compilation-cache")
    assert (code, err, hits, misses) == (0, "", 0, 0)
    assert not folder.parent.exists()
    ask()
    kept = sorted(folder.iterdir())
    assert ask("--no-compilation-cache") == (0, tokens, "", 0, 0)
    assert sorted(folder.iterdir()) == kept


def test_nothing_is_kept_where_jax_is_told_so(ask, folder, user_setting):
    user_setting("jax_enable_compilation_cache", False)
    assert ask()[3:] == (0, 0)
    assert not folder.parent.exists()


def test_the_users_folder_is_taken_and_left_alone(ask, folder, user_setting, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "_MOST_BYTES", 0)
    user_setting("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    _, tokens, _, _, misses = ask()
    kept = list((tmp_path / "theirs").iterdir())
    assert misses == len(kept) == 2
    assert not folder.parent.exists()
    kept[0].write_bytes(b"damaged")
    code, again, err, hits, _ = ask()
    assert (code, again) == (0, tokens)
    assert hits > 0
    assert err.count("\n") == 1
    assert kept[0].read_bytes() == b"damaged"
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "theirs")


def test_a_setting_in_the_environment_is_the_users(ask, folder, user_setting, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1000")
    user_setting("jax_persistent_cache_min_compile_time_secs", 1000.0)
    assert ask()[3:] == (0, 0)
    assert list(folder.iterdir()) == []


# What may be wrong with the folder


def _is_one_line(err: str, begins: str, ends: str) -> None:
    assert err.startswith(f"ffjax generate: {begins}")
    assert err.endswith(f"{ends}\n")
    assert err.count("\n") == 1


NOT_KEPT = "Compiled programs are not kept, and the next command compiles them again: "
NOTHING_TRIED = "With --no-compilation-cache nothing is tried."


def test_a_file_in_the_way(ask, folder):
    folder.parent.parent.mkdir()
    folder.parent.write_text("mine")
    code, _, err, _, _ = ask()
    assert code == 0
    _is_one_line(err, f"{NOT_KEPT}{folder.parent}: file exists. ", NOTHING_TRIED)
    assert ask("--no-compilation-cache")[2] == ""
    folder.parent.unlink()
    folder.parent.mkdir()
    folder.write_text("mine")
    code, _, err, _, _ = ask()
    assert code == 0
    _is_one_line(err, f"{NOT_KEPT}{folder}: file exists. ", NOTHING_TRIED)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_folder_where_others_may_write(ask, folder):
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    code, _, err, _, _ = ask()
    assert code == 0
    _is_one_line(err, f"{NOT_KEPT}{folder} belongs to another user, or others may", NOTHING_TRIED)
    assert list(folder.iterdir()) == []


def test_a_user_without_a_home(ask, folder, monkeypatch):
    def none(cls):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", classmethod(none))
    code, _, err, _, _ = ask()
    assert code == 0
    _is_one_line(err, f"{NOT_KEPT}there is no home folder; set HOME, or ", NOTHING_TRIED)


def test_damaged_entries_are_said_once_and_mended(ask, folder):
    _, tokens, _, hits, misses = ask()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.write_bytes(file.read_bytes()[: 100 * (i % 2)])
    code, again, err, _, _ = ask()
    assert (code, again) == (0, tokens)
    _is_one_line(err, "A compiled program that was kept cannot be read (", "compiled again.")
    assert ask() == (0, tokens, "", hits + misses, 0)


def test_a_write_that_is_cut_off_is_said_once_and_leaves_nothing(ask, folder, monkeypatch):
    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        patch.setattr("jax._src.lru_cache.pathlib.Path.write_bytes", full)
        code, tokens, err, _, _ = ask()
    assert code == 0
    _is_one_line(err, f"{NOT_KEPT}OSError: [Errno 28] No space left", NOTHING_TRIED)
    assert list(folder.iterdir()) == []
    assert ask()[:3] == (0, tokens, "")


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    for name, used in (("a-1-cache", 1), ("b-1-cache", 3), ("a-2-cache", 2), ("notes.txt", 0)):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (used, 0))
    compiled._shrink(tmp_path, 250)
    assert sorted(os.listdir(tmp_path)) == ["a-2-cache", "b-1-cache", "notes.txt"]
    compiled._shrink(tmp_path, 250)
    assert len(os.listdir(tmp_path)) == 3
    compiled._shrink(tmp_path / "none", 250)


def test_a_command_that_adds_to_the_folder_bounds_it(ask, folder, monkeypatch):
    ask()
    monkeypatch.setattr(compiled, "_MOST_BYTES", 0)
    ask()  # which adds nothing, and does not look
    assert len(list(folder.iterdir())) == 2
    ask("--temperature", "1")
    assert list(folder.iterdir()) == []


# Which folder


@pytest.mark.parametrize(
    ("platform", "variables", "place"),
    [
        ("linux", {}, ".cache"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, ".cache"),
        ("darwin", {}, "Library/Caches"),
        ("win32", {}, "AppData/Local"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local"),
        ("darwin", {"XDG_CACHE_HOME": "/caches"}, "/caches"),
    ],
)
def test_the_systems_place_for_caches(platform, variables, place, monkeypatch, tmp_path):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: tmp_path))
    assert compiled.default_folder() == tmp_path / place / "ffjax" / "compiled"


def test_a_folder_of_the_users_own_that_cannot_be_made(ask, folder, tmp_path, user_setting):
    (tmp_path / "file").write_text("", encoding="utf-8")
    user_setting("jax_compilation_cache_dir", str(tmp_path / "file" / "below"))
    code, _, err, hits, misses = ask()
    assert code == 0
    assert err.startswith(f"ffjax generate: {NOT_KEPT}")
    assert err.count("\n") == 1
    assert (hits, misses) == (0, 0)
