"""The fused kernel on a GPU, on weights in the groups that files have, against the reference."""

import dataclasses
from collections.abc import Iterator

import jax
import pytest
from decode_cases import random_model, small_config
from flax import nnx
from quantize_cases import GROUPED, INT8_GROUPS, kernel_config
from test_gpu import (
    CAPACITY,
    Split,
    check_step,
    every_kernel,
    exact,
    made_on_the_device,
    mixed_lengths,
)

from ffjax.config import preset
from ffjax.formats import WeightFormats, int4
from ffjax.quantization import quantized_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("error", "ignore:The Pallas Triton backend:DeprecationWarning"),
]

ALL = {
    "float16": int4(128, "float16"),
    "128, zero points": int4(128, "float16", "zero"),
    "128, minima": int4(128, "bfloat16", "minimum"),
    "64": int4(64),
    "64, zero points": int4(64, "float16", "zero"),
    "32": int4(32, "float16"),
    "32, minima": int4(32, "float16", "minimum"),
    "int8 in groups": INT8_GROUPS,
}


def of_all(name: str) -> WeightFormats:
    return WeightFormats.of_layers(ALL[name], ALL[name])


@every_kernel
@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_step_of_small_matrices_of_every_kind_matches_the_reference(name, batch, kernel):
    config = kernel_config(GROUPED[name])
    graph, params = nnx.split(random_model(config))
    lengths = [65, 0, 129, 1, 64, 128, 7, 100][:batch]
    check_step(kernel, config, graph, params, lengths, 150, "fused_vs_model")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_step_of_a_deep_narrow_model_matches_the_reference(name, batch):
    """Thirty layers: a word that is taken for a later one, or a race, shows up.

    The reference in bfloat16 is no judge: after 30 layers it is up to 0.047 from float32 in some
    head, where the kernel is 0.015.
    """
    config = small_config(num_layers=30, model_dim=384, ffw_dim=1152, num_heads=6, num_kv_heads=2)
    config = quantized_config(config, of_all(name))
    split = Split(config, *nnx.split(random_model(config)))
    oracle = exact(split)
    for lengths in mixed_lengths(batch):
        some = [min(length, 400) for length in lengths]
        check_step("pallas", *split, some, 512, "fused_vs_float32_deep", oracle)


@pytest.fixture(scope="module", params=ALL)
def wide(request) -> Iterator[Split]:
    """Random integers of Llama 3.2 1B's shapes, made on the device."""
    yield from made_on_the_device(quantized_config(preset("llama3.2-1b"), of_all(request.param)))


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_step_of_real_widths_matches_the_reference(wide, batch):
    for lengths in mixed_lengths(batch):
        parts = wide.config, wide.graph, wide.params
        check_step("pallas", *parts, lengths, CAPACITY, "fused_vs_model_deep")


@pytest.mark.parametrize("name", ["32, minima", "128, zero points", "int8 in groups"])
@pytest.mark.parametrize("batch", [1, 8])
def test_a_step_of_eight_billion_weights_matches_the_reference(name, batch):
    """Of four layers: rows of a split down projection, and eight warps."""
    config = dataclasses.replace(preset("llama3.1-8b"), num_layers=4)
    [split] = [*_kept(quantized_config(config, of_all(name)))]
    try:
        for lengths in mixed_lengths(batch)[:3]:
            parts = split.config, split.graph, split.params
            check_step("pallas", *parts, lengths, CAPACITY, "fused_vs_model_deep")
    finally:
        for array in jax.tree.leaves(split.params):
            array.delete()


def _kept(config) -> Iterator[Split]:
    yield Split(config, *nnx.split(random_model.__wrapped__(config)))
