"""A checkpoint gives back what was saved, or says in a sentence why not; nothing is lost."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.core import Tracer

import checkpoints
from checkpoints import placing
from checkpoints.arrays import open_arrays
from ffjax.config import ModelConfig, RopeScaling
from ffjax.interrupts import interrupts_held_back
from ffjax.model import Transformer

pytestmark = pytest.mark.filterwarnings("error")

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ModelConfig(
    name="little",
    vocab_size=31,
    num_layers=3,
    model_dim=24,
    ffw_dim=40,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    rope_theta=12_345.0,
    rope_scaling=RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64
    ),
    norm_eps=3e-6,
    max_context=77,
)
TIED = dataclasses.replace(CONFIG, tied_embeddings=True)


def build(config: ModelConfig = CONFIG, seed: int = 0, dtype=jnp.bfloat16) -> Transformer:
    return Transformer(config, rngs=nnx.Rngs(seed), dtype=dtype)


def weights(model: Transformer) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(a: Transformer, b: Transformer) -> None:
    """Same configuration, same weights bit by bit."""
    assert a.config == b.config
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert value.shape == right[name].shape, name
        assert value.tobytes() == right[name].tobytes(), name


def edit(path: Path, **changes) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    checkpoints.save(build(), path)
    return path


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A checkpoint to do damage to."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# What comes back


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_model_comes_back_bit_by_bit(config, dtype, tmp_path):
    model = build(config, dtype=dtype)
    # Numbers that a conversion would change: both zeros, a subnormal, infinity, a NaN's payload.
    odd = np.array([0x0000, 0x8000, 0x0001, 0x7F80, 0x7FA5], np.uint16).view(jnp.bfloat16)
    model.final_norm[...] = model.final_norm[...].at[:5].set(jnp.asarray(odd, dtype))
    checkpoints.save(model, tmp_path / "model")
    assert_same(checkpoints.load(tmp_path / "model"), model)


def test_a_loaded_model_computes_the_same_logits(saved):
    tokens = jnp.arange(14).reshape(2, 7)
    loaded, expected = checkpoints.load(saved)(tokens), build()(tokens)
    assert np.asarray(loaded).tobytes() == np.asarray(expected).tobytes()


def test_no_weight_is_made_only_to_be_replaced(saved, monkeypatch):
    made, init = [], Transformer.__init__

    def watched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(all(isinstance(x, Tracer) for x in jax.tree.leaves(nnx.state(self))))

    monkeypatch.setattr(Transformer, "__init__", watched)
    checkpoints.load(saved)
    assert made == [True]


@pytest.mark.parametrize(("stored", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_weights_are_cast_where_a_dtype_is_asked_for(stored, asked, tmp_path):
    model = build(dtype=jnp.dtype(stored))
    checkpoints.save(model, tmp_path / "model")
    loaded = checkpoints.load(tmp_path / "model", dtype=jnp.dtype(asked))
    for name, value in weights(loaded).items():
        assert value.dtype == jnp.dtype(asked)
        assert value.tobytes() == weights(model)[name].astype(asked).tobytes(), name


def test_the_source_is_kept(tmp_path):
    source = {"text": "é", "steps": 3, "figures": {"bits": 1.25}, "none": None}
    checkpoints.save(build(), tmp_path / "model", source=source)
    assert checkpoints.Manifest.read(tmp_path / "model").source == source


def test_a_model_saved_on_another_machine_loads_on_this_one(copy):
    # As Orbax saves arrays of a device, and as this library once had it do.
    shutil.rmtree(copy / "weights")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(copy / "weights", nnx.to_pure_dict(nnx.state(build())))
    edit(copy, files={"weights/_METADATA": (copy / "weights" / "_METADATA").stat().st_size})
    file = copy / "weights" / "_sharding"
    # Orbax wrote "cpu:0", or another first device: here, one that this machine lacks.
    elsewhere, places = re.subn(r"(\w):0", r"\1:9", file.read_text())
    assert places == len(weights(build()))
    file.write_text(elsewhere)
    assert_same(checkpoints.load(copy), build())


def test_a_checkpoint_does_not_say_where_it_was_written(tmp_path):
    checkpoints.save(build(), tmp_path / "a-telling-name")
    files = [file for file in (tmp_path / "a-telling-name").rglob("*") if file.is_file()]
    assert len(files) > 3
    for file in files:
        data = file.read_bytes()
        assert b"a-telling-name" not in data, file
        assert os.fsencode(tmp_path) not in data, file


def test_plain_orbax_reads_the_weights(saved):
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(saved / "weights", nnx.to_pure_dict(nnx.state(build())))
    assert restored["layers"]["qkv"].tobytes() == weights(build())["['layers']['qkv']"].tobytes()


# What cannot be loaded


def refused(path: Path, match: str, error: type[Exception] = checkpoints.CheckpointError, **kwargs):
    with pytest.raises(error, match=match) as caught:
        checkpoints.load(path, **kwargs)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    if not kwargs:
        assert str(path) in text


def test_a_path_with_nothing_there(tmp_path):
    refused(
        tmp_path / "none", "There is no checkpoint or Hugging Face folder at", FileNotFoundError
    )


def test_a_directory_that_is_no_checkpoint(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    refused(tmp_path, "a directory with a manifest.json, .* has neither")
    refused(tmp_path / "photo.jpg", "is a file. Give the folder that it lies in")


def test_a_manifest_of_something_else(copy):
    (copy / "manifest.json").write_text('{"name": "a web page"}')
    refused(copy, "is not a checkpoint of ffjax")
    (copy / "manifest.json").write_text("[1]")
    refused(copy, "is not a checkpoint of ffjax")


def test_a_truncated_manifest(copy):
    file = copy / "manifest.json"
    file.write_bytes(file.read_bytes()[:-30])
    refused(copy, "damaged: its manifest.json is not JSON")


def test_a_checkpoint_of_a_newer_version(copy):
    edit(copy, format_version=2)
    refused(copy, "format version 2; this ffjax reads versions up to 1. Update ffjax")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": "one"}, "'one' as its format version"),
        ({"dtype": "int8"}, "'int8' as dtype of the weights; it is one of bfloat16, float32"),
        ({"config": None}, "no model configuration"),
        ({"config": {**CONFIG.to_dict(), "depth": 3}}, "has no field depth"),
        ({"config": {**CONFIG.to_dict(), "head_dim": 9}}, "head_dim must be even"),
        ({"config": {**CONFIG.to_dict(), "rope_scaling": {"fast": 1}}}, "no possible model"),
        ({"files": {}}, "lists no files"),
    ],
)
def test_a_manifest_with_an_impossible_entry(copy, change, match):
    edit(copy, **change)
    refused(copy, match)


def test_every_file_of_the_weights_missing_or_truncated(saved, tmp_path):
    names = json.loads((saved / "manifest.json").read_text())["files"]
    assert set(names) == {
        file.relative_to(saved).as_posix()
        for file in (saved / "weights").rglob("*")
        if file.is_file()
    }
    for i, (name, size) in enumerate(names.items()):
        path = Path(shutil.copytree(saved, tmp_path / str(i)))
        os.truncate(path / name, size // 2)
        refused(path, f"{name} has {size // 2} bytes, and was saved with {size}")
        (path / name).unlink()
        refused(path, f"incomplete: {name} is missing")


def test_weights_that_cannot_be_read(copy):
    file = copy / "weights" / "manifest.ocdbt"
    file.write_bytes(bytes(file.stat().st_size))
    refused(copy, "damaged: its weights cannot be read")


_MODULES = """
import ffjax, sys
ffjax.load(sys.argv[1])
print(*sys.modules)
"""


def test_reading_takes_no_orbax(saved):
    """Importing it takes longer than a small model takes to load."""
    done = subprocess.run(
        [sys.executable, "-c", _MODULES, str(saved)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "tensorstore" in done.stdout.split()
    assert "orbax.checkpoint" not in done.stdout.split()


@pytest.mark.parametrize("most_bytes", [1, 1 << 30])
def test_an_array_of_many_chunks_comes_back(tmp_path, monkeypatch, most_bytes):
    """Also where only two of them may be on their way."""
    monkeypatch.setattr("checkpoints.blocks._CHUNK_BYTES", 100)
    monkeypatch.setattr("checkpoints.arrays._READ_BYTES", most_bytes)
    checkpoints.save(build(), tmp_path / "model")
    assert_same(checkpoints.load(tmp_path / "model"), build())


@pytest.mark.parametrize("asked", [None, jnp.float32])
def test_an_array_is_put_onto_a_device_block_by_block(tmp_path, monkeypatch, asked):
    """As where a device has a memory of its own, with chunks that are less than a row."""
    monkeypatch.setattr("checkpoints.blocks._CHUNK_BYTES", 1000)
    monkeypatch.setattr("checkpoints.blocks._BLOCK_BYTES", 3000)
    checkpoints.save(build(), tmp_path / "model")
    expected = checkpoints.load(tmp_path / "model", dtype=asked)
    monkeypatch.setattr("checkpoints.store.is_host", lambda: False)
    put, blocks = placing.Placing.put, []

    def counted(self, block):
        blocks.append(block.name)
        put(self, block)

    monkeypatch.setattr(placing.Placing, "put", counted)
    assert_same(checkpoints.load(tmp_path / "model", dtype=asked), expected)
    assert blocks.count("layers.qkv") == build().config.num_layers
    assert blocks.count("layers.attn_norm") == 1


def test_plain_orbax_reads_rows_of_several_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoints.blocks._CHUNK_BYTES", 1000)
    checkpoints.save(build(), tmp_path / "model")
    array = open_arrays(tmp_path / "model" / "weights")["layers.qkv"]
    chunk = [size or 0 for size in array.chunk_layout.read_chunk.shape or ()]
    assert chunk[0] == 1
    assert 0 < chunk[1] < array.shape[1]
    with ocp.StandardCheckpointer() as checkpointer:
        stored = nnx.to_pure_dict(nnx.state(build()))
        restored = checkpointer.restore(tmp_path / "model" / "weights", stored)
    assert restored["layers"]["qkv"].tobytes() == weights(build())["['layers']['qkv']"].tobytes()


def test_compressed_weights_are_read_as_orbax_reads_them():
    """This library once wrote them so: the shipped model's are."""
    shipped = checkpoints.SHIPPED_MODEL
    loaded = nnx.to_pure_dict(nnx.state(checkpoints.load(shipped)))
    with ocp.StandardCheckpointer() as checkpointer:
        expected = checkpointer.restore(shipped / "weights", loaded)
    same = jax.tree.map(
        lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), loaded, expected
    )
    assert len(jax.tree.leaves(same)) == 8
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_layers": 2}, r"layers.attn_norm is bfloat16\[3, 24\], .* has bfloat16\[2, 24\]"),
        ({"vocab_size": 32}, r"embed is bfloat16\[31, 24\], .* has bfloat16\[32, 24\]"),
        ({"tied_embeddings": True}, r"head is bfloat16\[31, 24\], .* has no such weight"),
    ],
)
def test_weights_of_another_model(copy, change, match):
    edit(copy, config={**CONFIG.to_dict(), **change})
    refused(copy, match)


def test_weights_of_another_dtype_than_the_manifest_says(copy):
    edit(copy, dtype="float32")
    refused(copy, r"embed is bfloat16\[31, 24\], .* has float32\[31, 24\]")


@pytest.mark.parametrize("dtype", ["float16", "int8", "no-dtype"])
def test_a_dtype_no_model_is_loaded_in(saved, dtype):
    refused(saved, f"one of bfloat16, float32; got .*{dtype}", dtype=dtype)


# What cannot be saved


def test_nothing_is_replaced_unasked(saved):
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        checkpoints.save(build(seed=1), saved)
    assert_same(checkpoints.load(saved), build())


def test_a_checkpoint_is_replaced_when_asked(copy):
    checkpoints.save(build(TIED, seed=1), copy, overwrite=True)
    assert_same(checkpoints.load(copy), build(TIED, seed=1))
    assert os.listdir(copy.parent) == [copy.name]


def test_overwriting_replaces_nothing_but_a_checkpoint(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    for path in (home, home / "thesis.txt"):
        with pytest.raises(FileExistsError, match="A checkpoint is replaced and nothing else"):
            checkpoints.save(build(), path, overwrite=True)
    assert (home / "thesis.txt").read_text() == "years of work"
    assert os.listdir(tmp_path) == ["home"]


def test_weights_of_no_or_several_supported_dtypes_are_refused(tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match="bfloat16, float32; got float16"):
        checkpoints.save(build(dtype=jnp.float16), tmp_path / "model")
    model = build()
    model.final_norm.set_value(model.final_norm[...].astype(jnp.float32))
    with pytest.raises(checkpoints.CheckpointError, match="these have bfloat16, float32"):
        checkpoints.save(model, tmp_path / "model")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("source", [{"when": object()}, {"bits": float("nan")}])
def test_a_source_that_json_cannot_keep_is_refused(source, tmp_path):
    with pytest.raises(TypeError, match="kept as JSON"):
        checkpoints.save(build(), tmp_path / "model", source=source)
    assert os.listdir(tmp_path) == []


# Broken off


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [False, True])
def test_a_save_that_fails_half_way_leaves_all_as_it_was(tmp_path, monkeypatch, error, existing):
    path = tmp_path / "model"
    if existing:
        checkpoints.save(build(), path)
    half_written = []

    def fails(self, directory, *args, **kwargs):
        Path(directory).mkdir()
        (Path(directory) / "half").write_bytes(b"half")
        half_written.append(Path(directory) / "half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "save", fails)
        with pytest.raises(type(error)):
            checkpoints.save(build(seed=1), path, overwrite=True)
    assert len(half_written) == 1
    assert path not in half_written[0].parents
    assert os.listdir(tmp_path) == (["model"] if existing else [])
    if existing:
        assert_same(checkpoints.load(path), build())


def test_a_checkpoint_comes_back_if_the_new_one_cannot_take_its_place(copy, monkeypatch):
    rename = Path.rename

    def fails(self, target):
        if self.name.endswith(".partial"):
            raise OSError("The disk is gone.")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="The disk is gone"):
            checkpoints.save(build(seed=1), copy, overwrite=True)
    assert os.listdir(copy.parent) == [copy.name]
    assert_same(checkpoints.load(copy), build())


def test_ctrl_c_waits_for_the_threads_that_write(copy, monkeypatch):
    write, written = ocp.Checkpointer.save, []

    def interrupted(self, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        write(self, *args, **kwargs)
        written.append(True)

    monkeypatch.setattr(ocp.Checkpointer, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(build(seed=1), copy, overwrite=True)
    assert written == [True]
    assert os.listdir(copy.parent) == [copy.name]
    assert_same(checkpoints.load(copy), build())


def test_a_second_ctrl_c_does_not_wait():
    reached = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts_held_back():
        signal.raise_signal(signal.SIGINT)
        reached.append("after the first")
        signal.raise_signal(signal.SIGINT)
        reached.append("after the second")
    assert reached == ["after the first"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_thread_can_save_too(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(checkpoints.save, build(), tmp_path / "model").result()
    assert_same(checkpoints.load(tmp_path / "model"), build())


_SAVES = """
import sys, checkpoints
source, path = sys.argv[1:]
model = checkpoints.load(source)
print("ready", flush=True)
while True:
    checkpoints.save(model, path, overwrite=True)
"""


def test_ctrl_c_at_any_moment_leaves_a_whole_checkpoint_and_nothing_beside_it(saved, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(saved, path)
    with subprocess.Popen(
        [sys.executable, "-c", _SAVES, str(saved), str(path)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            if process.stdout.readline() != "ready\n":
                pytest.fail(f"The process that saves did not start:\n{process.stderr.read()}")
            # Once something lies beside the checkpoint, a save is under way.
            while process.poll() is None and len(os.listdir(tmp_path)) < 2:
                time.sleep(0.001)
            # JAX's callback of the collector of cycles swallows an interrupt that falls into it.
            for _ in range(10):
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    _, err = process.communicate(timeout=10)
                    break
            else:
                pytest.fail("Ten interrupts have not ended the process that saves.")
        finally:
            process.kill()
    assert "KeyboardInterrupt" in err
    assert os.listdir(tmp_path) == ["model"]
    assert_same(checkpoints.load(path), build())
