"""Random weights of a model's sizes: by a preset's name, or by a path to them."""

import argparse
import dataclasses
import json
import re
import shutil

import pytest
from decode_cases import random_model, small_config

import checkpoints
from ffjax.benchmark import loops, prompts, suite
from ffjax.cli import commands, main, make_parser
from ffjax.commands import bench
from ffjax.commands import compile as compile_command
from ffjax.commands.sizes import add_size_arguments, chosen_sizes
from ffjax.config import PRESETS, preset
from ffjax.dims import step_dims
from ffjax.formats import INT8, WeightFormats
from ffjax.quantization import quantize, quantized_config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model as a checkpoint, quantized, as a Hugging Face folder, as its config.json alone."""
    place = tmp_path_factory.mktemp("made")
    model = random_model(small_config(vocab_size=257))
    checkpoints.save(model, place / "ckpt")
    checkpoints.save(quantize(model, "int8"), place / "int8")
    checkpoints.export_hf(place / "ckpt", place / "hf")
    (place / "config").mkdir()
    shutil.copyfile(place / "hf" / "config.json", place / "config" / "config.json")
    return place


def chosen(*arguments):
    parser = argparse.ArgumentParser()
    add_size_arguments(parser)
    return chosen_sizes(parser.parse_args(list(map(str, arguments))), "bench")


def test_a_path_gives_its_sizes_whether_weights_are_there_or_not(made):
    ours = checkpoints.Manifest.read(made / "ckpt").config
    for name in ("ckpt", "hf", "config"):
        found = chosen("--model", made / name)
        assert dataclasses.replace(found, name=ours.name, family=ours.family) == ours
        int8 = chosen("--model", made / name, "--weights", "int8", "--head", "int8")
        assert int8 == quantized_config(found, WeightFormats.of_layers(INT8, INT8))


def test_random_weights_of_a_quantized_model_are_quantized_as_it_is(made):
    stored = checkpoints.Manifest.read(made / "int8").config
    assert chosen("--model", made / "int8") == stored
    with pytest.raises(ValueError, match="its random weights are made so"):
        chosen("--model", made / "int8", "--weights", "bfloat16")


def test_a_preset_is_what_it_was():
    assert chosen("--config", "llama3.1-70b") == preset("llama3.1-70b")
    assert chosen("--config", "qwen3-32b", "--weights", "int4").weights.down is not None


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_a_command_takes_one_of_them(capsys, made, command):
    for arguments in ([], ["--config", "llama3.2-1b", "--model", str(made / "hf")]):
        assert main([command, *arguments]) == 2
        err = capsys.readouterr().err
        assert "--config" in err
        assert "--model" in err


def test_fields_are_left_out_of_folders_alone(made, tmp_path):
    data = json.loads((made / "config" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"attention_sinks": 4}))
    found = chosen("--model", tmp_path, "--ignore-field", "attention_sinks")
    assert found.model_dim == data["hidden_size"]
    for arguments in (["--config", "llama3.2-1b"], ["--model", made / "ckpt"]):
        with pytest.raises(ValueError, match="--ignore-field is for a Hugging Face folder"):
            chosen(*arguments, "--ignore-field", "x")


@pytest.mark.parametrize("command", ["bench", "tune", "fidelity"])
def test_help_lists_the_presets(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    words = re.sub(r"-\s+", "-", capsys.readouterr().out).split()  # lines end within names
    assert set(PRESETS) <= {word.strip(",;") for word in words}


def test_the_compile_command_takes_a_path(made, capsys):
    parser = compile_command.command_line()
    asked = parser.parse_args(["--model", str(made / "config"), "--batch", "2"])
    config = chosen("--model", made / "config")
    assert compile_command.dims_of(asked) == step_dims(config, 2, 16_384)
    assert compile_command.main(["--model", str(made / "nothing")]) == 1
    assert "There is no checkpoint or Hugging Face folder at" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [[], ["--loop"], ["--prompt", "4"]])
def test_bench_measures_a_config_alone(made, monkeypatch, kind):
    class Asked(Exception):
        pass

    def run(sweep, say):
        raise Asked(sweep.config)

    for module in (suite, loops, prompts):
        monkeypatch.setattr(module, "run", run)
    args = make_parser(commands(), "").parse_args(["bench", "--model", str(made / "config"), *kind])
    with pytest.raises(Asked) as asked:
        bench.run(args)
    assert asked.value.args == (chosen("--model", made / "config"),)


def test_tune_reads_a_config_alone(made, capsys):
    assert main(["tune", "--model", str(made / "config")]) == 2
    assert "The fused kernel runs on NVIDIA GPUs" in capsys.readouterr().err


def test_fidelity_needs_weights(made, capsys):
    assert main(["fidelity", "--model", str(made / "config")]) == 2
    assert "has model.safetensors or" in capsys.readouterr().err
