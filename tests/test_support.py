"""Every reason why a step cannot run fused is a sentence that names what came."""

import dataclasses
import functools
import types

import jax.numpy as jnp
import pytest
from decode_cases import dims_of, small_config
from flax import nnx

from ffjax import decode
from ffjax.cache import KVCache
from ffjax.config import PRESETS, preset
from ffjax.model import Transformer
from pallas_kernels import backends, support
from pallas_kernels.gpu import INTERPRETER, Gpu
from pallas_kernels.stream.plan import StreamPlan
from pallas_kernels.stream.tuning import Tuning
from pallas_kernels.support import MAX_BATCH, why_not
from pallas_kernels.targets import target, target_names

pytestmark = pytest.mark.filterwarnings("error")

_GOOD = dims_of(preset("llama3.2-1b"), batch=1, capacity=16_384)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("batch", range(1, MAX_BATCH + 1))
def test_every_preset_runs_fused_on_every_target_that_has_room(name, batch):
    dims = dims_of(preset(name), batch, 16_384)
    for gpu in (INTERPRETER, *(target(t).gpu for t in target_names())):
        reason = why_not(dims, jnp.bfloat16, gpu)
        if gpu.shared_memory > 100 * 1024:
            assert reason is None
        elif reason is not None:  # no tuning helps, and none is advised
            assert "No tuning has smaller ones: use implementation='xla'." in reason


L4, A100 = target("l4").gpu, target("a100").gpu


def test_the_tuning_is_seen(monkeypatch):
    """Whatever the default is, what is asked for is what has room, or has none."""
    sizes = dims_of(preset("llama3.1-8b"), 1, 16_384), jnp.bfloat16, L4
    assert why_not(*sizes) is None
    large, small = Tuning(), Tuning(tile_bytes=8192, cache_tile_bytes=8192)
    reason = why_not(*sizes, tuning=large)
    assert reason is not None and "Take a tuning with smaller tiles, or impl" in reason
    assert why_not(*sizes, tuning=small) is None
    monkeypatch.setattr(support, "tuned", lambda *_: large)
    assert why_not(*sizes) == reason
    assert why_not(*sizes, tuning=small) is None


def test_a_step_is_refused_for_its_own_tuning_alone(monkeypatch):
    config = small_config(num_layers=1, model_dim=3072, ffw_dim=8192)
    asked: list[StreamPlan] = []

    def launched(plan, *args, **_):
        asked.append(plan)
        raise InterruptedError

    monkeypatch.setattr(decode.Gpu, "of", lambda _: L4)
    monkeypatch.setattr(decode, "stream_step", launched)
    monkeypatch.setattr(support, "tuned", lambda *_: Tuning())  # which has no room

    def step(**how):
        """Traced alone: nothing of that size is allocated."""
        model = Transformer(config, rngs=nnx.Rngs(0))
        cache = KVCache.create(config, 1, 64)
        return decode.fused_step(model, cache, jnp.zeros(1, jnp.int32), **how).logits

    for how in ({}, {"tuning": Tuning(tile_bytes=65_536)}):
        with pytest.raises(NotImplementedError, match="Take a tuning with smaller tiles"):
            nnx.eval_shape(functools.partial(step, **how))
    assert not asked
    with pytest.raises(InterruptedError):
        small = Tuning(tile_bytes=8192, cache_tile_bytes=8192)
        nnx.eval_shape(functools.partial(step, tuning=small))
    assert asked[0].tuning.tile_bytes == 8192


def test_the_backend_is_seen(monkeypatch):
    asked = _GOOD, jnp.bfloat16, A100
    assert why_not(*asked) is None
    reason = why_not(*asked, backend="mosaic_gpu")
    assert reason is not None and "got NVIDIA A100" in reason and "Take Triton" in reason
    assert why_not(*asked, tuning=Tuning(backend="mosaic_gpu", tile_bytes=8192)) == reason
    monkeypatch.setattr(backends, "_is_there", lambda backend: backend != "triton")
    reason = why_not(*asked)
    assert reason is not None and "Use implementation='xla', or a JAX with Triton" in reason
    assert why_not(_GOOD, jnp.bfloat16, target("h200").gpu) is None
    assert why_not(_GOOD, jnp.bfloat16, INTERPRETER, backend="triton") is None


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
    reason = why_not(_GOOD, "bfloat16", None, found="a toaster (cpu)")
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
