"""`jax.export` of a step: written here, run where JAX alone is known; and lowered for a GPU."""

import ast
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import ffjax
from ffjax.dims import step_dims
from ffjax.transforms import launch_whole
from pallas_kernels.compile import why_no_compiler
from pallas_kernels.launch import StepState
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
        **{f"cache.{name}": x for name, x in vars(cache).items() if x is not None},
    }
    bits: dict[str, Any] = {
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


CAPACITY = 256


def exported_for_h200(disabled_checks):
    """A fused step of the shipped model's shapes, and shapes of its arguments."""
    gpu, config = target("h200").gpu, ffjax.preset("python-bytes-3m")
    dims = step_dims(config, 1, CAPACITY)
    launch = functools.partial(stream_step, make_stream_plan(dims, gpu))
    weights, tree = jax.tree.flatten(dims.abstract_weights())
    cache = jax.eval_shape(lambda: ffjax.KVCache.create(config, 1, CAPACITY))
    state = cache.k, cache.v, cache.lengths, cache.counters

    def step(weights, state, tokens):
        logits, token, state, _ = launch_whole(
            launch, jax.tree.unflatten(tree, weights), StepState(*state), tokens
        )
        return tuple(state), logits, token

    device = AbstractDevice(gpu.name, gpu.cores, "gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    arguments = weights, state, cache.lengths
    with jax.sharding.use_abstract_mesh(mesh):
        how = {"platforms": ["cuda"], "disabled_checks": disabled_checks}
        return export.export(jax.jit(step), **how)(*arguments), arguments


def test_a_fused_step_is_exported_for_a_gpu_when_it_is_asked_for_by_name():
    with pytest.raises(ValueError, match=r"no compatibility guarantees[^@]*@__gpu\$xla.gpu.triton"):
        exported_for_h200([])
    exported, _ = exported_for_h200([TRITON])
    again = export.deserialize(exported.serialize())
    assert again.platforms == ("cuda",)
    assert again.mlir_module().count("custom_call @__gpu$xla.gpu.triton") == 1


# XLA's plugin wants a process of its own.
_COMPILED = """
import re, sys
sys.path.insert(0, {tests!r})
import jax, numpy as np
from jax import export
from jax.experimental import topologies
import test_export_step as cases
exported, arguments = cases.exported_for_h200([cases.TRITON])
exported = export.deserialize(exported.serialize())
gpu = cases.target("h200")
topology = topologies.get_topology_desc("", "cuda", target_config=gpu.config, topology="1x1x1")
mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
everywhere = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), arguments
)
with jax.set_mesh(mesh):
    step = jax.jit(lambda *step: exported.call(*step), donate_argnums=1)
    compiled = step.trace(*arguments).lower().compile()
[entry] = re.findall(r"^ENTRY [^\\n]*\\{{\\n(.*?)^\\}}", compiled.as_text(), re.M | re.S)
kinds = re.findall(r"^\\s+(?:ROOT )?\\S+ = (?:\\(.*?\\)|\\S+) ([\\w-]+)\\(", entry, re.M)
idle = {{"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}}
assert [kind for kind in kinds if kind not in idle] == ["custom-call"], kinds
memory = compiled.memory_analysis()
state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[1]))
assert memory.alias_size_in_bytes == state, (memory, state)
assert memory.temp_size_in_bytes == 0, memory
print("one kernel")
"""


@pytest.mark.skipif(
    why_no_compiler() is not None, reason=why_no_compiler() or "the compiler is there"
)
def test_what_is_read_back_compiles_to_one_kernel_that_updates_the_cache_in_place(request):
    program = _COMPILED.format(tests=str(request.path.parent))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "one kernel\n"
