"""JAX's settings: those that look for slips change nothing, those it refuses are a sentence."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from decode_cases import random_model, small_config
from flax import nnx

import ffjax
from ffjax.evaluate import evaluate

pytestmark = pytest.mark.once(
    "JAX's settings are many; a sample of them is set.",
    sample=[
        "test_strict_settings_hold_for_the_program_around",
        "test_a_setting_that_jax_refuses_is_a_sentence",
        "test_a_generation_is_compiled_also_where_jit_is_off",
    ],
)

STRICT = {
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_transfer_guard": "disallow",
}


@pytest.fixture(scope="module")
def model():
    return random_model(small_config(vocab_size=257))


@pytest.fixture
def strict():
    # The contexts leave no trace in other tests, as jax.config.update would.
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.transfer_guard("disallow"),
    ):
        yield


def _all(model, folder):
    """What people call, and what it gives."""
    prompts = [[1, 2, 3], [4]]
    int8 = ffjax.quantize(model, "int8", head="int8")
    ffjax.save(int8, folder, overwrite=True)
    cache = ffjax.KVCache.create(model.config, 2, 16)
    out = ffjax.decode_step(model, cache, cache.lengths, implementation="xla")
    logits, _ = model(out.token[:, None], out.cache)
    return {
        "greedy": ffjax.generate(model, prompts, 4).tokens,
        "drawn": ffjax.generate(model, prompts, 4, temperature=1.0, seed=[1, 2]).tokens,
        "streamed": list(ffjax.stream(model, prompts, 4, temperature=0.5)),
        "int8": ffjax.generate(ffjax.load(folder), prompts, 4).tokens,
        "whole": ffjax.generate(ffjax.dequantize(int8), prompts, 4).tokens,
        "logits": jax.device_get(logits).tolist(),
        "bits": evaluate(model, [b"hello"]).bits,
    }


def test_strict_settings_change_nothing(model, strict, tmp_path):
    found = _all(model, tmp_path / "int8")
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.transfer_guard("allow"),
    ):
        assert found == _all(model, tmp_path / "int8")


def test_strict_settings_hold_for_the_program_around(model, strict):
    ffjax.generate(model, [1, 2], 2)
    one, two = jax.device_put(np.ones((2, 2), np.float32)), jax.device_put(np.ones(2, np.float32))
    with pytest.raises(ValueError, match="rank_promotion"):
        _ = jax.numpy.add(one, two)


def _run(variables, *arguments, **streams):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    return subprocess.run(
        [sys.executable, "-m", "ffjax", *arguments],
        env={**kept, "JAX_PLATFORMS": "cpu", **variables},
        text=True,
        timeout=300,
        **{"capture_output": True, **streams},
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_ENABLE_X64", "maybe"),
        ("JAX_DEFAULT_MATMUL_PRECISION", "foo"),
        ("JAX_NUMPY_DTYPE_PROMOTION", "foo"),
        ("JAX_NUM_CPU_DEVICES", "abc"),
    ],
)
def test_a_setting_that_jax_refuses_is_a_sentence(name, value):
    done = _run({name: value}, "generate", "--prompt", "x")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("ffjax: JAX cannot be imported: ")
    assert done.stderr.count("\n") == 1


def test_the_command_line_runs_under_strict_settings():
    arguments = "generate", "--prompt", "def f(", "--max-new-tokens", "4", "--json"
    done = _run({name.upper(): value for name, value in STRICT.items()}, *arguments)
    assert done.returncode == 0, done.stderr
    plain = _run({}, *arguments)
    assert json.loads(done.stdout)["tokens"] == json.loads(plain.stdout)["tokens"]


# Streams that are closed or full


def _shell(command: str) -> subprocess.CompletedProcess:
    line = f"{sys.executable} -m ffjax {command}"
    return subprocess.run(
        ["sh", "-c", line],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell's redirections")
@pytest.mark.parametrize(
    ("command", "code", "out", "err"),
    [
        ("inspect . >&-", 2, "", "ffjax inspect: Standard output is closed"),
        ("inspect nowhere 2>&-", 2, "", ""),
        ("inspect nowhere 2>/dev/full", 2, "", ""),
        (
            "generate --prompt x --max-new-tokens 2 >/dev/full",
            2,
            "",
            "ffjax generate: Reading or writing failed: no space left on device.",
        ),
        ("generate --json --prompt x --max-new-tokens 2 | true", 0, "", ""),
    ],
)
def test_closed_and_full_streams(command, code, out, err):
    done = _shell(command)
    assert (done.returncode, done.stdout) == (code, out)
    assert err in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_generation_is_compiled_also_where_jit_is_off(model):
    plain = ffjax.generate(model, [1, 2, 3], 4).tokens
    with jax.disable_jit():
        assert ffjax.generate(model, [1, 2, 3], 4).tokens == plain


def test_numbers_that_are_not_finite_are_ffjaxs_affair_also_where_jax_looks():
    broken = nnx.clone(random_model(small_config(vocab_size=257)))
    broken.final_norm[...] = jax.numpy.full_like(broken.final_norm[...], jax.numpy.nan)
    with jax.debug_nans(True), pytest.raises(ffjax.NotFiniteError):
        ffjax.generate(broken, [1, 2, 3], 4)
