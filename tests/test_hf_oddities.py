"""Folders as they are found: stray fields, odd ids, adapters, buffers."""

import json
import re
import subprocess
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import ARCHITECTURES, config_json, edit_json, tensors_of, write_folder
from hf_models import MODELS
from safetensors.numpy import save_file
from test_checkpoints import assert_same

import checkpoints
import ffjax
from ffjax.cli import commands, main

pytestmark = [
    pytest.mark.once(
        "Files are read by ours; a sample starts a process.",
        sample=[
            "test_python_that_makes_errors_of_warnings",
            "test_unknown_fields_are_named_in_one_warning",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

# A model of each family.
OF_FAMILY = {model.family: name for name, model in reversed(MODELS.items())}


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "hf", "tied")


def opened(folder, **options):
    """Loads the folder; returns the texts of what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoints.load(folder, **options)
    assert all(one.category is checkpoints.HFFolderWarning for one in caught)
    return [str(one.message) for one in caught]


def refused(folder, *names, **options):
    with pytest.raises(checkpoints.CheckpointError) as caught:
        checkpoints.load(folder, **options)
    text = str(caught.value)
    assert text.endswith(".")
    assert str(folder) in text
    for name in names:
        assert name in text, text
    return text


# Fields


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("value", [False, None, 0])
def test_attention_in_both_directions_is_refused_in_every_family(family, value, tmp_path):
    folder = write_folder(tmp_path / "hf", OF_FAMILY[family], is_causal=value)
    text = refused(folder, "is_causal", "sees later tokens", "supported: true")
    assert "--ignore-field is_causal" in text
    edit_json(folder / "config.json", is_causal=True)
    assert opened(folder) == []


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("add_cross_attention", True),
        ("is_encoder_decoder", True),
        ("quantization_config", {"bits": 4}),
        ("use_bidirectional_attention", True),
        ("num_experts", 8),
        ("use_moe", True),
        ("alibi", True),
        ("parallel_attn", True),
        ("norm_type", "layernorm"),
        ("pruned_heads", {"0": [1]}),
        ("mlp_only_layers", [1]),
        ("per_layer_config", {"1": {"intermediate_size": 8}}),
        ("attention_chunk_size", 4),
        ("text_config", {"hidden_size": 3}),
        ("transformers_weights", "other.safetensors"),
    ],
)
def test_what_changes_the_numbers_is_refused(family, field, value, tmp_path):
    folder = write_folder(tmp_path / "hf", OF_FAMILY[family], **{field: value})
    refused(folder, f"{field} (", json.dumps(value)[:20])


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_changes_nothing_is_not_spoken_of(family, tmp_path):
    """Fields of released files: SmolLM2, Qwen, Mistral, Llama, Gemma."""
    fields = {
        "_model_name_or_path": "/fsx/some/where",
        "_name_or_path": "x",
        "_flash_attn_2_enabled": True,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "hidden_dropout": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "is_decoder": True,
        "max_sequence_length": 4,
        "model_max_length": 4,
        "mlp_only_layers": [],
        "num_experts": 0,
        "pruned_heads": {},
        "gradient_checkpointing": True,
        "unsloth_version": "2025",
        "text_config": None,
        "add_cross_attention": False,
        "is_encoder_decoder": False,
        "tie_encoder_decoder": False,
        "cross_attention_hidden_size": None,
        "rope_interleaved": False,
        "use_bidirectional_attention": False,
        "norm_type": "rmsnorm",
        "partial_rotary_factor": 1,
    }
    folder = write_folder(tmp_path / "hf", OF_FAMILY[family], **fields)
    assert opened(folder) == []


def test_unknown_fields_are_named_in_one_warning(folder):
    edit_json(folder / "config.json", foo_bar=3, baz=False, qux=[1, 2])
    [text] = opened(folder)
    assert all(part in text for part in ("baz (false)", "foo_bar (3)", "qux ([1, 2])"))
    assert str(folder) in text
    assert opened(folder, ignore_fields=("foo_bar", "baz", "qux")) == []
    with pytest.warns(checkpoints.HFFolderWarning, match="foo_bar"):
        checkpoints.convert_hf(folder, folder.parent / "ours")
    # Written as null, which says nothing, it is unknown all the same.
    file = folder / "config.json"
    file.write_text(file.read_text()[:-1] + ', "nul": null}')
    assert "nul (null)" in opened(folder)[0]


def test_code_of_the_models_own_is_not_run_and_that_is_said(folder):
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.XForCausalLM"})
    [text] = opened(folder)
    assert "auto_map names code" in text
    assert "trust_remote_code" in text
    edit_json(folder / "config.json", foo=1)
    [text] = opened(folder)
    assert "auto_map" in text
    assert "foo (1)" in text
    edit_json(folder / "config.json", is_causal=False)
    refused(folder, "is_causal")


def test_a_refused_field_can_be_ignored_and_that_is_noted(folder, tmp_path):
    plain = checkpoints.load(folder)
    edit_json(folder / "config.json", is_causal=False, num_experts=4)
    refused(folder, "num_experts", ignore_fields=("is_causal",))
    refused(folder, "is_causal", ignore_fields=("num_experts",))
    names = ("num_experts", "is_causal")
    checkpoints.convert_hf(folder, tmp_path / "ours", ignore_fields=names)
    assert_same(checkpoints.load(tmp_path / "ours"), plain)
    assert_same(ffjax.load(folder, ignore_fields=names), plain)
    with pytest.raises(ValueError, match="is neither"):
        ffjax.load(tmp_path / "ours", ignore_fields=names)
    source = checkpoints.Manifest.read(tmp_path / "ours").source
    assert source is not None
    assert source["ignored_fields"] == ["is_causal", "num_experts"]


@pytest.mark.parametrize("name", ["hidden_size", "rope_scaling", "architectures", "eos_token_id"])
def test_an_understood_field_cannot_be_ignored(folder, name):
    refused(folder, "understood", name, ignore_fields=(name,))


def test_one_name_is_no_sequence_of_names(folder):
    with pytest.raises(TypeError, match=r"ignore_fields is a sequence of names, as \('x',\)"):
        checkpoints.load(folder, ignore_fields="x")


def test_a_model_within_another_has_the_fields_of_both(tmp_path):
    text = config_json(MODELS["gemma3"])
    outer = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
    }
    folder = write_folder(tmp_path / "hf", "gemma3")

    def write(outside, inside):
        data = {**outer, **outside, "text_config": {**text, **inside}}
        (folder / "config.json").write_text(json.dumps(data))

    write({}, {})
    assert opened(folder) == []
    for outside, inside in [
        ({"is_causal": False}, {}),
        ({}, {"is_causal": False}),
        ({"is_causal": False}, {"is_causal": True}),
        ({"is_causal": True}, {"is_causal": False}),
    ]:
        write(outside, inside)
        refused(folder, "is_causal")
        assert opened(folder, ignore_fields=("is_causal",)) == []
    write({"foo": 1}, {"bar": 2})
    assert len(opened(folder)) == 1
    (folder / "config.json").write_text(json.dumps({**outer, "text_config": None}))
    refused(folder, "lacks text_config")


def test_a_null_text_config_is_exported(folder, tmp_path):
    file = folder / "config.json"
    file.write_text(file.read_text()[:-1] + ', "text_config": null, "eos_token_id": 7}')
    checkpoints.convert_hf(folder, tmp_path / "ours")
    checkpoints.export_hf(tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 7


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("gemma2", {"sliding_window_pattern": 3}, "sliding_window_pattern without layer_types 3"),
        ("gemma2", {"_sliding_window_pattern": 3}, "without layer_types 3"),
        ("gemma3", {"_sliding_window_pattern": 3}, "without layer_types 3"),
    ],
)
def test_a_pattern_that_transformers_does_not_read(name, changes, match, tmp_path):
    folder = write_folder(tmp_path / "hf", name, **changes)
    file = folder / "config.json"
    layers = json.loads(file.read_text())["num_hidden_layers"]
    edit_json(file, layer_types=None)
    refused(folder, match)
    # Beside the layers' list it says nothing.
    kinds = ["sliding_attention", "full_attention", "full_attention"] * layers
    edit_json(file, layer_types=kinds[:layers])
    assert opened(folder) == []


# Tokens that end a text


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["</s>", ["</s>", 2], 2.0, True, {"id": 2}])
def test_an_end_that_is_no_id(folder, file, value):
    path = folder / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {})}))
    edit_json(path, eos_token_id=value)
    first = value[0] if isinstance(value, list) else value
    refused(folder, "eos_token_id", file, json.dumps(first))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("value", "lost"),
    [(-1, "-1"), (101, "101"), ([2, -1, 99_999], "-1, 99999"), ([], ""), (100, ""), ([2, 5], "")],
)
def test_an_end_that_no_token_is(folder, file, value, lost):
    path = folder / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {})}))
    edit_json(path, eos_token_id=value)
    said = opened(folder)
    assert len(said) == bool(lost)
    if lost:
        assert (
            f"eos_token_id in {path} names {lost}, and the model's tokens are 0 to 100" in said[0]
        )


# Adapters


def test_an_adapter_is_called_one(tmp_path):
    lora = tmp_path / "lora"
    lora.mkdir()
    file = lora / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/Base"}))
    text = refused(lora, "an adapter (LORA) of some/Base", "Merge it")
    for call in (
        lambda: checkpoints.load(lora),
        lambda: checkpoints.convert_hf(lora, tmp_path / "out"),
    ):
        with pytest.raises(checkpoints.CheckpointError, match=re.escape(text)):
            call()
    for content in ("{", "[]", "{}", '{"base_model_name_or_path": null}'):
        file.write_text(content)
        refused(lora, "does not name")


def test_an_adapter_beside_a_model(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/Base"}')
    refused(folder, "an adapter of some/Base beside a config.json", "remove adapter_config.json")


# Tensors


def _with(tmp_path, extra, **changed):
    tensors = {**tensors_of(MODELS["tied"]), **extra, **changed}
    return write_folder(tmp_path / "hf", "tied", tensors=tensors)


def test_buffers_of_old_releases_are_left_out(tmp_path):
    extra = {
        "model.layers.0.self_attn.bias": np.ones((1, 1, 4, 4), bool),
        "model.layers.0.self_attn.masked_bias": np.array(-1e9, np.float32),
        "model.layers.1.attn.bias": np.ones((1, 1, 4, 4), np.uint8),
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(32, np.float64),
        "model.layers.1.self_attn.rotary_emb.cos_cached": np.ones((4, 4), np.float32),
    }
    folder = _with(tmp_path, extra)
    made = checkpoints.convert_hf(folder, tmp_path / "ours")
    assert sorted(made.left_out) == sorted(extra)
    plain = write_folder(tmp_path / "plain" / "hf", "tied")  # the name is the folder's
    assert_same(checkpoints.load(folder), checkpoints.load(plain))


@pytest.mark.parametrize("kind", [bool, np.int64, np.uint64])
def test_a_mask_under_another_name_is_not_called_quantized(kind, tmp_path):
    folder = _with(tmp_path, {"model.mask": np.ones(4, kind)})
    assert "quantized" not in refused(folder, "model.mask", "are no weights")


def test_float64_is_read_and_rounding_is_said(tmp_path):
    tensors = {
        name: np.asarray(array, np.float64) for name, array in tensors_of(MODELS["tied"]).items()
    }
    plain = checkpoints.load(write_folder(tmp_path / "plain" / "hf", "tied"))
    folder = tmp_path / "hf"
    write_folder(folder, "tied")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for dtype, out in ((jnp.bfloat16, "a"), (jnp.float32, "b")):
        made = checkpoints.convert_hf(folder, tmp_path / out, dtype=dtype)
        assert made.rounded == {"F64": len(tensors)}
    assert_same(checkpoints.load(tmp_path / "a"), plain)
    name = "model.norm.weight"
    tensors[name] = np.full_like(tensors[name], 1 + 1e-12)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = checkpoints.load(folder, dtype=jnp.float32)
    assert np.all(np.asarray(model.final_norm[...]) == 1)


# The command line


@pytest.mark.parametrize(
    "name", ["convert", "generate", "inspect", "eval", "quantize", "fidelity", "doctor"]
)
def test_every_command_that_reads_a_folder_can_ignore_a_field(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert "--ignore-field NAME" in capsys.readouterr().out
    assert name in commands()


def test_warnings_are_lines_and_no_errors(folder, tmp_path, capsys):
    edit_json(folder / "config.json", foo=1, is_causal=False, eos_token_id=-1)
    out = str(tmp_path / "ours")
    assert main(["convert", str(folder), out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ffjax convert: config.json of")
    assert error.count("\n") == 1
    assert main(["convert", str(folder), out, "--ignore-field", "is_causal"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert sum("foo (1)" in line for line in lines) == 1
    assert lines[0].startswith(f"ffjax convert: In config.json of {folder}: nothing is known")
    assert main(["inspect", str(folder), "--json", "--ignore-field", "is_causal"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["family"] == "llama"
    assert len(captured.err.splitlines()) == 2
    arguments = ["--ignore-field", "is_causal", "--ignore-field", "foo"]
    assert main(["quantize", str(folder), f"{out}8", "--weights", "int8", *arguments]) == 0
    assert "foo" not in capsys.readouterr().err


def test_python_that_makes_errors_of_warnings(folder):
    edit_json(folder / "config.json", foo=1)
    command = [sys.executable, "-W", "error", "-m", "ffjax", "inspect", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.count("\n") == 1
    assert "foo (1)" in done.stderr


def test_nothing_is_ignored_where_there_is_no_folder(capsys):
    shipped = str(checkpoints.SHIPPED_MODEL)
    assert main(["inspect", shipped, "--ignore-field", "x"]) == 2
    assert "--ignore-field is for a Hugging Face folder" in capsys.readouterr().err
    for command in ("doctor", "fidelity"):
        assert main([command, "--config", "llama3.2-1b", "--ignore-field", "x"]) == 2
        assert "--config llama3.2-1b is neither" in capsys.readouterr().err
