"""Steps compile by Mosaic GPU without a GPU, each to one kernel that spills next to nothing."""

import functools
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compile_server import forking
from decode_cases import dims_of, small_config
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ffjax.commands.compile import main
from ffjax.transforms import launch_whole
from pallas_kernels import compile as compile_module
from pallas_kernels.compile import why_no_compiler
from pallas_kernels.launch import StepState
from pallas_kernels.stream.exchange_layout import exchange_words
from pallas_kernels.stream.launch import stream_step
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.targets import target

needs_compiler = pytest.mark.skipif(
    why_no_compiler() is not None, reason=why_no_compiler() or "it is there"
)


@pytest.fixture(scope="module", autouse=True)
def _forks():
    """One process imports JAX for all workers."""
    with pytest.MonkeyPatch.context() as patch, forking() as run_worker:
        patch.setattr(compile_module, "_run_worker", run_worker)
        yield


@needs_compiler
@pytest.mark.parametrize(
    "step",
    [
        "--config llama3.2-1b",
        "--config llama3.2-1b --batch 8",
        "--config llama3.1-8b --weights int4 --batch 8",
        # Queries are normed: a thread waits for 40 words at once, and for a norm of all heads.
        "--config gemma3-12b --weights int4 --head int8",
        "--config olmo3-7b",
        # Rows of more than 4096 inputs.
        "--config phi4-14b --weights int4 --head int8 --batch 8",
        "--config olmo2-1b --weights int8 --batch 2 --tokens 4",
    ],
)
def test_a_step_is_one_kernel_that_fits(capsys, step):
    assert main([*step.split(), "--backend", "mosaic_gpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    # One call, and neither a copy of the cache, which is updated in place, nor a fill.
    assert (report["backend"], report["thunks"]) == ("mosaic_gpu", ["kCustomCall"])
    gpu = target("h200").gpu
    assert report["programs"] == gpu.cores
    # 65536 registers a multiprocessor: all programs are resident, one on each.
    assert 32 <= report["registers"] <= min(255, 65_536 // (32 * report["num_warps"]))
    assert report["spill_bytes"] == 0
    assert 0 < report["shared_memory_bytes"] <= gpu.shared_memory
    # No copy of an input or of a result either.
    assert report["temp_bytes"] < 1024


@needs_compiler
def test_the_widest_rows_of_bfloat16_spill_no_more_than_triton_s(capsys):
    step = "--config mistral-nemo-12b --batch 8 --json"
    spilled = {}
    for backend in ("mosaic_gpu", "triton"):
        assert main([*step.split(), "--backend", backend]) == 0
        spilled[backend] = json.loads(capsys.readouterr().out)["spill_bytes"]
    assert spilled["mosaic_gpu"] <= spilled["triton"]


def test_an_older_gpu_is_left_to_triton(capsys):
    asked = ["--config", "llama3.2-1b", "--gpu", "a100", "--backend", "mosaic_gpu"]
    assert main(asked) == 1
    said = capsys.readouterr().err
    assert "compute capability 9.0 and newer, got NVIDIA A100" in said
    assert "of 8.0. Take Triton, which" in said


@needs_compiler
@pytest.mark.skipif(
    os.environ.get("JAX_PLATFORMS") != "cpu",
    reason="XLA's CUDA plugin compiles without a GPU where JAX_PLATFORMS=cpu keeps it from one",
)
def test_what_instances_of_vmap_update_is_no_slice_of_all():
    """XLA would fuse slices with the call, and results would not be what the call has updated."""
    from jax.experimental import topologies

    h200, instances = target("h200"), 3
    dims = dims_of(small_config(num_layers=2), 3, 64)
    plan = make_stream_plan(dims, h200.gpu).compiled_by("mosaic_gpu")
    topology = topologies.get_topology_desc("", "cuda", target_config=h200.config, topology="1x1x1")
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    there = NamedSharding(mesh, PartitionSpec())

    def stacked(*shape, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((instances, *shape), dtype, sharding=there)

    shape = dims.num_layers, dims.batch, dims.num_kv_heads, dims.capacity, dims.head_dim
    cache = stacked(*shape, dtype=jnp.bfloat16)
    state = StepState(cache, cache, stacked(dims.batch), stacked(exchange_words(dims)))
    weights = jax.tree.map(lambda x: stacked(*x.shape, dtype=x.dtype), dims.abstract_weights())
    step = jax.vmap(functools.partial(launch_whole, functools.partial(stream_step, plan)))
    with jax.set_mesh(mesh):
        compiled = jax.jit(step).trace(weights, state, stacked(dims.columns)).lower().compile()
    text = compiled.as_text()
    assert text is not None
    [call] = [line for line in text.splitlines() if " custom-call(" in line]
    assert "output_to_operand_aliasing" in call
    assert "dynamic-slice-fusion" not in text
