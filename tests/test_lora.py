"""A LoRA adapter is merged as peft merges it, bit by bit, or a sentence says why not."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import write_gguf
from hf_folders import config_json, edit_json, write_folder, write_lora
from hf_models import MODELS
from lora_cases import BASE, CASES, GOLDEN, matrix
from safetensors.numpy import load, save_file

import checkpoints
from checkpoints import lora_merge
from checkpoints.adapters import merge_adapter
from checkpoints.incoming import Incoming
from checkpoints.opening import open_incoming
from ffjax.cli import main

pytestmark = pytest.mark.filterwarnings("error")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "model.layers.1.self_attn.q_proj"


@functools.cache
def golden(case: str, file: str) -> bytes:
    with np.load(GOLDEN) as files:
        return files[f"{case}/{file}"].tobytes()


def peft_made(case: str, dtype: str) -> dict[str, np.ndarray]:
    """The tensors that peft changed, of the model loaded as a dtype."""
    tensors = load(golden(case, dtype))
    return {name: x if dtype == "float32" else x.view(jnp.bfloat16) for name, x in tensors.items()}


def write_adapter(
    directory: Path,
    case: str = "patterns_and_rslora",
    change: Callable[[dict[str, np.ndarray]], Any] | None = None,
    **fields: Any,
) -> Path:
    """The adapter of a case as peft wrote it, or with tensors or fields changed."""
    directory.mkdir(parents=True)
    (directory / CONFIG).write_bytes(golden(case, CONFIG))
    (directory / WEIGHTS).write_bytes(golden(case, WEIGHTS))
    if change is not None:
        change(tensors := load(golden(case, WEIGHTS)))
        save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    if fields:
        edit_json(directory / CONFIG, **fields)
    return directory


def numbers(incoming: Incoming, dtype: Any) -> dict[str, np.ndarray]:
    """Every tensor of a model that comes in, by its name."""
    return {
        slot.theirs: numbers[slot.place].copy()
        for name, _, numbers in incoming.blocks(np.dtype(dtype), whole=True)
        for slot in incoming.slots[name]
    }


def merged(base: Path, adapter: Path, dtype: Any = jnp.float32) -> dict[str, np.ndarray]:
    out = adapter.parent / "out"
    return numbers(merge_adapter(open_incoming(base), adapter, out=out), dtype)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("lora") / "base", BASE)


def assert_merged(got: dict[str, np.ndarray], case: str, dtype: str) -> None:
    """Each tensor is what peft made of it; what is not in the golden is the model's own."""
    expected = {name: x.astype(dtype) for name, x in BASE.weights().items()}
    expected |= peft_made(case, dtype)
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert got[name].dtype == dtype
        np.testing.assert_array_equal(got[name].astype(np.float32), x.astype(np.float32), name)


# What is merged


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_tensors_are_those_that_peft_merges(case, dtype, base, tmp_path):
    adapter = write_adapter(tmp_path / "lora", case)
    assert_merged(merged(base, adapter, dtype), case, dtype)


@pytest.mark.parametrize("case", CASES)
def test_the_golden_is_none_that_a_simpler_rule_meets(case):
    """Nothing but the right scaling, roundings and matrices gives these bits."""
    exact, rounded = (peft_made(case, dtype) for dtype in ("float32", "bfloat16"))
    plain = {name: x.astype(jnp.bfloat16) for name, x in BASE.weights().items()}
    for name, x in exact.items():
        assert np.any(x != plain[name].astype(np.float32))
        assert np.any(rounded[name] != plain[name])
    if case == "embedding_and_head":
        twice = "model.embed_tokens.weight"
        assert np.any(exact[twice].astype(jnp.bfloat16) != rounded[twice])


def test_blocks_of_rows_and_parts_of_a_file_are_the_same(base, tmp_path, monkeypatch):
    monkeypatch.setattr(lora_merge, "_BLOCK", 17)
    monkeypatch.setattr("checkpoints.hf_files._PART_BYTES", 20)
    adapter = write_adapter(tmp_path / "lora", "every_matrix")
    assert_merged(merged(base, adapter, "bfloat16"), "every_matrix", "bfloat16")


@pytest.mark.parametrize(("rows", "columns"), [(1, 50), (3, 50), (7, 9), (64, 1), (128, 4096)])
def test_blocks_hold_every_row_once_and_none_alone(rows, columns, monkeypatch):
    monkeypatch.setattr(lora_merge, "_BLOCK", 100)
    blocks = [range(rows)[block] for block in lora_merge._blocks(rows, columns)]
    assert [row for block in blocks for row in block] == [*range(rows)]
    assert rows == 1 or min(map(len, blocks)) > 1
    assert max(map(len, blocks)) <= max(3, 100 // columns + 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_an_adapter_of_another_dtype(dtype, base, tmp_path):
    """The integers of these matrices are exact in all of them."""

    def recast(tensors):
        tensors |= {name: x.astype(dtype) for name, x in tensors.items()}

    adapter = write_adapter(tmp_path / "lora", "every_matrix", recast)
    assert_merged(merged(base, adapter), "every_matrix", "float32")


def test_a_model_of_another_dtype_is_rounded_before(tmp_path):
    """As transformers rounds what it loads as bfloat16, before peft sees it."""
    exact = {name: (x * np.float32(1.001)).astype(np.float32) for name, x in BASE.weights().items()}
    rounded = {name: x.astype(jnp.bfloat16) for name, x in exact.items()}
    adapter = write_adapter(tmp_path / "lora", "every_matrix")
    a, b = (
        merged(write_folder(tmp_path / name, BASE, tensors=x), adapter, jnp.bfloat16)
        for name, x in (("exact", exact), ("rounded", rounded))
    )
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_a_gguf_file_is_merged_as_well(tmp_path):
    """Its rows of queries and keys come in another order, which is undone before."""
    file = write_gguf(tmp_path / "base.gguf", BASE)
    adapter = write_adapter(tmp_path / "lora", "every_matrix")
    assert_merged(merged(file, adapter, "bfloat16"), "every_matrix", "bfloat16")


def test_names_of_the_text_model_of_one_that_sees(tmp_path):
    model = MODELS["gemma3"]
    folder = write_folder(tmp_path / "plain", model)
    outer = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "vision_config": {},
        "text_config": config_json(model, architectures=None),
    }
    (folder / "config.json").write_text(json.dumps(outer))
    weight = model.weights()[f"{Q}.weight"]
    a, b = matrix(0, (2, weight.shape[1])), matrix(1, (weight.shape[0], 2))
    names = [
        Q.replace("model.", text) for text in ("language_model.model.", "model.language_model.")
    ]
    pattern = ".*layers.1.*q_proj"
    for release, name in enumerate(names):
        adapter = write_lora(tmp_path / str(release), {name: weight}, target_modules=pattern)
        got = merged(folder, adapter)[f"{Q}.weight"]
        np.testing.assert_array_equal(got, weight + b @ a * 4)
    both = write_lora(tmp_path / "both", dict.fromkeys(names, weight), target_modules=pattern)
    refused(folder, both, "2 unknown tensors")


def test_rows_of_the_file_are_merged_before_they_are_put_in_our_order(tmp_path):
    """Phi 3's fused projection, of which a part of each head is rotated."""
    name = "model.layers.1.self_attn.qkv_proj"
    weights = MODELS["phi3"].weights()
    weight = weights[f"{name}.weight"]
    a, b = matrix(0, (2, weight.shape[1])), matrix(1, (weight.shape[0], 2))
    adapter = write_lora(tmp_path / "lora", {name: weight}, target_modules=".*layers.1.*qkv_proj")
    folder = write_folder(tmp_path / "base", "phi3", dtype=np.float32)
    by_hand = {**weights, f"{name}.weight": weight + b @ a * 4}
    wanted = write_folder(tmp_path / "by_hand", "phi3", tensors=by_hand)
    got, expected = merged(folder, adapter), numbers(open_incoming(wanted), np.float32)
    assert got.keys() == expected.keys()
    for each, array in expected.items():
        np.testing.assert_array_equal(got[each], array, each)
    assert not np.array_equal(got[f"{name}.weight"], by_hand[f"{name}.weight"])  # another order


def test_the_command_and_the_function(base, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "my-lora", "every_matrix")
    out = tmp_path / "command"
    assert main(["convert", str(base), str(out), "--adapter", str(adapter)]) == 0
    assert "Merged the adapter my-lora into 14 tensors." in capsys.readouterr().out
    source = checkpoints.Manifest.read(out).source
    assert source is not None
    assert source["adapter"] == {"name": "my-lora", "tensors": 14}
    told = []
    made = checkpoints.convert_hf(
        base, tmp_path / "ours", adapter=adapter, progress=lambda *x: told.append(x)
    )
    assert made.adapter == ("my-lora", 14)
    assert told[-1][0] == told[-1][1]
    down = peft_made("every_matrix", "bfloat16")["model.layers.1.mlp.down_proj.weight"]
    for path in (out, tmp_path / "ours"):
        assert np.asarray(checkpoints.load(path).layers.down[1]).tobytes() == down.tobytes()
    assert str(tmp_path).encode() not in (out / "manifest.json").read_bytes()


# What is refused


def refused(base: Path, adapter: Path, *matches: str) -> None:
    with pytest.raises(checkpoints.CheckpointError, match=re.escape(matches[0])) as caught:
        checkpoints.convert_hf(base, adapter.parent / "out", adapter=adapter)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert all(match in text for match in (*matches, str(adapter))), text
    assert not (adapter.parent / "out").exists()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"peft_type": "LOHA"}, 'peft_type "LOHA" of an adapter is not supported; supported: LORA'),
        ({"peft_type": None}, "peft_type null of an adapter"),
        ({"bias": "lora_only"}, 'bias "lora_only" of an adapter is not supported'),
        ({"init_lora_weights": "pissa_niter_4"}, 'init_lora_weights "pissa_niter_4"'),
        ({"use_dora": True}, "asks for DoRA, use_dora (true), which is not supported"),
        ({"modules_to_save": ["lm_head"]}, 'trained whole, modules_to_save (["lm_head"])'),
        ({"lora_bias": True}, "a bias of lora_B"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices ([3])"),
        ({"r": 0}, "r is a positive integer, got 0"),
        ({"r": True}, "r is a positive integer, got True"),
        ({"lora_alpha": "8"}, "lora_alpha is a number, got '8'"),
        ({"rank_pattern": {"q_proj": 1.5}}, "q_proj is a positive integer, got 1.5"),
        ({"rank_pattern": {"(": 2}}, "the pattern '(', and that is no regular expression"),
        ({"target_modules": None}, "names its modules in target_modules"),
        ({"target_modules": ["q_proj"]}, "gives model.layers.1.mlp.down_proj no adapter"),
        ({"exclude_modules": "model.*o_proj"}, "gives model.layers.1.self_attn.o_proj no adapter"),
        ({"layers_to_transform": 0}, "gives model.layers.1.mlp.down_proj no adapter"),
        ({"layers_pattern": "blocks"}, "gives model.layers.1.mlp.down_proj no adapter"),
        ({"layers_to_transform": None}, "gives 4 modules an adapter of which"),
        ({"target_modules": "all-linear"}, "gives 10 modules an adapter of which"),
    ],
)
def test_what_the_configuration_may_not_ask_for(fields, match, base, tmp_path):
    refused(base, write_adapter(tmp_path / "lora", **fields), match)


def test_fields_that_nothing_reads_are_named(base, tmp_path):
    adapter = write_adapter(tmp_path / "lora", use_something=False, made_by="a tool")
    with pytest.warns(checkpoints.HFFolderWarning, match=r'left out: made_by \("a tool"\)\.$'):
        got = merged(base, adapter)
    assert_merged(got, "patterns_and_rslora", "float32")


A, B = (f"base_model.model.{Q}.lora_{part}.weight" for part in "AB")


@pytest.mark.parametrize(
    ("change", "matches"),
    [
        (lambda t: t.pop(A), (B, "no A beside it")),
        (lambda t: t.pop(B), (A, "no B beside it")),
        (
            lambda t: t.update({A: t[A][:1]}),
            (A, "is [1, 8], expected [2, 8]", "trained on this model"),
        ),
        (lambda t: t.update({B: t[B][:-1]}), (B, "is [7, 2], expected [8, 2]")),
        (lambda t: t.update({A: t[A][:, 1:]}), (A, "is [2, 7], expected [2, 8]")),
        (lambda t: t.update({A.replace("1", "2"): t[A]}), ("1 unknown", A.replace("1", "2"))),
        (lambda t: t.update({A.replace("_A", "_C"): t[A]}), ("1 unknown tensors",)),
        (lambda t: t.update({A.replace("_A.weight", "_magnitude_vector"): t[A]}), ("1 unknown",)),
        (lambda t: t.update({A[11:]: t[A]}), ("1 unknown tensors",)),
        (lambda t: t.update({f"base_model.model.{Q}.weight": t[B]}), ("1 unknown tensors",)),
        (lambda t: t.update({B.replace("weight", "bias"): t[B]}), ("1 unknown tensors",)),
        (
            lambda t: t.update({"base_model.model.model.norm.lora_A.weight": t[A]}),
            ("1 unknown tensors: base_model.model.model.norm.lora_A.weight",),
        ),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_A.weight": t[A]}),
            ("1 unknown tensors",),
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": t[B]}),
            ("lm_head.weight is [8, 2], expected [7, 8]",),
        ),
        (lambda t: t.update({A: t[A].astype(np.int8)}), (A, "(I8)")),
    ],
)
def test_what_the_tensors_may_not_be(change, matches, base, tmp_path):
    refused(base, write_adapter(tmp_path / "lora", change=change), *matches)


def test_a_folder_that_is_none_of_an_adapter(base, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="There is no folder of an adapter at"):
        checkpoints.convert_hf(base, out, adapter=tmp_path / "none")
    adapter = write_adapter(tmp_path / "lora")
    content = golden("patterns_and_rslora", WEIGHTS).replace(
        b"layers.1.self_attn.o", b"layers.1.self_attn.q"
    )
    (adapter / WEIGHTS).write_bytes(content)
    refused(base, adapter, "A tensor's name is there once", f"has twice: {A}, {B}.")
    with pytest.raises(checkpoints.CheckpointError, match=r"is a file. Give the folder"):
        checkpoints.convert_hf(base, out, adapter=adapter / CONFIG)
    with pytest.raises(ValueError, match="A model is written outside the folder"):
        checkpoints.convert_hf(base, adapter / "out", adapter=adapter)
    (adapter / WEIGHTS).unlink()
    refused(base, adapter, "has no such file. Download or copy")
    (adapter / WEIGHTS).symlink_to("blobs/gone")
    refused(base, adapter, "is a link, and blobs/gone, to which it leads, is not there")
    (adapter / WEIGHTS).unlink()
    (adapter / "adapter_model.bin").write_bytes(b"x")
    refused(base, adapter, "has adapter_model.bin. Load the adapter by peft, and save it")
    (adapter / CONFIG).write_text("{")
    refused(base, adapter, "damaged: it is not JSON")
    (adapter / CONFIG).write_text("[]")
    refused(base, adapter, "is a JSON object")
    (adapter / CONFIG).unlink()
    refused(base, adapter, f"has no {CONFIG}. Give the folder that peft")


def test_an_adapter_of_a_head_that_is_the_embedding(tmp_path):
    tied = dataclasses.replace(BASE, settings={**BASE.settings, "tie_word_embeddings": True})
    folder = write_folder(tmp_path / "base", tied)
    adapter = write_adapter(tmp_path / "lora", "embedding_and_head")
    refused(folder, adapter, "the head is the embedding", "model.embed_tokens and lm_head")
    plain = write_adapter(tmp_path / "plain", "every_matrix")
    got = merged(folder, plain)
    expected = peft_made("every_matrix", "float32")
    assert all(np.array_equal(got[name], x) for name, x in expected.items())


def test_a_quantized_model(tmp_path):
    wide = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 16}
    model = dataclasses.replace(BASE, settings={**BASE.settings, **wide})
    file = write_gguf(tmp_path / "base.gguf", model, dtype="Q8_0")
    adapter = write_adapter(tmp_path / "lora")
    with pytest.raises(checkpoints.CheckpointError, match=r"base.gguf has Q8_0. Give a version"):
        merge_adapter(open_incoming(file), adapter, out=tmp_path / "out")


def test_no_number_is_read_before_its_tensor_is(base, tmp_path, monkeypatch):
    """What is merged is a block of our arrays at a time; the matrices of others are on disk."""
    reads, read = [], lora_merge.Factors.read

    def counted(factors):
        reads.append(factors.a.name)
        return read(factors)

    monkeypatch.setattr(lora_merge.Factors, "read", counted)
    adapter = write_adapter(tmp_path / "lora", "every_matrix")
    incoming = merge_adapter(open_incoming(base), adapter, out=tmp_path / "out")
    assert reads == []
    monkeypatch.setattr("checkpoints.blocks._BLOCK_BYTES", 1)
    monkeypatch.setattr("checkpoints.blocks._CHUNK_BYTES", 1)
    so_far = [len(reads) for _ in incoming.blocks(np.dtype(np.float32))]
    assert sorted({*so_far} - {0}) == [1, 2, 3, 4, 6, 8, 11, 14]
