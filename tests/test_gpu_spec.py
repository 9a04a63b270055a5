"""The kernel on a GPU, buffer by buffer against the executable specification."""

from __future__ import annotations

import dataclasses
from typing import get_args

import jax
import pytest
from decode_cases import dims_of, small_config
from quantize_cases import FOR_KERNELS, GROUPED, kernel_config
from stream_cases import FAMILIES

from ffjax.config import ModelConfig, preset
from ffjax.decode import Kernel, backend_of
from ffjax.quantization import quantized_config
from pallas_kernels.backends import why_not_backend
from pallas_kernels.dims import DecodeWeights
from pallas_kernels.gpu import Gpu
from pallas_kernels.launch import StepState
from pallas_kernels.spec.bisecting import bisect
from pallas_kernels.spec.made import random_state, random_tokens, random_weights
from pallas_kernels.spec.running import Run, compiled
from pallas_kernels.stream.plan import StreamPlan
from pallas_kernels.stream.planner import make_stream_plan, tuned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("error", "ignore:The Pallas Triton backend:DeprecationWarning"),
]

# Of each the sequences' lengths, T, and the cache's slots. Where splits of the cache's positions
# meet, at a window's edge, empty, and where the cache has no room for the last token.
SMALL = ([39, 300, 0], 1, 310)
SEVERAL = ([38, 308], 3, 310)
FAR = ([5000], 1, 8192)
MANY = ([1, 127, 128, 700, 4096, 5000, 8000, 8191], 1, 8192)
DRAFT = ([4999, 257], 4, 8192)

SMALL_CONFIGS = {name: small_config(**fields) for name, fields in FAMILIES.items()}
SMALL_CONFIGS |= {name: kernel_config(made) for name, made in (FOR_KERNELS | GROUPED).items()}


def sizes(name: str, weights: str | None = None) -> ModelConfig:
    config = preset(name)
    return config if weights is None else quantized_config(config, FOR_KERNELS[weights])


def plan_of(config: ModelConfig, step: tuple[list[int], int, int], kernel: Kernel) -> StreamPlan:
    gpu, (lengths, tokens, capacity) = Gpu.of(jax.devices()[0]), step
    assert gpu is not None
    dims = dims_of(config, len(lengths), capacity, tokens)
    plan = make_stream_plan(dims, gpu, tuned(dims, gpu))
    if (backend := backend_of(kernel)) is None:
        return plan
    if (reason := why_not_backend(backend, gpu)) is not None:
        pytest.skip(reason)
    return plan.compiled_by(backend)


def look_for_a_difference(
    config: ModelConfig,
    step: tuple[list[int], int, int],
    kernel: Kernel = "pallas",
    run: Run = compiled,
    **how: bool,
):
    plan = plan_of(config, step, kernel)
    weights, state = random_weights(plan.dims), random_state(plan.dims, step[0])
    return bisect(plan, weights, state, random_tokens(plan.dims), run, **how)


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_every_buffer_of_a_small_step_is_the_specification_s(name):
    step = SMALL if len(name) % 2 else SEVERAL
    assert (found := look_for_a_difference(SMALL_CONFIGS[name], step)) is None, str(found)


@pytest.mark.parametrize("kernel", get_args(Kernel))
@pytest.mark.parametrize(
    ("weights", "step"),
    [(None, FAR), (None, MANY), (None, DRAFT), ("int8", FAR), ("int4 and its head", MANY)],
)
def test_every_buffer_of_a_real_step_is_the_specification_s(kernel, weights, step):
    found = look_for_a_difference(sizes("llama3.2-1b", weights), step, kernel)
    assert found is None, str(found)


def test_every_layer_by_itself_is():
    config = dataclasses.replace(sizes("llama3.2-1b"), num_layers=3)
    assert (found := look_for_a_difference(config, FAR, every_layer=True)) is None, str(found)


# Of each array: what is done to it in layer 5, and where that is found.
PLANTED = {
    "a key's row": ("qkv", (5, 2048 + 70), ("qkv", "qkv")),
    "a norm": ("mlp_norm", 5, ("gate_up", "ffw")),
    "an output's row": ("attn_out", (5, 100), ("attn_out", "x_mid")),
    "a residual's row": ("down", (5, 100), ("down", None)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_in_its_layer_and_segment(name):
    array, where, (segment, buffer) = PLANTED[name]

    def wrong(plan: StreamPlan, weights: DecodeWeights, state: StepState, tokens, *, hidden_layers):
        changed = getattr(weights, array).at[where].multiply(2)
        weights = weights._replace(**{array: changed})
        return compiled(plan, weights, state, tokens, hidden_layers=hidden_layers)

    found = look_for_a_difference(sizes("llama3.2-1b"), FAR, run=wrong)
    assert found is not None
    assert (found.layer, found.segment) == (5, segment), str(found)
    assert buffer in (None, found.buffer), str(found)
