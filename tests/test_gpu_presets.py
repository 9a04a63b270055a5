"""The fused kernel on a GPU at the widths of every preset, in every format, for every kind of step.

How tiles are cut, how many slots the ring has and where shared memory ends follow from widths,
format, sequences and tokens together. Gemma 3 1B was once wrong in int8 with 8 tokens alone. So
every two of these meet here; `--whole` runs all cases. Few layers of each are enough: depth has
tests of its own (`test_gpu`, at the whole depth of smaller models).
"""

import dataclasses

import pytest
from quantize_cases import INT8_GROUPS
from test_gpu import check_step
from test_gpu_tokens import check, split

from ffjax.config import PRESETS, ModelConfig, preset
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
    "int8 in groups": WeightFormats.of_layers(INT8_GROUPS, INT8_GROUPS),
    "int4": WeightFormats.of_layers(int4()),
    "int4, a head of int8": WeightFormats.of_layers(int4(), INT8),
    "int4 in groups of 32": WeightFormats.of_layers(int4(32), INT8),
    "int4 with minima": WeightFormats.of_layers(int4(32, "float16", "minimum"), INT8_GROUPS),
}
# Live positions of each sequence, and tokens of each a step.
STEPS = {
    "1 sequence": ([1500], 1),
    "3 sequences": ([129, 1500, 1], 1),
    "8 sequences": ([127, 1, 1500, 129, 0, 63, 900, 2039], 1),
    "8 tokens": ([1021], 8),
    "4 tokens of 2": ([127, 1020], 4),
}
CAPACITY = 2048


def cut(name: str, formats: WeightFormats) -> ModelConfig:
    """A preset of as few layers as have every kind, with weights of these formats."""
    config = preset(name)
    kinds = max(len(config.window_pattern), len(config.rope_pattern), 2)
    config = dataclasses.replace(config, num_layers=min(kinds, config.num_layers))
    return config if formats == FLOATING else quantized_config(config, formats)


def stored(name: str, formats: WeightFormats) -> bool:
    """Whether its rows are whole groups."""
    try:
        cut(name, formats)
    except ValueError:
        return False
    return True


CASES = [
    (name, formats) for name in PRESETS for formats in FORMATS if stored(name, FORMATS[formats])
]


@pytest.mark.drawn("Every two of width, format, kind of step and backend.", pairs=True)
@pytest.mark.parametrize("kernel", ["pallas", "pallas_mosaic_gpu"])
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("name, formats", CASES)
def test_a_step_of_a_preset_matches_the_reference(name, formats, kind, kernel):
    lengths, tokens = STEPS[kind]
    for parts in split(cut(name, FORMATS[formats])):
        if tokens == 1:
            check_step(kernel, *parts, lengths, CAPACITY, "fused_vs_model_deep")
        else:
            check(parts, lengths, tokens, CAPACITY, "fused_vs_model_deep", kernel)
