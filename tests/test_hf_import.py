"""A Hugging Face folder becomes the model it describes, or a sentence says why not."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import config_json, edit_json, every_model, tensors_of, write_folder
from hf_models import GOLDENS, MODELS
from numerics import assert_close
from reference_cases import quick_jit
from test_checkpoints import assert_same, weights

import checkpoints
from checkpoints import arrays, blocks, hf_files
from ffjax.cli import main

pytestmark = [
    pytest.mark.once(
        "Files are read by ours; a sample makes models of them.",
        sample=[
            "test_every_family_comes_in_as_the_model_that_transformers_computes[gemma3]",
            "test_every_family_comes_in_as_the_model_that_transformers_computes[qwen2]",
            "test_every_family_comes_in_as_the_model_that_transformers_computes[olmo2]",
            "test_converted_and_loaded_directly_are_the_same",
            "test_odd_numbers_come_in_bit_by_bit",
            "test_a_missing_shard",
            "test_ctrl_c_between_chunks_takes_effect",
            "test_a_file_that_cannot_be_written_is_a_sentence",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

ROOT = Path(__file__).resolve().parents[1]
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A Llama in three shards."""
    return write_folder(tmp_path_factory.mktemp("hf") / "llama", "untied_stretched_rope", shards=3)


@pytest.fixture
def folder(sharded, tmp_path) -> Path:
    """A folder to do damage to."""
    return Path(shutil.copytree(sharded, tmp_path / "copy"))


# What comes in


@quick_jit
def _logits(model, tokens):
    return model(tokens)


@every_model
def test_every_family_comes_in_as_the_model_that_transformers_computes(name, tmp_path):
    folder = write_folder(tmp_path / name, name, shards=2)
    model = checkpoints.load(folder, dtype=jnp.float32)
    with np.load(GOLDENS / f"{name}.npz") as golden:
        logits = _logits(model, golden["tokens"])
        assert_close(logits, golden["logits"], "model_vs_hugging_face_float32")


@pytest.mark.parametrize("name", ["untied_stretched_rope", "qwen2", "olmo2", "gemma3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_converted_and_loaded_directly_are_the_same(name, dtype, tmp_path):
    folder = write_folder(tmp_path / "hf", name, shards=2)
    made = checkpoints.convert_hf(folder, tmp_path / "ours", dtype=dtype)
    assert (made.dtype, made.rounded, made.left_out) == (dtype, {}, [])
    direct = checkpoints.load(folder, dtype=dtype)
    assert_same(checkpoints.load(tmp_path / "ours"), direct)
    assert direct.dtype == dtype
    for leaf in weights(direct).values():
        assert np.any(leaf.astype(np.float32) != 0)


def test_one_file_or_shards_are_the_same(sharded, tmp_path):
    one = write_folder(tmp_path / sharded.name, "untied_stretched_rope")
    assert_same(checkpoints.load(one), checkpoints.load(sharded))


def test_a_checkpoint_says_where_it_comes_from(sharded, tmp_path):
    checkpoints.convert_hf(sharded, tmp_path / "ours")
    manifest = checkpoints.Manifest.read(tmp_path / "ours")
    count = len(MODELS["untied_stretched_rope"].weights())
    assert manifest.config.name == "llama"
    assert manifest.source == {
        "format": "huggingface",
        "name": "llama",
        "architecture": "LlamaForCausalLM",
        "dtypes": {"BF16": count},
        "rounded": {},
        "left_out": [],
    }
    for file in (tmp_path / "ours").rglob("*"):
        assert not file.is_file() or os.fsencode(tmp_path) not in file.read_bytes(), file


def test_a_snapshot_in_a_cache_is_called_by_its_repository(tmp_path):
    folder = tmp_path / "models--some-lab--Tiny-1B" / "snapshots" / ("a" * 40)
    assert checkpoints.load(write_folder(folder)).config.name == "Tiny-1B"


@pytest.mark.parametrize(("dtype", "called"), [(np.float32, "F32"), (np.float16, "F16")])
def test_other_dtypes_are_rounded_to_the_checkpoints_and_that_is_said(
    dtype, called, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(hf_files, "_BLOCK_BYTES", 1000)  # many blocks, the last one short
    values = np.random.default_rng(0).standard_normal((101, 74)).astype(dtype)
    tensors = tensors_of(MODELS["tied"], dtype) | {"model.embed_tokens.weight": values}
    folder = write_folder(tmp_path / "hf", "tied", tensors=tensors)
    assert main(["convert", str(folder), str(tmp_path / "ours")]) == 0
    count = len(tensors)
    assert f"Tensors were rounded to bfloat16: {count} of {called}." in capsys.readouterr().out
    embed = np.asarray(checkpoints.load(tmp_path / "ours").embed[...])
    assert embed.tobytes() == values.astype(jnp.bfloat16).tobytes()
    exact = checkpoints.load(folder, dtype=jnp.float32).embed[...]
    assert np.asarray(exact).tobytes() == values.astype(np.float32).tobytes()


def test_odd_numbers_come_in_bit_by_bit(tmp_path):
    tensors = tensors_of(MODELS["tied"])
    odd = np.array([0x0000, 0x8000, 0x0001, 0x7F80, 0x7FA5], np.uint16).view(jnp.bfloat16)
    tensors["model.norm.weight"][:5] = odd
    # Arrays of zeros alone: TensorStore does not write what it takes for nothing.
    zero = np.zeros_like(tensors["model.layers.0.input_layernorm.weight"])
    tensors |= {f"model.layers.{i}.input_layernorm.weight": zero for i in range(2)}
    tensors |= {f"model.layers.{i}.post_attention_layernorm.weight": -zero for i in range(2)}
    folder = write_folder(tmp_path / "hf", "tied", tensors=tensors)
    checkpoints.convert_hf(folder, tmp_path / "ours")
    model = checkpoints.load(tmp_path / "ours")
    assert np.asarray(model.final_norm[...])[:5].tobytes() == odd.tobytes()
    assert np.asarray(model.layers.attn_norm[...]).tobytes() == zero.tobytes() * 2
    assert np.asarray(model.layers.mlp_norm[...]).tobytes() == (-zero).tobytes() * 2


@pytest.mark.parametrize("block", [1, 3000])
def test_arrays_of_many_blocks_and_chunks_are_the_same(sharded, tmp_path, monkeypatch, block):
    monkeypatch.setattr(blocks, "_CHUNK_BYTES", 700)
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", block)
    checkpoints.convert_hf(sharded, tmp_path / "ours")
    whole = checkpoints.load(sharded)
    assert_same(checkpoints.load(tmp_path / "ours"), whole)
    monkeypatch.setattr("checkpoints.incoming.is_host", lambda: False)
    assert_same(checkpoints.load(sharded), whole)


def test_a_head_stored_beside_the_embedding_it_is_tied_to(tmp_path):
    tensors = tensors_of(MODELS["tied"])
    same = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    folder = write_folder(tmp_path / "same", "tied", tensors=same)
    made = checkpoints.convert_hf(folder, tmp_path / "ours")
    assert made.left_out == ["lm_head.weight"]
    other = {**same, "lm_head.weight": same["lm_head.weight"] * 2}
    folder = write_folder(tmp_path / "other", "tied", tensors=other)
    refused(folder, "tie_word_embeddings.*lm_head.weight differs from model.embed_tokens.weight")


def test_frequencies_that_old_releases_keep_are_left_out(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = tensors_of(MODELS["tied"]) | {name: np.ones(32, np.float32)}
    folder = write_folder(tmp_path / "hf", "tied", tensors=tensors)
    assert checkpoints.convert_hf(folder, tmp_path / "ours").left_out == [name]


@pytest.mark.parametrize(
    ("text", "vision"),
    [("language_model.model.", ""), ("model.language_model.", "model.")],
    ids=["transformers 4", "transformers 5"],
)
def test_the_text_model_of_one_that_sees(text, vision, tmp_path):
    model = MODELS["gemma3"]
    plain = write_folder(tmp_path / "plain" / "g", model)
    tensors = {re.sub("^model\\.", text, k): v for k, v in tensors_of(model).items()}
    tensors |= {f"{vision}vision_tower.patch.weight": np.ones((2, 3), np.float32)}
    tensors |= {f"{vision}multi_modal_projector.norm.weight": np.ones(2, np.float32)}
    folder = write_folder(tmp_path / "g", model, tensors=tensors)
    outer = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "vision_config": {"hidden_size": 9},
        "mm_tokens_per_image": 256,
        "text_config": config_json(model, architectures=None),
    }
    (folder / "config.json").write_text(json.dumps(outer))
    made = checkpoints.convert_hf(folder, tmp_path / "ours")
    assert len(made.left_out) == 2
    assert_same(checkpoints.load(tmp_path / "ours"), checkpoints.load(plain))


# What cannot come in


def refused(folder: Path, match: str, error: type[Exception] = checkpoints.CheckpointError):
    with pytest.raises(error, match=match) as caught:
        checkpoints.load(folder)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert str(folder) in text
    # A conversion says the same and leaves nothing.
    before = sorted(os.listdir(folder.parent))
    with pytest.raises(error, match=match):
        checkpoints.convert_hf(folder, folder.parent / "out")
    assert sorted(os.listdir(folder.parent)) == before


def rewrite(folder: Path, change) -> None:
    """Puts changed tensors into one file in place of the shards."""
    tensors = tensors_of(MODELS["untied_stretched_rope"])
    change(tensors)
    shutil.rmtree(folder)
    write_folder(folder, "untied_stretched_rope", tensors=tensors)


def test_a_folder_without_weights_or_with_those_of_torch(folder):
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused(folder, "has neither. Weights in other formats .* save them as safetensors")


def test_a_missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "of the 3 shards .* model-00002-of-00003.safetensors is missing")


@pytest.mark.parametrize("left", [0, 5, 200, -1])
def test_a_truncated_shard(folder, left):
    file = folder / "model-00003-of-00003.safetensors"
    size = file.stat().st_size
    os.truncate(file, left % size)
    refused(folder, f"model-00003-of-00003.safetensors is damaged.* it has {left % size} bytes")
    with pytest.raises(checkpoints.CheckpointError, match="is damaged"):
        hf_files.read_header(file)  # before a number is read


def test_a_shard_with_something_behind_its_tensors(folder):
    file = folder / "model-00003-of-00003.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"x")
    refused(folder, f"it has {size + 1} bytes, and its header describes {size}")


def test_a_shard_that_is_cut_short_while_it_is_read(folder):
    tensor = hf_files.find_tensors(folder)[Q]
    os.truncate(tensor.file, tensor.offset + tensor.nbytes - 1)
    with pytest.raises(checkpoints.CheckpointError, match="is damaged: it has"):
        tensor.read_into(np.empty(tensor.shape, jnp.bfloat16))


def test_a_header_that_is_none(folder):
    file = folder / "model-00001-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[8:12] = b"nope"
    file.write_bytes(data)
    refused(folder, "model-00001-of-00003.safetensors is damaged: its header is not that of")


def damage_header(file: Path, change) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_a_header_that_contradicts_itself(folder):
    file = folder / "model-00001-of-00003.safetensors"
    whole = file.read_bytes()
    damage_header(file, lambda h: h["model.embed_tokens.weight"]["shape"].reverse())
    refused(folder, r"model.embed_tokens.weight is \[78, 97\], expected \[97, 78\]")
    damage_header(file, lambda h: h["model.embed_tokens.weight"].update(shape=[1, 2]))
    refused(folder, r"model.embed_tokens.weight, BF16\[1, 2\], takes \d+ bytes")
    file.write_bytes(whole)
    damage_header(file, lambda h: h["model.embed_tokens.weight"]["data_offsets"].reverse())
    refused(folder, "is damaged: the tensor model.embed_tokens.weight starts at byte")


def test_a_tensor_of_another_shape(folder):
    rewrite(folder, lambda t: t.update({Q: t[Q][:-1]}))
    refused(folder, rf"{re.escape(Q)} is \[383, 78\], expected \[384, 78\]")


def test_missing_and_unknown_tensors_are_all_listed(folder):
    def change(tensors):
        del tensors[Q], tensors["lm_head.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = np.ones((1, 1), jnp.bfloat16)

    rewrite(folder, change)
    refused(
        folder,
        rf"not those of a llama model .* 2 missing: lm_head.weight, {re.escape(Q)}; "
        "1 unknown: model.layers.9.mlp.up_proj.weight",
    )


def test_missing_tensors_alone(folder):
    rewrite(folder, lambda tensors: tensors.pop(Q))
    refused(folder, rf"in its config.json; 1 missing: {re.escape(Q)}\.")


def test_biases_of_a_llama_are_unknown(folder):
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(folder, lambda t: t.update({name: np.ones(384, jnp.bfloat16)}))
    refused(folder, f"1 unknown: {re.escape(name)}")


def test_a_tensor_that_two_shards_hold(folder):
    shards = [folder / f"model-0000{k}-of-00003.safetensors" for k in (1, 2)]
    shutil.copy(*shards)
    refused(folder, r"has twice: .* \(in model-00001-of-00003.safetensors and model-00002-of")


def test_a_tensor_that_one_file_holds_twice(folder):
    file = folder / "model-00001-of-00003.safetensors"
    entries = [{"dtype": "F32", "shape": [1], "data_offsets": [4 * k, 4 * k + 4]} for k in (0, 1)]
    text = ", ".join(f'"lm_head.weight": {json.dumps(entry)}' for entry in entries)
    header = f"{{{text}}}".encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(folder, r"has twice: lm_head.weight \(in model-00001-of-00003.* and model-00001-of")


def test_a_tensor_under_two_names(tmp_path):
    model = MODELS["gemma3"]
    tensors = tensors_of(model)
    tensors["language_model.model.norm.weight"] = tensors["model.norm.weight"].copy()
    folder = write_folder(tmp_path / "g", model, tensors=tensors)
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config_json(model)}
    (folder / "config.json").write_text(json.dumps(outer))
    refused(folder, "several for one: .*model.norm.weight and .*model.norm.weight")


def test_an_index_that_does_not_fit_its_shards(folder):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())["weight_map"]
    one, two = (f"model-0000{k}-of-00003.safetensors" for k in (1, 2))
    wrong = next(name for name, shard in index.items() if shard == two)
    edit_json(file, weight_map={**index, wrong: one})
    refused(folder, rf"lists tensors that are not in the shards it names: {wrong} \(in {one}\)")
    edit_json(file, weight_map={**index, "no.such": one})
    refused(folder, r"no.such \(in model-00001")
    edit_json(file, weight_map={**index, wrong: "../elsewhere.safetensors"})
    refused(folder, r"names a shard outside its folder: '../elsewhere.safetensors'")
    file.write_text("{}")
    refused(folder, 'holds no "weight_map"')


def test_quantized_tensors(folder):
    rewrite(folder, lambda t: t.update({Q: t[Q].astype(np.int8)}))
    refused(folder, rf"another dtype than BF16, F16, F32, F64 .* {re.escape(Q)} \(I8\).*quantized")


def test_a_path_with_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no Hugging Face folder at"):
        checkpoints.convert_hf(tmp_path / "none", tmp_path / "out")
    with pytest.raises(checkpoints.CheckpointError, match="a Hugging Face folder one with"):
        checkpoints.load(tmp_path)


def test_a_config_that_is_missing_or_damaged(folder):
    (folder / "config.json").write_text("[]")
    refused(folder, "is a JSON object with its fields")
    (folder / "config.json").write_text("{")
    refused(folder, "damaged: it is not JSON")
    (folder / "config.json").unlink()
    with pytest.raises(checkpoints.CheckpointError, match=r"has a config.json; .* has none"):
        checkpoints.convert_hf(folder, folder.parent / "out")


def test_a_dtype_no_checkpoint_has(sharded, tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match="bfloat16, float32; got int8"):
        checkpoints.convert_hf(sharded, tmp_path / "out", dtype="int8")
    with pytest.raises(checkpoints.CheckpointError, match="bfloat16, float32; got int8"):
        checkpoints.load(sharded, dtype="int8")


# Where it goes


def test_nothing_is_replaced_unasked(sharded, tmp_path):
    out = tmp_path / "ours"
    checkpoints.convert_hf(sharded, out)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        checkpoints.convert_hf(sharded, out)
    checkpoints.convert_hf(sharded, out, overwrite=True, dtype="float32")
    assert checkpoints.load(out).dtype == jnp.float32
    with pytest.raises(FileExistsError, match="A checkpoint is replaced and nothing else"):
        checkpoints.convert_hf(sharded, sharded, overwrite=True)
    assert os.listdir(tmp_path) == ["ours"]


def broken_off(monkeypatch, error: BaseException) -> None:
    """The third block cannot be written any more."""
    write, count = arrays._write, []

    def fails(store, start, numbers):
        count.append(start)
        if len(count) == 3:
            raise error
        write(store, start, numbers)

    monkeypatch.setattr("checkpoints.arrays._write", fails)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [False, True])
def test_a_conversion_that_is_broken_off_leaves_all_as_it_was(
    sharded, tmp_path, monkeypatch, error, existing
):
    out = tmp_path / "ours"
    if existing:
        checkpoints.convert_hf(sharded, out)
    with monkeypatch.context() as patch:
        broken_off(patch, error)
        with pytest.raises(type(error)):
            checkpoints.convert_hf(sharded, out, overwrite=True, dtype="float32")
    assert os.listdir(tmp_path) == (["ours"] if existing else [])
    if existing:
        assert_same(checkpoints.load(out), checkpoints.load(sharded))


_LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails instead, as on a full disk
from ffjax.cli import main
import checkpoints, numpy as np
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.skipif(os.name != "posix", reason="sets a limit on the size of files")
def test_a_file_that_cannot_be_written_is_a_sentence(sharded, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(sharded), str(tmp_path / "ours")],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert re.search(
        "ffjax convert: The (array|checkpoint) .*cannot be written: .*disk full", done.stderr
    )
    assert os.listdir(tmp_path) == []


def test_ctrl_c_between_chunks_takes_effect(sharded, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "_CHUNK_BYTES", 700)
    done = []

    def progress(read, total):
        done.append(read)
        if len(done) == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        checkpoints.convert_hf(sharded, tmp_path / "ours", progress=progress)
    assert os.listdir(tmp_path) == []


def test_progress_counts_every_byte_once(sharded, tmp_path):
    told = []
    checkpoints.convert_hf(sharded, tmp_path / "ours", progress=lambda *x: told.append(x))
    total = sum(array.nbytes for array in tensors_of(MODELS["untied_stretched_rope"]).values())
    assert told[-1] == (total, total)
    assert len(told) == len(MODELS["untied_stretched_rope"].weights())


# Memory: see test_streaming.py as well


def test_a_tensor_is_read_in_parts(sharded, tmp_path, monkeypatch):
    checkpoints.convert_hf(sharded, tmp_path / "whole")
    monkeypatch.setattr("checkpoints.hf_files._PART_BYTES", 20)
    checkpoints.convert_hf(sharded, tmp_path / "parts")
    assert_same(checkpoints.load(tmp_path / "whole"), checkpoints.load(tmp_path / "parts"))


def test_an_array_is_gone_before_the_next_is_made(sharded, tmp_path, monkeypatch):
    made = []

    def empty(shape, dtype):
        assert all(array() is None for array in made)
        array = np.empty(shape, dtype)
        made.append(weakref.ref(array))
        return array

    monkeypatch.setattr("checkpoints.incoming.empty", empty)
    checkpoints.convert_hf(sharded, tmp_path / "ours")
    assert len(made) == 9
