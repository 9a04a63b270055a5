"""`ffjax doctor` prints what a bug report needs, and names what is wrong."""

import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import random_model, small_config
from flax import nnx
from quantize_cases import FOR_KERNELS, kernel_config
from stream_cases import FAMILIES

import checkpoints
from ffjax import environment
from ffjax.benchmark.bandwidth import Bandwidth
from ffjax.cli import main
from ffjax.doctor import selftest
from ffjax.doctor.activations import observe
from ffjax.doctor.diagnosis import _spread_ids
from ffjax.doctor.weights import bad_weights
from ffjax.model import LAST_TENSORS, LAYER_TENSORS, Transformer
from ffjax.quantization import quantize

pytestmark = [
    pytest.mark.once(
        "A sample shows what a JAX makes of the programs; the rest is what they are given.",
        sample=[
            "test_a_sound_model_has_a_report_and_exit_code_0",
            "test_a_weight_that_is_not_finite_is_named_and_what_it_does_first",
            "test_where_jax_starts_no_device_the_rest_is_said",
            "test_the_setting_that_leaves_jax_without_a_device_is_named",
            "test_what_jax_advises_is_not_repeated",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

CONFIG = small_config(vocab_size=257, num_layers=3)


def copy_of(model: Transformer) -> Transformer:
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(jnp.copy, state))


def damaged(name: str, index: tuple[Any, ...], value: float, config=CONFIG) -> Transformer:
    """A random model with one weight changed."""
    model = copy_of(random_model(config))
    where = model.layers if name.startswith("layers.") else model
    param = getattr(where, name.removeprefix("layers."))
    param[...] = param[...].at[index].set(value)
    return model


@pytest.fixture(scope="module")
def nan_in_down(tmp_path_factory) -> str:
    """The shipped model, one weight of it not a number."""
    model = checkpoints.load(checkpoints.SHIPPED_MODEL)
    down = model.layers.down
    down[...] = down[...].at[0, 0, 0].set(jnp.nan)
    path = tmp_path_factory.mktemp("damaged") / "model"
    checkpoints.save(model, path)
    return str(path)


def doctor(capsys, *more: str) -> tuple[int, dict]:
    code = main(["doctor", "--no-self-test", "--json", *more])
    out, err = capsys.readouterr()
    assert err == ""
    return code, json.loads(out)


def test_a_sound_model_has_a_report_and_exit_code_0(capsys):
    code, report = doctor(capsys)
    assert (code, report["sound"], report["wrong"]) == (0, True, [])
    assert {"python", "ffjax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy"} <= set(
        report["versions"]
    )
    assert report["devices"][0]["platform"] == jax.devices()[0].platform
    assert report["model"]["name"] == "python-bytes-3m"
    assert [choice["batch"] for choice in report["choices"]] == [1, 8]
    assert set(report["choices"][0]["why_not"]) == {"pallas", "pallas_mosaic_gpu"}
    assert report["weights"] == []
    assert report["activations"]["first_bad"] is None
    tensors = [one["tensor"] for one in report["activations"]["largest"]]
    assert tensors == [*LAYER_TENSORS, *LAST_TENSORS]
    assert report["trials"] is None


def test_what_is_not_finite_is_found_where_jax_would_stop_at_it(capsys, nan_in_down):
    with jax.debug_nans(True), jax.debug_infs(True):
        code, report = doctor(capsys, nan_in_down)
    assert (code, len(report["weights"]), len(report["wrong"])) == (1, 1, 2)


def test_logits_that_are_all_zero_are_wrong(capsys, tmp_path):
    """A residual whose squares overflow, all of it finite: its norm is 0."""
    model = checkpoints.load(checkpoints.SHIPPED_MODEL)
    down = model.layers.down
    down[...] = down[...].at[-1].multiply(1e30)
    checkpoints.save(model, tmp_path / "model")
    code, report = doctor(capsys, str(tmp_path / "model"))
    assert (code, report["weights"], report["activations"]["first_bad"]) == (1, [], None)
    [wrong] = report["wrong"]
    assert re.search(r"All logits are 0.*the residual, which reaches \d\.\d+e\+3\d;", wrong)


def test_a_weight_that_is_not_finite_is_named_and_what_it_does_first(capsys, nan_in_down):
    code, report = doctor(capsys, nan_in_down)
    assert code == 1
    [bad] = report["weights"]
    assert (bad["name"], bad["layer"], bad["count"]) == ("layers.down", 0, 1)
    assert (bad["first"], bad["value"]) == ([0, 0], "nan")
    first = report["activations"]["first_bad"]
    assert (first["tensor"], first["layer"], first["channel"]) == ("ffw_out", 0, [0])
    of_weights, of_activations = report["wrong"]
    assert "layers.down, layer 0 has 1 of 196608, the first at [0, 0]: nan" in of_weights
    assert "Take an undamaged checkpoint" in of_weights
    assert "the first tensor is ffw_out, layer 0" in of_activations


def test_the_text_says_the_same(capsys, nan_in_down):
    assert main(["doctor", nan_in_down, "--no-self-test", "--text", "import os"]) == 1
    out, err = capsys.readouterr()
    assert "layers.down, layer 0: 1 of 196608 are not finite, the first at [0, 0]: nan" in out
    assert "first not finite: ffw_out of layer 0, 9 of 2304, at position 0, channel 0;" in out
    assert "  9 tokens by the reference" in out
    assert re.search(r"^  logits +none is finite$", out, re.MULTILINE)
    assert "Weights are not finite in 1 tensor:" in out.partition("Result")[2]
    assert "reads the weights" in err


def test_the_default_text_is_read_as_text(capsys):
    assert main(["doctor", "--no-self-test"]) == 0
    assert " tokens by the reference: the text\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "index", "value", "where"),
    [
        ("layers.qkv", (2, 5, 7), np.inf, (2, (5, 7))),
        ("layers.mlp_norm", (1, 3), np.nan, (1, (3,))),
        ("embed", (256, 143), -np.inf, (None, (256, 143))),
        ("final_norm", (9,), np.nan, (None, (9,))),
    ],
)
def test_every_tensor_is_looked_at(name, index, value, where):
    assert bad_weights(random_model(CONFIG)) == []
    [found] = bad_weights(damaged(name, index, value))
    assert (found.name, (found.layer, found.first)) == (name, where)
    assert (found.count, found.value) == (1, str(value))


def test_each_layer_of_a_tensor_is_counted():
    model = damaged("layers.down", (slice(1, 3), 4), np.nan)
    found = [(bad.layer, bad.count, bad.first) for bad in bad_weights(model)]
    assert found == [(1, CONFIG.ffw_dim, (4, 0)), (2, CONFIG.ffw_dim, (4, 0))]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_scales_of_integers_are_weights_too(name):
    config = kernel_config(FOR_KERNELS[name])
    assert bad_weights(random_model(config)) == []
    rest = (2,) if name == "int8" else (2, 1)
    model = damaged("layers.gate_up_scale", (1, *rest), np.nan, config)
    [found] = bad_weights(model)
    assert (found.name, found.layer, found.first) == ("layers.gate_up_scale", 1, rest)
    bad = observe(model, [1, 2]).first_bad
    assert bad is not None
    assert (bad.tensor, bad.layer) == ("hidden", 1)


@pytest.mark.parametrize(
    ("name", "index", "tensor", "layer"),
    [
        ("embed", (3,), "residual_in", 0),
        ("layers.attn_norm", (1, 0), "q", 1),
        ("layers.attn_out", (2, 0, 0), "attention_out", 2),
        ("layers.gate_up", (0, 5, 0), "hidden", 0),
        ("final_norm", (0,), "final_norm", None),
    ],
)
def test_the_first_bad_tensor_is_the_one_behind_the_bad_weight(name, index, tensor, layer):
    seen = observe(damaged(name, index, np.nan), [1, 3])
    assert seen.first_bad is not None
    assert (seen.first_bad.tensor, seen.first_bad.layer) == (tensor, layer)
    # A row of the embedding is one token's.
    assert seen.first_bad.position == (1 if name == "embed" else 0)


def test_rows_and_elements_of_keys_are_told_apart():
    # Of values, the second head's 6th element: after queries and keys.
    row = (CONFIG.num_heads + CONFIG.num_kv_heads) * CONFIG.head_dim + 5
    bad = observe(damaged("layers.qkv", (1, row, 0), np.nan), [1]).first_bad
    assert bad is not None
    assert (bad.tensor, bad.layer, bad.channel) == ("v", 1, (0, 5))


def test_a_massive_activation_is_found():
    model = damaged("layers.down", (1, 17), 3e4)
    seen = {one.tensor: one for one in observe(model, [1, 2, 3]).largest}
    out = seen["residual_out"]
    # The last layer's still has what the second one added.
    assert out.channel == (17,)
    assert (seen["ffw_out"].layer, seen["ffw_out"].channel) == (1, (17,))
    assert out.magnitude > 1e4
    # One channel of 144 is the whole norm: the rms is a twelfth of it at one position.
    assert out.magnitude / np.sqrt(3 * CONFIG.model_dim) < out.rms < out.magnitude / 8


def test_numbers_near_the_end_of_float32_are_finite():
    model = damaged("embed", (3, 0), 3e38)
    first = observe(model, [3]).largest[0]
    assert first.tensor == "residual_in"
    assert first.magnitude == pytest.approx(3e38, rel=1e-2)
    assert np.isfinite(first.rms)


@pytest.mark.drawn(
    "What the others have, one of these has as well.",
    sample=[
        "test_every_family_is_observed_as_it_computes[granite]",
        "test_every_family_is_observed_as_it_computes[gemma3]",
        "test_every_family_is_observed_as_it_computes[phi3]",
        "test_every_family_is_observed_as_it_computes[olmo3]",
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_observed_as_it_computes(name):
    """The logits that are seen are those of the model itself."""
    config = small_config(**FAMILIES[name])
    model, tokens = random_model(config), jnp.array([[1, 2, 3]])
    seen = nnx.jit(lambda model: model.observe(tokens, lambda x: x))(model)
    assert list(seen) == sorted([*LAYER_TENSORS, *LAST_TENSORS])
    want = nnx.jit(lambda model: model(tokens))(model)
    np.testing.assert_allclose(seen["logits"], want, rtol=1e-4, atol=1e-4)
    layers, width = config.num_layers, config.model_dim
    assert seen["residual_out"].shape == (layers, 1, 3, width)
    assert seen["q"].shape == (layers, 1, 3, config.num_heads, config.head_dim)
    assert seen["hidden"].shape == (layers, 1, 3, config.ffw_dim)
    np.testing.assert_array_equal(seen["residual_in"][1:], seen["residual_out"][:-1])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "one token at least"), ([257], "0 to 256; the text has 257 to 257")],
)
def test_what_cannot_be_read_is_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        observe(random_model(CONFIG), tokens)


def test_sizes_of_a_preset_are_enough(capsys, monkeypatch):
    monkeypatch.setattr(Transformer, "__init__", lambda *_, **__: pytest.fail("made a model"))
    code, report = doctor(capsys, "--config", "llama3.1-8b", "--weights", "int4")
    assert code == 0
    assert report["weights"] is report["activations"] is None
    assert "runs on NVIDIA GPUs" in report["choices"][0]["why_not"]["pallas"]


def test_folders_and_secrets_are_not_shown():
    shown = environment.settings(
        {
            "XLA_FLAGS": "--xla_dump_to=/home/me/x --xla_gpu_autotune_level=0",
            "JAX_COMPILATION_CACHE_DIR": "~/cache",
            "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
            "CUDA_VISIBLE_DEVICES": "0,1",
            "HOME": "/home/me",
            "MY_XLA_KEY": "x",
        }
    )
    assert shown == {
        "XLA_FLAGS": "--xla_dump_to=(a folder) --xla_gpu_autotune_level=0",
        "JAX_COMPILATION_CACHE_DIR": "(a folder)",
        "JAX_COORDINATOR_ADDRESS": "(set)",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:11:13 UTC 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build",
    ],
)
def test_the_driver_says_its_version(monkeypatch, tmp_path, line):
    (tmp_path / "version").write_text(f"{line}\nGCC version:  gcc version 12.2.0\n")
    monkeypatch.setattr(environment, "_DRIVER", tmp_path / "version")
    assert environment.driver_version() == "580.65.06"
    monkeypatch.setattr(environment, "_DRIVER", tmp_path / "none")
    assert environment.driver_version() is None


def test_a_gpu_that_jax_does_not_use_is_wrong(capsys, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(environment, "driver_version", lambda: "580.1")
    here = [{**environment.devices()[0], "platform": "cpu"}]
    monkeypatch.setattr(environment, "devices", lambda: here)
    code, report = doctor(capsys, "--config", "llama3.2-1b")
    assert code == 1
    assert "580.1, but JAX runs on the CPU. Install the plugin" in report["wrong"][0]


def test_where_jax_starts_no_device_the_rest_is_said(capsys, monkeypatch):
    def fails():
        raise RuntimeError("Unable to initialize\nbackend 'cuda'")

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(environment, "devices", fails)
    code, report = doctor(capsys)
    assert code == 1
    assert report["versions"]["jax"] == jax.__version__
    assert report["devices"] == []
    assert (
        "Unable to initialize backend 'cuda'. JAX_PLATFORMS is 'cuda': unset it"
        in (report["wrong"][0])
    )
    assert main(["doctor"]) == 1
    assert "JAX starts no device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "finds none of the platform that it is to use. Look at the driver, or set JAX_PLAT"),
        ({"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS is 'cuda': unset it, or set JAX_PLATFORMS=cpu."),
        ({"JAX_PLATFORM_NAME": "gpu"}, "to use. JAX_PLATFORM_NAME is 'gpu': unset it."),
        (
            {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_DEVICE": "gpu"},
            "JAX_PLATFORMS is 'cpu' and JAX_DEFAULT_DEVICE is 'gpu': unset them.",
        ),
    ],
)
def test_the_setting_that_leaves_jax_without_a_device_is_named(monkeypatch, variables, message):
    for name in environment._PLATFORM:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert message in environment.no_device(AssertionError())


def test_what_jax_advises_is_not_repeated(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "rocm")
    said = "Unable to initialize backend 'rocm': it is unknown. (set JAX_PLATFORMS='' to choose)"
    assert environment.no_device(RuntimeError(said)) == (
        "JAX starts no device: Unable to initialize backend 'rocm': it is unknown. "
        "JAX_PLATFORMS is 'rocm': unset it, or set JAX_PLATFORMS=cpu."
    )


def test_a_default_device_that_is_not_there_is_none(monkeypatch):
    assert environment.why_no_device(RuntimeError("ours")) is None
    with jax.default_device("tpu"):
        why = str(environment.why_no_device(RuntimeError("ours")))
    # What JAX itself says depends on its version, and on whether JAX_PLATFORMS is set.
    assert re.match(r"JAX starts no device: .*\btpu\b", why)


def test_a_model_without_its_tokenizer_is_looked_at_all_the_same(capsys, tmp_path):
    # 101 tokens are no bytes.
    checkpoints.save(random_model(small_config()), tmp_path / "odd")
    code, report = doctor(capsys, str(tmp_path / "odd"))
    assert code == 0
    assert report["weights"] == []
    assert report["activations"]["tokens"] == 64
    assert report["activations"]["first_bad"] is None
    assert report["read"] == "token ids spread evenly over the vocabulary"
    assert "its tokens are bytes" in report["unread"]
    assert main(["doctor", "--no-self-test", str(tmp_path / "odd")]) == 0
    out = capsys.readouterr().out
    assert "  64 tokens by the reference: token ids spread evenly over the vocabulary\n" in out
    assert "  No text was read: Where no tokenizer.json lies with a model" in out
    assert out.endswith(
        "\nResult\n  What was looked at is well; no text was read, see above for why.\n"
    )


def test_activations_of_a_model_without_its_tokenizer_are_looked_at(capsys, tmp_path):
    """All weights are finite; gate times up is not."""
    config = small_config(num_layers=3)
    checkpoints.save(damaged("layers.gate_up", (1,), 1e30, config), tmp_path / "odd")
    code, report = doctor(capsys, str(tmp_path / "odd"))
    assert (code, report["weights"]) == (1, [])
    first = report["activations"]["first_bad"]
    assert (first["tensor"], first["layer"]) == ("hidden", 1)
    [wrong] = report["wrong"]
    assert "the first tensor is hidden, layer 1" in wrong
    assert "overflows on token ids spread evenly over the vocabulary: report it." in wrong


@pytest.mark.parametrize(("vocabulary", "positions"), [(7, 100), (1000, 5), (128_256, 4096)])
def test_token_ids_are_spread_over_the_vocabulary(vocabulary, positions):
    ids = _spread_ids(small_config(vocab_size=vocabulary, max_context=positions))
    assert len(ids) == min(64, vocabulary, positions)
    assert 0 == ids[0] < ids[-1] < vocabulary
    steps = np.diff([*ids, vocabulary])
    assert steps.max() - steps.min() <= 1


def test_the_self_test_is_in_the_report(capsys, monkeypatch):
    monkeypatch.setattr(selftest, "bandwidth", lambda: Bandwidth(1000, (1e-9, 2e-9, 4e-9)))
    monkeypatch.setattr(selftest, "choose_kernel", lambda *_: (None, "not here"))
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    [trial] = report["trials"]
    assert trial["finite"]
    assert trial["repeats"]
    assert 0 < trial["relative_error"] < selftest.MOST_ERROR
    assert report["bandwidth"]["bytes_per_second"] == pytest.approx(5e11)
    assert "interpreted" in report["tried"]


GOOD = selftest.Trial("it", "pallas", False, 8, 4, 0, True, True, 0.02, 32, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"finite": False, "relative_error": np.nan}, "batch of 8 on it are not finite"),
        ({"repeats": False}, "gave other bits"),
        ({"relative_error": 0.64}, "lie 0.64 of their norm from the reference's"),
        ({"relative_error": np.nan}, "lie nan of their norm"),
    ],
)
def test_a_trial_says_what_is_wrong(change, message):
    said = dataclasses.replace(GOOD, **change).what_is_wrong
    assert said is None if message is None else message in said


def test_a_wrong_kernel_is_wrong_and_json_has_no_nan(capsys, monkeypatch):
    bad = dataclasses.replace(GOOD, finite=False, relative_error=np.nan)
    monkeypatch.setattr(selftest, "interpreted_trial", lambda: bad)
    monkeypatch.setattr(selftest, "trials", lambda model: [bad])
    monkeypatch.setattr(selftest, "bandwidth", lambda: Bandwidth(1000, (1e-9,)))
    assert main(["doctor", "--json", "--config", "python-bytes-3m"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["trials"][0]["relative_error"] is None
    assert "are not finite" in report["wrong"][0]
    assert main(["doctor", "--config", "python-bytes-3m"]) == 1
    assert "nan of their norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["there", "--config", "llama3.2-1b"], "--config and MODEL were both given"),
        (["--weights", "int8"], "Give --config, or leave them out"),
        (["--text", ""], "--text has at least one character"),
        (["no-such-model"], "no-such-model"),
        (["--config", "gpt-5"], "No preset is called 'gpt-5'"),
    ],
)
def test_bad_input_is_refused(capsys, arguments, message):
    assert main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_quantized_checkpoint_is_looked_at(capsys, tmp_path):
    model = random_model(dataclasses.replace(CONFIG, model_dim=128, ffw_dim=256))
    checkpoints.save(quantize(model, "int4"), tmp_path / "int4")
    code, report = doctor(capsys, str(tmp_path / "int4"))
    assert code == 0
    assert report["model"]["quantized"].startswith("int4 in groups of 128")
