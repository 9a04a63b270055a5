"""`jax.export` of a step: written here, run where JAX alone is known; and lowered for a GPU."""

import ast
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import ffjax
from ffjax.dims import step_dims
from ffjax.transforms import launch_whole
from pallas_kernels.launch import StepState, launch_step
from pallas_kernels.plan import make_plan
from pallas_kernels.stream.launch import stream_step
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.targets import target

ROOT = pathlib.Path(__file__).parents[1]
TRITON = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("flatbuffers") is None,
    reason="needs the extra export: pip install '.[export]'",
)

# Weights and cache come from a file: the program that runs the step knows no class of ours.
_READER = """
import json, sys
import jax, numpy as np
from jax import export
step = jax.jit(export.deserialize(open(sys.argv[1], "rb").read()).call, donate_argnums=1)
arrays = {name: jax.numpy.asarray(x).view("bfloat16") if x.dtype == np.uint16 else x
          for name, x in np.load(sys.argv[2]).items()}
weights, store = {"layers": {}}, {}
for name, x in arrays.items():
    place, _, own = name.rpartition(".")
    {"": weights, "layers": weights["layers"], "cache": store}[place][own] = x
token, made = jax.numpy.full(1, ord("d"), "int32"), []
for _ in range(40):
    store, logits, token = step(weights, store, token)
    made.append(int(token[0]))
assert not {"ffjax", "flax", "pallas_kernels"} & set(sys.modules)
print(json.dumps(made))
"""


def _run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_program_that_knows_jax_alone_runs_the_step(tmp_path):
    said, text = _run(
        str(ROOT / "examples/export_step.py"), "--out", str(tmp_path / "step.bin")
    ).splitlines()
    model = ffjax.load(ffjax.SHIPPED_MODEL)
    cache = ffjax.KVCache.create(model.config, 1, 256, model.dtype)
    arrays = {
        "embed": model.embed[...],
        "final_norm": model.final_norm[...],
        **{f"layers.{name}": array for name, array in model.stacked_weights().items()},
        **{f"cache.{name}": array for name, array in vars(cache).items()},
    }
    bits = {
        name: np.asarray(x).view(np.uint16) if x.dtype == jnp.bfloat16 else x
        for name, x in arrays.items()
    }
    np.savez(tmp_path / "arrays.npz", **bits)
    (tmp_path / "reader.py").write_text(_READER, encoding="utf-8")
    made = json.loads(_run(*(str(tmp_path / n) for n in ("reader.py", "step.bin", "arrays.npz"))))
    out = ffjax.generate(model, [ord("d")], 40)
    assert made == out.tokens[0]
    assert ast.literal_eval(text) == "d" + ffjax.ByteTokenizer().decode(made)
    assert os.fspath(tmp_path / "step.bin") in said


@pytest.mark.parametrize("name", ["pallas_stream", "pallas"])
def test_a_fused_step_is_exported_for_a_gpu_when_it_is_asked_for_by_name(name):
    gpu = target("h200").gpu
    config = ffjax.preset("python-bytes-3m")
    dims = step_dims(config, 1, 256)
    if name == "pallas_stream":
        launch = functools.partial(stream_step, make_stream_plan(dims, gpu))
    else:
        launch = functools.partial(launch_step, make_plan(dims, gpu))
    weights, tree = jax.tree.flatten(dims.abstract_weights())
    cache = jax.eval_shape(lambda: ffjax.KVCache.create(config, 1, 256))
    state = cache.k, cache.v, cache.lengths, cache.counters

    def step(weights, state, tokens):
        logits, token, state = launch_whole(
            launch, jax.tree.unflatten(tree, weights), StepState(*state), tokens
        )
        return tuple(state), logits, token

    device = AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        exporting = functools.partial(export.export, jax.jit(step), platforms=["cuda"])
        arguments = weights, state, cache.lengths
        with pytest.raises(ValueError, match=r"no compatibility guarantees[^@]*@__gpu\$xla.gpu.tr"):
            exporting()(*arguments)
        exported = exporting(disabled_checks=[TRITON])(*arguments)
    again = export.deserialize(exported.serialize())
    assert again.platforms == ("cuda",)
    assert again.out_avals[-1].shape == (1,)
    assert again.mlir_module().count("custom_call @__gpu$xla.gpu.triton") == 1
