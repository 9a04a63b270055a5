"""A channel far larger than the others, on a GPU: no further from float32 than the bfloat16 model.

Random weights have no such channel, and trained ones do.
"""

from __future__ import annotations

import functools

import pytest
from outliers import RATIOS, with_outlier

from ffjax import fidelity
from ffjax.config import ModelConfig
from ffjax.decode import fused_step
from ffjax.quantization import quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("error", "ignore:The Pallas Triton backend:DeprecationWarning"),
]

CONFIG = ModelConfig(
    vocab_size=1024,
    num_layers=6,
    model_dim=512,
    ffw_dim=1536,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    tied_embeddings=False,
)


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_a_large_channel_takes_nothing_from_the_others(weights, batch):
    step = functools.partial(fused_step)
    prompts = fidelity.random_prompts(CONFIG, 16, 12)
    # Even and odd: of two activations in a word, either may be the large one.
    for channel in (6, 7):
        for ratio in RATIOS:
            model = with_outlier(CONFIG, channel, ratio)
            if weights != "bfloat16":
                model = quantize(model, weights)
            found = fidelity.measure(model, prompts, step, batch=batch)
            # Of so few tokens, each one's likelihood says too little.
            assert found.kl.passed, f"channel {channel}, {ratio} times the others: {found}"
