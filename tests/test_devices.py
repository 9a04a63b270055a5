"""A step is planned for the device that its weights are on."""

import subprocess
import sys
import types

import pytest

from ffjax.reproducible import SAME_IN_EVERY_PROCESS, compiler_options

pytestmark = pytest.mark.filterwarnings("error")

# A process with two devices: how many there are is settled when JAX starts.
_PROGRAM = """
import functools
import jax, jax.numpy as jnp
from flax import nnx
from ffjax import decode
from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.decode import decode_step, default_device, device_of, fused_step, why_not_fused
from ffjax.generation import generate
from ffjax.model import Transformer
from ffjax.streaming import stream

first, second = jax.devices()
config = ModelConfig(name="tiny", vocab_size=53, num_layers=1, model_dim=32, ffw_dim=48,
                     num_heads=2, num_kv_heads=1, head_dim=16, max_context=400)
here = Transformer(config, rngs=nnx.Rngs(0))
graph, params = nnx.split(here)
there = nnx.merge(graph, jax.device_put(params, second))
asked = []
decode.Gpu.of = lambda device: asked.append(device)  # no kernel can run on either

def planned_for(function, *args):
    asked.clear()
    try:
        function(*args)
    except NotImplementedError:
        pass
    assert asked and len(set(asked)) == 1, asked
    return asked[0]

token = jnp.zeros(1, jnp.int32)
cache = {model: KVCache.create(config, 1, 8) for model in ("here", "there")}
cache["there"] = jax.device_put(cache["there"], second)
for name, model, device in (("here", here, first), ("there", there, second)):
    assert device_of(model) == device
    some = model, cache[name], jax.device_put(token, device)
    assert planned_for(decode_step, *some) == device
    assert planned_for(fused_step, *some) == device
    assert planned_for(why_not_fused, model, 1, 8) == device
    assert planned_for(generate, model, [1, 2], 3) == device
    assert planned_for(lambda model: list(stream(model, [1, 2], 3)), model) == device
    # Within jit nobody knows: the default device, or the one that is named.
    jitted = jax.jit(lambda p, *rest: decode_step(nnx.merge(graph, p), *rest))
    traced = nnx.state(model), *some[1:]
    assert planned_for(jitted.lower, *traced) == first
    with jax.default_device(second):
        assert planned_for(jitted.lower, *traced) == second
tokens = [generate(model, [1, 2], 12).tokens for model in (here, there)]
assert tokens[0] == tokens[1]
jax.config.update("jax_default_device", "cpu")  # the name of a platform
assert default_device() == first
print("planned")
"""


@pytest.mark.once("It starts processes, and a plan is arithmetic.")
def test_a_plan_is_made_for_the_device_of_the_weights(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2", prepend=" ")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "planned\n"


def test_only_a_gpus_programs_are_compiled_with_a_gpus_options():
    assert compiler_options(types.SimpleNamespace(platform="gpu")) == SAME_IN_EVERY_PROCESS
    assert compiler_options(types.SimpleNamespace(platform="cpu")) is None
    assert compiler_options(types.SimpleNamespace(platform="tpu")) is None
