"""Small random models of each family, as Hugging Face has them: settings, tensor names, tokens.

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
        settings: fields of the family's configuration class in transformers.
        family: its `model_type` there.
    """

    seed: int
    settings: dict[str, Any]
    family: str = "llama"

    @property
    def fed_first(self) -> int:
        """How many tokens are fed together, before the rest is fed step by step.

        Longer texts have other frequencies in LongRoPE: keys from before would be of both kinds.
        """
        original = self.settings.get("original_max_position_embeddings")
        return 1 if original is None or original > 29 else original + 1

    @property
    def is_gemma(self) -> bool:
        """Whether it is of a family that adds 1 to the weights of its norms."""
        return self.family.startswith("gemma")

    @property
    def is_olmo(self) -> bool:
        """Whether it is of a family that norms after the blocks alone, and whole projections."""
        return self.family in ("olmo2", "olmo3")

    def weights(self) -> dict[str, np.ndarray]:
        """Weights by Hugging Face name, float32, each of them exact in bfloat16.

        The same numbers everywhere: numpy promises the raw stream of a bit generator, not
        those of its distributions. A weight is an 8-bit integer times a power of two, which
        bfloat16's 8 bits of significand hold.
        """
        s = self.settings
        width, inner, vocab = s["hidden_size"], s["intermediate_size"], s["vocab_size"]
        heads, kv_heads = s["num_attention_heads"], s["num_key_value_heads"]
        size = s.get("head_dim", width // heads)
        queries, kvs = heads * size, kv_heads * size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
        for i in range(s["num_hidden_layers"]):
            layer: dict[str, tuple[int, ...]] = {
                "input_layernorm.weight": (width,),
                "self_attn.q_proj.weight": (queries, width),
                "self_attn.k_proj.weight": (kvs, width),
                "self_attn.v_proj.weight": (kvs, width),
                "self_attn.o_proj.weight": (width, queries),
                "post_attention_layernorm.weight": (width,),
                "mlp.gate_proj.weight": (inner, width),
                "mlp.up_proj.weight": (inner, width),
                "mlp.down_proj.weight": (width, inner),
            }
            if self.family == "phi3":
                layer = {
                    "self_attn.qkv_proj.weight": (queries + 2 * kvs, width),
                    "self_attn.o_proj.weight": (width, queries),
                    "mlp.gate_up_proj.weight": (2 * inner, width),
                    "mlp.down_proj.weight": (width, inner),
                    "input_layernorm.weight": (width,),
                    "post_attention_layernorm.weight": (width,),
                }
            if self.family == "qwen2" or s.get("attention_bias"):
                for name, out in (("q", queries), ("k", kvs), ("v", kvs)):
                    layer[f"self_attn.{name}_proj.bias"] = (out,)
            if s.get("attention_bias"):
                layer["self_attn.o_proj.bias"] = (width,)
            if s.get("mlp_bias"):
                for name, out in (("gate", inner), ("up", inner), ("down", width)):
                    layer[f"mlp.{name}_proj.bias"] = (out,)
            if self.family in ("qwen3", "olmo2", "olmo3", "gemma3_text"):
                full = self.is_olmo
                layer["self_attn.q_norm.weight"] = (queries if full else size,)
                layer["self_attn.k_norm.weight"] = (kvs if full else size,)
            if self.is_olmo:
                del layer["input_layernorm.weight"]
            if self.is_gemma:
                layer["pre_feedforward_layernorm.weight"] = (width,)
            if self.is_gemma or self.is_olmo:
                layer["post_feedforward_layernorm.weight"] = (width,)
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (width,)
        if not s["tie_word_embeddings"]:
            shapes["lm_head.weight"] = (vocab, width)
        stream = np.random.PCG64(self.seed)
        return {name: self._weight(stream, name, shape) for name, shape in shapes.items()}

    def _weight(self, stream: np.random.PCG64, name: str, shape: tuple[int, ...]) -> np.ndarray:
        raw = stream.random_raw(math.prod(shape)) >> np.uint64(56)
        integers = raw.astype(np.float32).reshape(shape) - 128  # -128 to 127
        if name.endswith(".bias"):
            return integers / 128
        if len(shape) == 1:  # a norm's: 0.5 to 1.5, in steps of 1/128, less what is added to it
            return (0 if self.is_gemma else 1) + np.trunc(integers / 2) / 128
        if name == "model.embed_tokens.weight":
            # As large as what a layer adds: the families that multiply it have a smaller one.
            return integers / (512 if self.is_gemma or self.family == "granite" else 64)
        # The power of two that brings the deviation of 74 nearest to 1/sqrt(in).
        return integers * np.float32(2.0 ** -round(math.log2(74 * math.sqrt(shape[1]))))

    def tokens(self, batch: int = 2, count: int = 29) -> np.ndarray:
        """Token ids, int32 `[B, T]`."""
        raw = np.random.PCG64(self.seed + 1).random_raw(batch * count)
        ids = (raw >> np.uint64(32)) % np.uint64(self.settings["vocab_size"])
        return ids.astype(np.int32).reshape(batch, count)


def _rope(theta: float, **scaling) -> dict[str, Any]:
    return {"rope_type": "llama3" if scaling else "default", "rope_theta": theta, **scaling}


def _two_ropes(everywhere: dict[str, Any], nearby: dict[str, Any]) -> dict[str, Any]:
    return {"full_attention": everywhere, "sliding_attention": nearby}


def _every(period: int, layers: int) -> list[str]:
    """Local layers, of which every `period`-th sees everything."""
    kinds = ("full_attention", "sliding_attention")
    return [kinds[(i + 1) % period != 0] for i in range(layers)]


# Of 29 positions: some wavelengths are shorter than 8, some longer than 32, some between.
_STRETCHED = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# Sizes share as few factors as transformers allows: hidden_size is a multiple of the heads, in
# many families their size times their number. Windows are shorter than the 29 tokens, caps
# smaller than what they hold back, scales far from 1: what is left out shows.
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
    "mistral": HFModel(
        55,
        {
            "vocab_size": 83,
            "num_hidden_layers": 3,
            "hidden_size": 67,
            "intermediate_size": 61,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 22,
            "rope_parameters": _rope(500.0),
            "rms_norm_eps": 1e-2,
            "sliding_window": 7,
            "tie_word_embeddings": False,
        },
        "mistral",
    ),
    "qwen2": HFModel(
        66,
        {
            "vocab_size": 107,
            "num_hidden_layers": 3,
            "hidden_size": 78,
            "intermediate_size": 53,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "rope_parameters": _rope(700.0),
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": True,
        },
        "qwen2",
    ),
    # The layers from the second on are local.
    "qwen2_window": HFModel(
        77,
        {
            "vocab_size": 79,
            "num_hidden_layers": 3,
            "hidden_size": 70,
            "intermediate_size": 43,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "rope_parameters": _rope(10_000.0),
            "rms_norm_eps": 1e-3,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "tie_word_embeddings": False,
        },
        "qwen2",
    ),
    "qwen3": HFModel(
        88,
        {
            "vocab_size": 109,
            "num_hidden_layers": 3,
            "hidden_size": 73,
            "intermediate_size": 59,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 26,
            "rope_parameters": _rope(900.0),
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": True,
        },
        "qwen3",
    ),
    "olmo2": HFModel(
        99,
        {
            "vocab_size": 97,
            "num_hidden_layers": 3,
            "hidden_size": 84,
            "intermediate_size": 67,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "rope_parameters": _rope(500.0),
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": False,
        },
        "olmo2",
    ),
    "granite": HFModel(
        110,
        {
            "vocab_size": 103,
            "num_hidden_layers": 3,
            "hidden_size": 66,
            "intermediate_size": 47,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "rope_parameters": _rope(1000.0),
            "rms_norm_eps": 1e-2,
            "embedding_multiplier": 6.5,
            "residual_multiplier": 0.37,
            "attention_multiplier": 0.55,  # 1/sqrt(22) is 0.21
            "logits_scaling": 5.0,
            "tie_word_embeddings": True,
        },
        "granite",
    ),
    "gemma2": HFModel(
        121,
        {
            "vocab_size": 101,
            "num_hidden_layers": 3,
            "hidden_size": 74,
            "intermediate_size": 53,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 22,
            "rope_parameters": _rope(500.0),
            "rms_norm_eps": 1e-2,
            "query_pre_attn_scalar": 7,
            "sliding_window": 6,  # in the first and the third layer
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
            "tie_word_embeddings": True,
        },
        "gemma2",
    ),
    # As the 1B model: two bases, no stretching.
    "gemma3": HFModel(
        132,
        {
            "vocab_size": 89,
            "num_hidden_layers": 4,
            "hidden_size": 69,
            "intermediate_size": 61,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 26,
            "rope_parameters": _two_ropes(_rope(5000.0), _rope(50.0)),
            "rms_norm_eps": 1e-2,
            "query_pre_attn_scalar": 15,
            "sliding_window": 5,
            "layer_types": _every(3, 4),
            "tie_word_embeddings": True,
        },
        "gemma3_text",
    ),
    # As the larger ones: the global layers' waves are four times as long.
    "gemma3_stretched_rope": HFModel(
        143,
        {
            "vocab_size": 71,
            "num_hidden_layers": 3,
            "hidden_size": 62,
            "intermediate_size": 59,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 34,
            "rope_parameters": _two_ropes(
                {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0}, _rope(100.0)
            ),
            "rms_norm_eps": 1e-3,
            "query_pre_attn_scalar": 23,
            "sliding_window": 8,
            "layer_types": _every(2, 3),
            "tie_word_embeddings": True,
        },
        "gemma3_text",
    ),
    # As Phi 4 mini: 16 of the 22 elements of a head are rotated. Its texts fit the original
    # context.
    "phi3": HFModel(
        154,
        {
            "vocab_size": 83,
            "num_hidden_layers": 3,
            "hidden_size": 66,
            "intermediate_size": 47,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0],
                "long_factor": [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0],
            },
            "rms_norm_eps": 1e-2,
            "sliding_window": 7,
            "tie_word_embeddings": True,
            "pad_token_id": None,
        },
        "phi3",
    ),
    # As Phi 3.5: beyond the original context.
    "phi3_long": HFModel(
        165,
        {
            "vocab_size": 73,
            "num_hidden_layers": 3,
            "hidden_size": 40,
            "intermediate_size": 43,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32,
            "original_max_position_embeddings": 8,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 300.0,
                "partial_rotary_factor": 1.0,
                "short_factor": [9.0, 7.0, 5.0, 3.0, 1.0],
                "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0],
            },
            "rms_norm_eps": 1e-2,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "pad_token_id": None,
        },
        "phi3",
    ),
    # Every third layer knows no positions.
    "smollm3": HFModel(
        176,
        {
            "vocab_size": 61,
            "num_hidden_layers": 7,
            "hidden_size": 44,
            "intermediate_size": 37,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": _rope(500.0),
            "rms_norm_eps": 1e-2,
            "no_rope_layer_interval": 3,
            "tie_word_embeddings": True,
            "pad_token_id": None,
        },
        "smollm3",
    ),
    # Layers are named one by one, and those that do not rotate are local.
    "smollm3_window": HFModel(
        187,
        {
            "vocab_size": 59,
            "num_hidden_layers": 6,
            "hidden_size": 42,
            "intermediate_size": 31,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "rope_parameters": _rope(300.0),
            "rms_norm_eps": 1e-2,
            "no_rope_layers": [1, 0, 1, 1, 0, 0],
            "use_sliding_window": True,
            "sliding_window": 6,
            "tie_word_embeddings": False,
            "pad_token_id": None,
        },
        "smollm3",
    ),
    # Every fourth layer sees everything, and has waves by YaRN.
    "olmo3": HFModel(
        198,
        {
            "vocab_size": 67,
            "num_hidden_layers": 6,
            "hidden_size": 60,
            "intermediate_size": 41,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "max_position_embeddings": 256,
            "rope_parameters": _two_ropes(
                {
                    "rope_type": "yarn",
                    "rope_theta": 500_000.0,
                    "factor": 6.0,
                    "original_max_position_embeddings": 32,
                    "beta_fast": 4.0,
                    "attention_factor": 1.4,
                },
                _rope(500_000.0),
            ),
            "rms_norm_eps": 1e-2,
            "sliding_window": 6,
            "tie_word_embeddings": False,
        },
        "olmo3",
    ),
    # The factor of cosines and sines follows from the waves' and two weights.
    "yarn": HFModel(
        209,
        {
            "vocab_size": 71,
            "num_hidden_layers": 3,
            "hidden_size": 54,
            "intermediate_size": 43,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 18,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 40.0,
                "factor": 16.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 3.0,
                "beta_slow": 0.75,
                "mscale": 2.0,
                "mscale_all_dim": 0.5,
                "truncate": False,
            },
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": True,
        },
    ),
    # As released Qwen 3 models are stretched.
    "qwen3_yarn": HFModel(
        220,
        {
            "vocab_size": 61,
            "num_hidden_layers": 3,
            "hidden_size": 47,
            "intermediate_size": 37,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 20,
            "max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 30.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": False,
        },
        "qwen3",
    ),
    # As Granite's models of code, which are Llamas.
    "biases": HFModel(
        242,
        {
            "vocab_size": 59,
            "num_hidden_layers": 3,
            "hidden_size": 45,
            "intermediate_size": 37,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 14,
            "rope_parameters": _rope(300.0),
            "rms_norm_eps": 1e-2,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    # Its frequencies change beyond 29 tokens.
    "dynamic": HFModel(
        231,
        {
            "vocab_size": 53,
            "num_hidden_layers": 2,
            "hidden_size": 38,
            "intermediate_size": 31,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 18,
            "max_position_embeddings": 29,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 300.0, "factor": 4.0},
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": True,
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
