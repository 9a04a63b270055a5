"""The fused kernel on a GPU at the widths of large models: a few layers of each, all else whole.

Their rows have 5120 and 8192 inputs, so that tiles are cut otherwise than those of smaller models.
"""

import dataclasses

import pytest
from test_gpu import check_step, made_on_the_device

from ffjax.config import PRESETS, preset
from ffjax.formats import FLOATING, INT8, WeightFormats, int4
from ffjax.quantization import quantized_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("error", "ignore:The Pallas Triton backend:DeprecationWarning"),
]

FORMATS = {
    "bfloat16": FLOATING,
    "int8": WeightFormats.of_layers(INT8),
    "int8 and its head": WeightFormats.of_layers(INT8, INT8),
    "int4": WeightFormats.of_layers(int4()),
    "int4, and a head of int8": WeightFormats.of_layers(int4(), INT8),
}
# Those whose weights fit an H200.
MODELS = [
    *(("llama3.1-70b", name) for name in FORMATS if name != "bfloat16"),
    ("qwen3-32b", "int8"),
    ("qwen3-32b", "int4"),
    ("qwen3-14b", "bfloat16"),
    ("qwen3-14b", "int8"),
    ("qwen3-14b", "int4"),
    *(
        (name, "bfloat16")
        for name, config in PRESETS.items()
        if config.family != "llama" and 3.5e9 <= config.num_params < 13e9
    ),
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda param: f"{param[0]}, {param[1]}")
def large(request):
    name, formats = request.param
    config = preset(name)
    layers = max(2, len(config.window_pattern))  # of every kind
    config = dataclasses.replace(config, num_layers=layers)
    if FORMATS[formats] != FLOATING:
        config = quantized_config(config, FORMATS[formats])
    yield from made_on_the_device(config)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_step_of_large_widths_matches_the_reference(large, batch):
    ends = (1, 127, 129, 1500)
    for i in range(len(ends)):
        lengths = [ends[(i + b) % len(ends)] for b in range(batch)]
        parts = large.config, large.graph, large.params
        check_step("pallas", *parts, lengths, 2048, "fused_vs_model_deep")
