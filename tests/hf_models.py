"""Small random Llama models, described as Hugging Face does: settings, tensor names, tokens.

`record_hf_logits.py` builds them with transformers, `test_hf_goldens.py` with ffjax. Needs
numpy and nothing else, so that the recorder's environment need not hold jax.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

__all__ = ["GOLDENS", "LLAMA_ROPES", "MODELS", "HFModel"]

GOLDENS = pathlib.Path(__file__).with_name("goldens")


@dataclasses.dataclass(frozen=True)
class HFModel:
    """A model and the tokens it is given.

    Attributes:
        seed: what weights and tokens are drawn from.
        settings: fields of transformers' `LlamaConfig`.
    """

    seed: int
    settings: dict[str, Any]

    def weights(self) -> dict[str, np.ndarray]:
        """Weights by Hugging Face name, float32, each of them exact in bfloat16.

        The same numbers everywhere: numpy promises the raw stream of a bit generator, not
        those of its distributions. A weight is an 8-bit integer times a power of two, which
        bfloat16's 8 bits of significand hold.
        """
        s = self.settings
        width, inner, vocab = s["hidden_size"], s["intermediate_size"], s["vocab_size"]
        queries = s["num_attention_heads"] * s["head_dim"]
        kvs = s["num_key_value_heads"] * s["head_dim"]
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
        for i in range(s["num_hidden_layers"]):
            for name, shape in {
                "input_layernorm": (width,),
                "self_attn.q_proj": (queries, width),
                "self_attn.k_proj": (kvs, width),
                "self_attn.v_proj": (kvs, width),
                "self_attn.o_proj": (width, queries),
                "post_attention_layernorm": (width,),
                "mlp.gate_proj": (inner, width),
                "mlp.up_proj": (inner, width),
                "mlp.down_proj": (width, inner),
            }.items():
                shapes[f"model.layers.{i}.{name}.weight"] = shape
        shapes["model.norm.weight"] = (width,)
        if not s["tie_word_embeddings"]:
            shapes["lm_head.weight"] = (vocab, width)
        stream = np.random.PCG64(self.seed)
        return {name: _weight(stream, name, shape) for name, shape in shapes.items()}

    def tokens(self, batch: int = 2, count: int = 29) -> np.ndarray:
        """Token ids, int32 `[B, T]`."""
        raw = np.random.PCG64(self.seed + 1).random_raw(batch * count)
        ids = (raw >> np.uint64(32)) % np.uint64(self.settings["vocab_size"])
        return ids.astype(np.int32).reshape(batch, count)


def _weight(stream: np.random.PCG64, name: str, shape: tuple[int, ...]) -> np.ndarray:
    raw = stream.random_raw(math.prod(shape)) >> np.uint64(56)
    integers = raw.astype(np.float32).reshape(shape) - 128  # -128 to 127
    if len(shape) == 1:  # a norm's: 0.5 to 1.5, in steps of 1/128
        return 1 + np.trunc(integers / 2) / 128
    if name == "model.embed_tokens.weight":
        return integers / 64
    # The power of two that brings the deviation of 74 nearest to 1/sqrt(in).
    return integers * np.float32(2.0 ** -round(math.log2(74 * math.sqrt(shape[1]))))


def _rope(theta: float, **scaling) -> dict[str, Any]:
    return {"rope_type": "llama3" if scaling else "default", "rope_theta": theta, **scaling}


# Of 29 positions: some wavelengths are shorter than 8, some longer than 32, some between.
_STRETCHED = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# Sizes share as few factors as transformers allows: hidden_size is a multiple of the heads.
MODELS: dict[str, HFModel] = {
    "tied": HFModel(
        11,
        {
            "vocab_size": 101,
            "num_hidden_layers": 2,
            "hidden_size": 74,
            "intermediate_size": 53,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "rope_parameters": _rope(10_000.0),
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": True,
        },
    ),
    "untied_stretched_rope": HFModel(
        22,
        {
            "vocab_size": 97,
            "num_hidden_layers": 3,
            "hidden_size": 78,
            "intermediate_size": 59,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "rope_parameters": _rope(500.0, **_STRETCHED),
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
    ),
    "tied_stretched_rope_heads_of_20": HFModel(
        33,
        {
            "vocab_size": 103,
            "num_hidden_layers": 3,
            "hidden_size": 66,
            "intermediate_size": 71,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 20,
            "rope_parameters": _rope(300.0, **_STRETCHED),
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": True,
        },
    ),
    "untied_heads_of_128": HFModel(
        44,
        {
            "vocab_size": 89,
            "num_hidden_layers": 2,
            "hidden_size": 39,
            "intermediate_size": 47,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 128,
            "rope_parameters": _rope(1000.0),
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
    ),
}

_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Head size and RoPE of released models, as their config.json has them; by preset.
LLAMA_ROPES: dict[str, dict[str, Any]] = {
    name: {
        "head_dim": head_dim,
        "max_position_embeddings": 131_072,
        "rope_parameters": _rope(500_000.0, factor=factor, **_LLAMA3),
    }
    for name, head_dim, factor in (
        ("llama3.2-1b", 64, 32.0),
        ("llama3.2-3b", 128, 32.0),
        ("llama3.1-8b", 128, 8.0),
    )
}
