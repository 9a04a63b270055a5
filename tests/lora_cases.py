"""Adapters for tests: what is asked of peft, and the numbers of their matrices.

`record_lora.py` has peft write them and merge them, `test_lora.py` has ffjax merge what peft
wrote. Needs numpy and nothing else, so that the recorder's environment need not hold jax.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hf_models import GOLDENS, HFModel

__all__ = ["BASE", "CASES", "GOLDEN", "matrix"]

GOLDEN = GOLDENS / "lora.npz"

# The smallest model whose matrices are all of different shapes, or nearly.
BASE = HFModel(
    seed=11,
    settings={
        "vocab_size": 7,
        "hidden_size": 8,
        "intermediate_size": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
    },
)

CASES: dict[str, dict[str, Any]] = {
    # The scaling, 5/3, is no float32; the ranks are less than the sizes.
    "every_matrix": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": "all-linear",
    },
    # Of several patterns the first that fits counts, and a pattern fits a name's end.
    "patterns_and_rslora": {
        "r": 3,
        "lora_alpha": 7,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
        "layers_to_transform": [1],
        "rank_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 2, "q_proj": 4, "down_proj": 5},
        "alpha_pattern": {"self_attn.[vo]_proj": 11, "v_proj": 13, "roj": 17},
    },
    # peft saves with them the model's own matrices of both.
    "embedding_and_head": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["embed_tokens", "lm_head", "k_proj"],
        "exclude_modules": ["model.layers.0.self_attn.k_proj"],
    },
}


def matrix(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """A matrix of an adapter: float32, 8-bit integers times a power of two.

    Sums of a few products of these are exact in float32, whatever their order.
    """
    raw = np.random.PCG64(seed).random_raw(math.prod(shape)) >> np.uint64(56)
    return (raw.astype(np.float32).reshape(shape) - 128) / 512
