"""The plan covers every row and input once, and fits the GPU it is made for."""

import dataclasses
import functools
import itertools
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from decode_cases import dims_of, small_config

from ffjax.config import PRESETS, preset
from pallas_kernels.dims import Dims, Features
from pallas_kernels.env import Env
from pallas_kernels.gpu import Gpu
from pallas_kernels.launch import StepState, launch_step
from pallas_kernels.plan import Plan, Tile, make_plan
from pallas_kernels.support import MAX_BATCH, why_not
from pallas_kernels.targets import target, target_names

pytestmark = pytest.mark.filterwarnings("error")

GPUS = [target(name).gpu for name in target_names()]
# Sizes at the edges of what `why_not` lets through.
ODD = [
    small_config(model_dim=d, ffw_dim=f, vocab_size=v, num_heads=n, num_kv_heads=k, head_dim=h)
    for (d, f, v), (n, k, h) in itertools.product(
        [(16, 16, 8), (48, 112, 9), (2064, 4112, 257), (3072, 8208, 50_257), (16_384, 16, 100)],
        [(1, 1, 32), (3, 3, 64), (16, 1, 128), (6, 2, 256)],
    )
]


def _all_dims() -> list[Dims]:
    configs = [*ODD, *PRESETS.values()]
    return [dims_of(c, batch, 16_384) for c in configs for batch in range(1, MAX_BATCH + 1)]


def _matvecs(plan: Plan) -> list[tuple[str, Tile, int, int]]:
    """Name, tile, output rows and inputs of each mat-vec."""
    d = plan.dims
    return [
        ("qkv", plan.qkv, d.qkv_dim, d.model_dim),
        ("attn_out", plan.attn_out, d.model_dim, d.attn_dim),
        ("gate_up", plan.gate_up, 2 * d.ffw_dim, d.model_dim),
        ("down", plan.down, d.model_dim, d.ffw_dim),
        ("head", plan.head, d.vocab_size, d.model_dim),
    ]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_tiles_cover_every_row_and_input_once(gpu):
    for dims in _all_dims():
        assert why_not(dims, "bfloat16", gpu) is None
        plan = make_plan(dims, gpu)
        assert plan.programs == gpu.cores
        for name, tile, rows, inputs in _matvecs(plan):
            where = (name, dims)
            # The head's last group is moved back onto the last rows; others share none.
            assert rows % tile.rows == 0 or (name == "head" and rows > tile.rows), where
            assert tile.inner == inputs, where
            assert (tile.blocks - 1) * tile.span < inputs <= tile.blocks * tile.span, where
            assert tile.ragged == (tile.blocks * tile.span != inputs), where
            assert tile.span == tile.chunks * tile.depth, where
            # Tensor cores: at least 8 columns, 16 inputs, powers of two.
            assert tile.chunks * plan.padded_batch >= 8, where
            assert tile.depth >= 16, where
            for size in (tile.rows, tile.chunks, tile.depth):
                assert size & (size - 1) == 0, where
        # Both halves of a rotated pair, or of a gate and its up row, lie in one group.
        assert dims.head_dim % plan.qkv.rows == 0
        assert dims.ffw_dim % (plan.gate_up.rows // 2) == 0
        # The residual's elements stay with one program; its readers share one operand.
        assert plan.attn_out.rows == plan.down.rows
        assert plan.gate_up.depth == plan.head.depth == plan.qkv.depth


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_tiles_in_flight_fit_shared_memory(gpu):
    for dims in _all_dims():
        plan = make_plan(dims, gpu)
        assert plan.num_stages >= 2
        for name, tile, _, _ in _matvecs(plan):
            # A bfloat16 weight tile and, where inputs come in blocks, the block's operand.
            columns = plan.padded_batch if tile.blocks > 1 else 0
            stage = 2 * tile.span * (tile.rows + columns)
            assert (plan.num_stages - 1) * stage <= gpu.shared_memory, (name, dims)


@pytest.mark.parametrize("programs", [1, 5, 132])
def test_work_is_dealt_out_once(programs):
    dims = dims_of(small_config(), 1, 8)
    plan = make_plan(dims, Gpu.named("small", "9.0", programs))
    for items in (0, 1, 4, 5, 6, 131, 132, 133, 1000):
        dealt = []
        for program in range(programs):
            env: Any = types.SimpleNamespace(plan=plan, program=jnp.int32(program))
            dealt += [program + j * programs for j in range(int(Env.share(env, items)))]
        assert sorted(dealt) == list(range(items))


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_reads_every_weight_once(name):
    config = preset(name)
    dims = dims_of(config, 3, 128)
    # A tied head is the embedding: all of it is read as the head.
    read = config.num_params - (0 if config.tied_embeddings else dims.vocab_size * dims.model_dim)
    rows = 3 * dims.model_dim
    assert dims.step_weight_bytes == 2 * (read + rows)
    if dims.features == Features():  # the phased kernel knows no other
        assert make_plan(dims, GPUS[0]).weight_bytes == dims.step_weight_bytes


def test_cache_bytes_are_those_of_the_positions_read():
    dims = dims_of(preset("llama3.2-1b"), 2, 128)
    assert dims.cache_bytes([3, 100]) == 103 * 2 * 2 * 16 * 8 * 64
    # 22 of 26 layers see 512 positions, the new one among them.
    dims = dims_of(preset("gemma3-1b"), 2, 4096)
    assert sum(dims.features.local_layers) == 22
    positions = 4 * (3 + 4000) + 22 * (3 + 511)
    assert dims.cache_bytes([3, 4000]) == positions * 2 * 2 * 1 * 256


def test_phases_only_read_what_was_written_before():
    plan = make_plan(dims_of(preset("llama3.2-1b"), 1, 128), GPUS[0])
    written = {"embed", "k", "v"}  # given from outside
    for phase in plan.phases:
        assert set(phase.reads) <= written, phase.name
        written |= set(phase.writes)
    assert {"logits", "token", "lengths", "k", "v"} <= written


def test_a_grid_beyond_the_device_is_refused():
    dims = dims_of(preset("llama3.2-1b"), 1, 256)
    plan = make_plan(dims, Gpu.named("H200", "9.0", 132))
    plan = dataclasses.replace(plan, programs=264)
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    parts: Any = [one] * 4
    state = StepState(*parts)
    with pytest.raises(ValueError, match="this plan has 264, the device holds 132"):
        jax.eval_shape(functools.partial(launch_step, plan), dims.abstract_weights(), state, one)
