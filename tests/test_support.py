"""Every reason why a step cannot run fused is a sentence that names what came."""

import dataclasses
import types

import jax.numpy as jnp
import pytest
from decode_cases import dims_of

from ffjax.config import PRESETS, preset
from pallas_kernels.gpu import INTERPRETER, Gpu
from pallas_kernels.support import MAX_BATCH, why_not
from pallas_kernels.targets import target, target_names

pytestmark = pytest.mark.filterwarnings("error")

_GOOD = dims_of(preset("llama3.2-1b"), batch=1, capacity=16_384)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("batch", range(1, MAX_BATCH + 1))
def test_every_preset_runs_fused_on_every_target(name, batch):
    dims = dims_of(preset(name), batch, 16_384)
    for gpu in (INTERPRETER, *(target(t).gpu for t in target_names())):
        assert why_not(dims, jnp.bfloat16, gpu) is None


@pytest.mark.parametrize(
    ("change", "dtype", "rule", "came"),
    [
        ({"batch": 9}, "bfloat16", "1 to 8 sequences", "there are 9"),
        ({}, "float32", "reads bfloat16 weights", "these are float32"),
        ({}, "float16", "reads bfloat16 weights", "these are float16"),
        ({"head_dim": 48}, "bfloat16", "heads have 32, 64, 128, 256", "these have 48"),
        ({"num_heads": 17, "num_kv_heads": 1}, "bfloat16", "at most 16 query", "here 17 share"),
        ({"model_dim": 2056}, "bfloat16", "model_dim must be a multiple of 16", "it is 2056"),
        ({"ffw_dim": 8200}, "bfloat16", "ffw_dim must be a multiple of 16", "it is 8200"),
        ({"model_dim": 16_400}, "bfloat16", "model_dim of at most 16384", "it is 16400"),
        ({"vocab_size": 7}, "bfloat16", "8 logits at a time", "vocabulary has 7"),
    ],
)
def test_a_refusal_says_the_rule_what_came_and_what_to_do(change, dtype, rule, came):
    reason = why_not(dataclasses.replace(_GOOD, **change), dtype, INTERPRETER)
    assert reason is not None
    assert rule in reason
    assert came in reason
    assert "implementation='xla'" in reason


def test_a_device_that_is_no_known_gpu_is_named():
    reason = why_not(_GOOD, "bfloat16", None, "a toaster (cpu)")
    assert reason is not None
    assert "compute capability 8.0 or newer" in reason
    assert "this is a toaster (cpu)" in reason


def _device(platform: str, capability: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        platform=platform,
        device_kind="NVIDIA H200",
        compute_capability=capability,
        core_count=132,
    )


def test_a_gpu_is_read_off_its_device():
    gpu = Gpu.of(_device("gpu", "9.0"))
    assert gpu == Gpu("NVIDIA H200", "9.0", 132, 232_448)


@pytest.mark.parametrize(("platform", "capability"), [("cpu", "9.0"), ("gpu", "7.5"), ("gpu", "")])
def test_other_devices_are_not_taken_for_one(platform, capability):
    assert Gpu.of(_device(platform, capability)) is None
