"""What a step reads, in bytes."""

import pytest
from decode_cases import dims_of

from ffjax.config import PRESETS, preset

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_reads_every_weight_once(name):
    config = preset(name)
    dims = dims_of(config, 3, 128)
    # A tied head is the embedding: all of it is read as the head.
    read = config.num_params - (0 if config.tied_embeddings else dims.vocab_size * dims.model_dim)
    rows = 3 * dims.model_dim
    assert dims.step_weight_bytes == 2 * (read + rows)


def test_cache_bytes_are_those_of_the_positions_read():
    dims = dims_of(preset("llama3.2-1b"), 2, 128)
    assert dims.cache_bytes([3, 100]) == 103 * 2 * 2 * 16 * 8 * 64
    # 22 of 26 layers see 512 positions, the new one among them.
    dims = dims_of(preset("gemma3-1b"), 2, 4096)
    assert sum(dims.features.local_layers) == 22
    positions = 4 * (3 + 4000) + 22 * (3 + 511)
    assert dims.cache_bytes([3, 4000]) == positions * 2 * 2 * 1 * 256
