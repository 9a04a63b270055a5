"""`bench`, `tune` and `fidelity` of quantized weights: made in a format, named in the results."""

import argparse
import dataclasses
import functools
import json
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from decode_cases import filled_cache
from decode_cases import random_tokens as step_tokens
from numerics import TOLERANCES, assert_close
from quantize_cases import FORMATS, kernel_config, model_to_quantize

from ffjax import cli, fidelity
from ffjax.benchmark import suite
from ffjax.benchmark import tune as tune_module
from ffjax.benchmark.baseline import baseline_step, split_cache, split_weights
from ffjax.benchmark.inputs import random_model
from ffjax.benchmark.suite import Sweep
from ffjax.benchmark.timing import Timing
from ffjax.benchmark.tune import Trial
from ffjax.commands.formats import add_format_arguments, chosen_config
from ffjax.config import PRESETS, ModelConfig
from ffjax.decode import reference_step
from ffjax.formats import FLOATING, INT8, WeightFormat, WeightFormats, int4
from ffjax.quantization import quantize, quantized_config
from pallas_kernels.gpu import Gpu
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.stream.tuning import Tuning

pytestmark = [
    pytest.mark.once(
        "What is timed and how it is printed is arithmetic; a sample runs the programs.",
        sample=[
            "test_a_format_that_the_matrices_cannot_have_is_a_sentence",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

H200 = Gpu.named("NVIDIA H200", "9.0", 132)
# Of the 257 tokens that prompts of `fidelity` may have; its inputs are whole groups of 128.
CONFIG = dataclasses.replace(
    kernel_config(FLOATING, vocab_size=257, num_layers=1, max_context=300),
    name="tiny-groups",
    tied_embeddings=True,
)
INT4_AND_INT8 = WeightFormats.of_layers(int4(), INT8)
NAMES = "int4 in groups of 128: qkv, attn_out, gate_up, down; int8: head"


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """A preset of these sizes, a small array to read, and programs compiled without care."""
    careful = jax.config.values["jax_disable_most_optimizations"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, CONFIG.name, CONFIG)
        patch.setattr(suite, "default_bytes", lambda device: 1 << 20)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", careful)


def run(capsys, command: str, *arguments: str) -> tuple[int, str, str]:
    code = cli.main([command, "--config", CONFIG.name, *arguments])
    return code, *capsys.readouterr()


@pytest.fixture
def made(monkeypatch) -> list[ModelConfig]:
    """Configurations of the random models that are made."""
    seen = []

    def noted(module: Any, make: Any) -> None:
        def noting(config: ModelConfig, *arguments: Any) -> Any:
            seen.append(config)
            return make(config, *arguments)

        monkeypatch.setattr(module, "random_model", noting)

    noted(suite, random_model)
    noted(fidelity, fidelity.random_model)
    return seen


# bench


def test_a_sweep_of_quantized_weights_names_its_formats_and_counts_its_bytes(capsys, made):
    options = ["--weights", "int4", "--head", "int8", "--implementation", "xla", "--compare", "xla"]
    grid = ["--batch", "2", "--position", "9", "--steps", "3"]
    code, out, err = run(capsys, "bench", *options, *grid, "--json")
    assert (code, err) == (0, "")
    assert made == [quantized_config(CONFIG, INT4_AND_INT8)]
    assert not made[0].tied_embeddings
    data = json.loads(out)
    assert (data["config"], data["dtype"], data["quantized"]) == (CONFIG.name, "bfloat16", NAMES)
    [point] = data["points"]
    numbers = sum(out * inner for out, inner in CONFIG.matrices.values())
    vectors, rows = 3 * CONFIG.model_dim, 2 * CONFIG.model_dim
    head = CONFIG.vocab_size * (CONFIG.model_dim + 4)
    assert point["weight_bytes"] == numbers // 2 + numbers // 64 + head + 2 * (vectors + rows)
    assert point["baseline"]["us_per_step"] > 0
    check = point["correctness"]
    assert check["against"] == "baseline"
    assert check["finite"]
    assert check["repeats"]
    limit = TOLERANCES["cached_vs_whole_bfloat16"].relative
    assert 0 <= check["difference"]["relative_error"] <= limit


@pytest.mark.parametrize(
    ("options", "formats"),
    [
        ([], FLOATING),
        (["--weights", "bfloat16"], FLOATING),
        (["--weights", "int8"], WeightFormats.of_layers(INT8)),
        (["--weights", "int4"], WeightFormats.of_layers(int4())),
        (["--weights", "int8", "--head", "int4"], WeightFormats.of_layers(INT8, int4())),
        (["--head", "int8"], WeightFormats(head=INT8)),
    ],
)
def test_options_choose_the_formats_and_untie_a_head_alone(options, formats, capsys, monkeypatch):
    asked = []

    def refuse(sweep: Sweep, say: Any) -> None:
        asked.append(sweep.config)
        raise ValueError("That is enough.")

    monkeypatch.setattr(suite, "run", refuse)
    assert run(capsys, "bench", *options)[0] == 2
    tied = formats.head is None
    assert asked == [dataclasses.replace(CONFIG, weights=formats, tied_embeddings=tied)]


def test_the_table_says_how_weights_are_stored(capsys):
    grid = ["--position", "3", "--steps", "1", "--implementation", "xla"]
    code, out, _ = run(capsys, "bench", "--weights", "int8", *grid)
    assert code == 0
    layers = "int8: qkv, attn_out, gate_up, down; the rest bfloat16"
    assert out.startswith(f"{CONFIG.name}, {layers}, on ")


@pytest.mark.parametrize("command", ["bench", "tune", "fidelity"])
def test_a_format_that_the_matrices_cannot_have_is_a_sentence(command, capsys, monkeypatch):
    odd = dataclasses.replace(CONFIG, ffw_dim=352)
    monkeypatch.setitem(PRESETS, CONFIG.name, odd)
    code, out, err = run(capsys, command, "--weights", "int4")
    assert (code, out) == (2, "")
    assert "The matrix down of tiny-groups cannot be int4 in groups of 128. Groups of int4" in err
    code, out, err = run(capsys, command, "--weights", "int2")
    assert (code, out) == (2, "")
    assert "--weights: one of bfloat16, int8, int4, int8-groups is needed, got 'int2'." in err


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
@pytest.mark.parametrize("option", ["--group-size 32", "--scales float16", "--offset zero"])
def test_an_option_of_int4_is_refused_where_there_is_none(weights, option, capsys):
    code, out, err = run(capsys, "bench", "--weights", weights, *option.split())
    assert (code, out) == (2, "")
    assert f"{option.split()[0]} is of int4" in err


def test_groups_scales_and_offsets_are_those_that_are_asked_for():
    asked = "--config llama3.2-1b --weights int4 --group-size 32 --scales float16 --offset zero"
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    add_format_arguments(parser)
    config = chosen_config(parser.parse_args(asked.split()))
    assert config.weights == WeightFormats.of_layers(int4(32, "float16", "zero"))
    asked = "--config llama3.2-1b --weights int8-groups --head int4 --scales float16"
    config = chosen_config(parser.parse_args(asked.split()))
    of_layers = WeightFormat(bits=8, group_size=32, scale_dtype="float16")
    assert config.weights == WeightFormats.of_layers(of_layers, int4(128, "float16"))


@pytest.mark.parametrize(
    ("formats", "gigabytes"),
    # 6.98e9 weights of layers and 1.4e6 rows; 0.53e9 of the embedding, and as many of the head.
    [
        (FLOATING, 16.1),
        (WeightFormats.of_layers(INT8), 9.1),
        (WeightFormats.of_layers(int4()), 5.7),
        (INT4_AND_INT8, 5.2),
    ],
)
def test_what_quantized_weights_take_is_asked_of_the_device(formats, gigabytes, monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1_000_000_000})
    monkeypatch.setattr(suite, "default_device", lambda: device)
    config = dataclasses.replace(PRESETS["llama3.1-8b"], weights=formats)
    sweep = Sweep(config=config, batches=(1,), positions=(9,), implementation="pallas")
    with pytest.raises(ValueError, match=f"caches take {gigabytes} GB at the largest point; this"):
        suite.run(sweep)


# The baseline


@pytest.mark.parametrize("name", FORMATS)
def test_the_baseline_says_what_the_reference_says(name):
    model = quantize(model_to_quantize(), FORMATS[name])
    config = model.config
    weights = split_weights(model)
    for layer in weights.layers:  # an array a layer, of integers where there are some
        for which, value in config.weights.quantized.items():
            if which != "head":
                assert getattr(layer, which).dtype == ("int8" if value.bits == 8 else "int32")
                assert getattr(layer, which).ndim == 2
    reference = jax.jit(functools.partial(reference_step, model))
    step = jax.jit(functools.partial(baseline_step, config))
    cache, tokens = filled_cache(config, [5, 0], 12), step_tokens(config, 2)
    own = split_cache(config, cache, 2)
    for _ in range(2):
        want, out = reference(cache, tokens), step(weights, own, tokens)
        assert_close(out.logits, want.logits, "cached_vs_whole_bfloat16")
        assert out.token.tolist() == np.argmax(out.logits, axis=-1).tolist()
        cache, own, tokens = want.cache, out.cache, want.token


# tune


def test_tuning_makes_quantized_weights_and_says_so(capsys, monkeypatch):
    """With stand-ins: a device, and what is tried on it."""
    tuned = []

    def tune(model, dims, gpu, *_: Any, say: Any) -> list[Trial]:
        tuned.append((model, dims.weight_bits.quantized))
        timing = Timing(1, (1e-3,) * 7, 0.0)
        plan = make_stream_plan(
            dataclasses.replace(dims, weight_bits=type(dims.weight_bits)()), gpu
        )
        return [Trial(Tuning(), plan, timing, 0.0, True, None)]

    monkeypatch.setattr("ffjax.decode.why_not_fused_config", lambda *_: None)
    monkeypatch.setattr(Gpu, "of", lambda device: H200)
    monkeypatch.setattr("ffjax.benchmark.inputs.random_model", lambda config: config.weights)
    monkeypatch.setattr(tune_module, "tune", tune)
    options = ["--weights", "int4", "--head", "int8", "--position", "9", "--steps", "1"]
    code, out, _ = run(capsys, "tune", *options, "--json")
    assert code == 0
    assert json.loads(out)["row"]["quantized"] == NAMES
    assert run(capsys, "tune", *options[4:], "--json")[0] == 0
    assert tuned == [(INT4_AND_INT8, True), (FLOATING, False)]


# fidelity


def test_the_gate_is_asked_of_quantized_random_weights(capsys, made):
    sizes = ["--prompts", "2", "--tokens", "2", "--implementation", "xla"]
    what = ["--weights", "int4", "--head", "int8"]
    code, out, _ = run(capsys, "fidelity", *what, *sizes, "--json")
    assert code == 0
    report = json.loads(out)
    assert (report["weights"], report["quantized"]) == ("random", NAMES)
    config = quantized_config(CONFIG, INT4_AND_INT8)
    assert made == [config]
    model = fidelity.random_model(config, 0)
    expected = fidelity.measure(model, fidelity.random_prompts(config, 2, 2), reference_step)
    assert report["reference_nll"] == pytest.approx(expected.reference_nll, rel=1e-6)
    code, out, _ = run(capsys, "fidelity", *what, *sizes)
    assert out.startswith(f"{CONFIG.name}, random weights ({NAMES}): 2 prompts of 2 tokens")


@pytest.mark.parametrize("option", [["--weights", "int8"], ["--head", "int8"]])
def test_a_checkpoint_is_judged_in_its_own_format(option, capsys):
    assert cli.main(["fidelity", *option]) == 2
    err = capsys.readouterr().err
    assert "a checkpoint is in the format that it was saved in. Give --config, or" in err
