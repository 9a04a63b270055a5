"""The fused kernel on a GPU, over and over, with warps that dawdle: always the same bits.

What programs, and warps of a program, owe to chance alone goes right for a long time on a quiet
machine. Small models show it first: most of their warps have nothing to wait for, and run ahead.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from decode_cases import filled_cache, random_model, random_tokens, small_config
from flax import nnx
from noise import KINDS, dawdling
from quantize_cases import FOR_KERNELS, kernel_config
from step_cases import CASES
from stream_cases import FAMILIES

from ffjax.config import ModelConfig
from ffjax.decode import fused_step

pytestmark = [
    pytest.mark.gpu,
    # JAX 0.11 says so of every kernel of this backend; the project pins the versions that have it.
    pytest.mark.filterwarnings("error", "ignore:The Pallas Triton backend:DeprecationWarning"),
]

TIMES = 200
SMALL: dict[str, tuple[ModelConfig, int, list[int]]] = {
    **{name: (config, capacity, some[0]) for name, (config, capacity, some) in CASES.items()},
    **{name: (kernel_config(formats), 150, [65]) for name, formats in FOR_KERNELS.items()},
    "mixed, several": (kernel_config(FOR_KERNELS["mixed"]), 150, [65, 0, 129]),
    # Heads of several KV splits, which all programs combine.
    "KV splits": (small_config(num_heads=4, num_kv_heads=2, num_layers=5), 2048, [1700]),
    "KV splits of several": (
        small_config(num_heads=4, num_kv_heads=2, num_layers=5),
        2048,
        [1700, 3, 600],
    ),
    # More programs than tiles, and more layers than tags of two bits.
    "idle programs": (
        kernel_config(FOR_KERNELS["int8"], model_dim=512, ffw_dim=1536, num_layers=9),
        150,
        [65, 7],
    ),
}
# Of several tokens of each sequence, which are the last number.
SEVERAL: dict[str, tuple[ModelConfig, int, list[int], int]] = {
    "8 tokens": (small_config(num_heads=4, num_kv_heads=2, num_layers=5), 150, [65], 8),
    "4 tokens of two": (kernel_config(FOR_KERNELS["int4 and its head"]), 150, [65, 0], 4),
    "8 tokens, KV splits": (small_config(num_heads=8, num_kv_heads=2), 2048, [1700], 8),
    "3 tokens, normed heads": (small_config(**FAMILIES["qwen3"]), 150, [61, 3], 3),
}
ALL = {**{name: (*case, 1) for name, case in SMALL.items()}, **SEVERAL}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_a_step_whose_warps_dawdle_has_the_same_bits(name, kind):
    config, capacity, lengths, several = ALL[name]
    graph, params = nnx.split(random_model(config))
    tokens = random_tokens(config, len(lengths), tokens=several)
    cache = filled_cache(config, lengths, capacity, tokens=several)

    def step():
        return jax.jit(
            lambda params, cache: fused_step(nnx.merge(graph, params), cache, tokens).logits
        )

    want = np.asarray(step()(params, cache)).tobytes()
    with dawdling(kind):
        slow = step().lower(params, cache).compile()
    wrong = sum(np.asarray(slow(params, cache)).tobytes() != want for _ in range(TIMES))
    assert wrong == 0, f"{wrong} of {TIMES} steps differ"
