"""A JAX that has lost Pallas's Triton backend: what is left of the kernels, and who does the rest.

Each test is a process in which importing that backend fails, as where it is gone.
"""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent

_GONE = """
import sys

backend = "jax._src.pallas.triton"
for name in (backend, f"{backend}.core", f"{backend}.lowering", "jax.experimental.pallas.triton"):
    sys.modules[name] = None
"""
_IMPORTS = """
import importlib
from import_graph import modules

for name in modules():
    if not name.startswith("pallas_kernels.triton.") and not name.endswith("__main__"):
        importlib.import_module(name)
"""
_CHOICES = """
import jax.numpy as jnp
from decode_cases import dims_of, small_config
from pallas_kernels.backends import default_backend, why_not_backend
from pallas_kernels.support import why_not
from pallas_kernels.targets import target

assert default_backend() == "mosaic_gpu"
assert "is not part of this version of JAX. Take the other one" in why_not_backend("triton")
sizes = dims_of(small_config(), 1, 64), jnp.bfloat16
assert why_not(*sizes, target("h200").gpu) is None
reason = why_not(*sizes, target("a100").gpu)
assert "9.0 and newer, got NVIDIA A100" in reason and "Use implementation='xla'" in reason, reason
assert "Triton backend" in why_not(*sizes, target("h200").gpu, backend="triton")
"""
_LOWERS = """
import functools
import jax
import jax.numpy as jnp
from decode_cases import dims_of, filled_cache, kernel_inputs, random_model, small_config
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from pallas_kernels.stream.launch import stream_step
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.targets import target

config, gpu = small_config(num_layers=1), target("h200").gpu
arrays = *kernel_inputs(random_model(config), filled_cache(config, [5], 64)), jnp.zeros(1, int)
device = AbstractDevice(gpu.name, gpu.cores, "gpu")
mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
step = functools.partial(stream_step, make_stream_plan(dims_of(config, 1, 64), gpu))
with jax.sharding.use_abstract_mesh(mesh):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    text = jax.jit(step).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
assert text.count("custom_call") == 1 and "@mosaic_gpu" in text
"""
_GENERATES = """
import logging
from unittest import mock
import jax.numpy as jnp
import pytest
import ffjax
from decode_cases import random_model, small_config
from ffjax import decode
from ffjax.prefill.choice import resolve_prefill
from ffjax.sampling.rows import drawing_gpu
from numpy_kernel import by_numpy
from pallas_kernels.gpu import INTERPRETER, Gpu
from pallas_kernels.stream.launch import stream_step
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.targets import target

backends, said = [], []

def interpreted(plan, *args, interpret, **more):
    "The step as it would be launched, run by the interpreter."
    backends.append(plan.backend)
    return stream_step(make_stream_plan(plan.dims, INTERPRETER), *args, interpret=True, **more)

log = logging.getLogger("ffjax")
log.setLevel(logging.INFO)
log.addHandler(mock.Mock(level=0, handle=lambda record: said.append(record.getMessage())))
model, gpu = random_model(small_config(num_layers=1)), target("h200").gpu
drawn = ffjax.SamplingParams(temperature=1, top_k=5, repetition_penalty=1.1, logprobs=2)
with mock.patch.object(Gpu, "of", lambda _: gpu), mock.patch.object(
    decode, "stream_step", interpreted
), by_numpy():
    assert drawing_gpu(decode.default_device(), None) is None
    how = {"sampling": drawn, "implementation": "pallas_mosaic_gpu"}
    out = ffjax.generate(model, [[1, 2, 3]], 4, **how)
    assert (out.prefill, out.implementation) == ("xla", "pallas_mosaic_gpu"), out
    assert (len(out.tokens[0]), len(out.logprobs[0])) == (4, 4), out
    assert decode.choose_kernel(model.config, jnp.bfloat16, 1, 64) == ("pallas", None)
    with pytest.raises(NotImplementedError, match="Triton backend .* Use prefill='xla'"):
        resolve_prefill(jnp.bfloat16, decode.default_device(), None, "pallas")
assert backends and set(backends) == {"mosaic_gpu"}, backends
[sentence] = [x for x in said if "Triton" in x]
assert "prompts, draws and log-probabilities: XLA does their work" in sentence
"""


def run(*scripts: str) -> None:
    """Runs scripts where the backend is gone."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "".join((_GONE, *scripts))],
        cwd=TESTS,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            # What is compiled runs once: as in `conftest.py`.
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_backend_optimization_level=0",
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_everything_else_is_imported_and_mosaic_gpu_compiles_the_step():
    run(_IMPORTS, _CHOICES, _LOWERS)


def test_a_text_is_generated_with_prompts_and_draws_by_xla():
    run(_GENERATES)
