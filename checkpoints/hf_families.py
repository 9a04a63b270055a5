"""What Hugging Face's config.json says in each family: data for `hf_config`.

Read from the configuration classes of transformers 5 (`configuration_*.py`), which take the
place of those of version 4 and read what they wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["ACTIVATIONS", "FAMILIES", "NESTED", "NUMBERS", "Family", "Number"]


def _same(value: Any) -> Any:
    return value


class Number(NamedTuple):
    """A number of config.json that is a field of ours.

    Attributes:
        theirs: its name there.
        ours: the field of `ModelConfig`.
        kind: what it must be: "int", "float", or "float?" where null means none.
        read: theirs to ours.
        write: ours to theirs.
    """

    theirs: str
    ours: str
    kind: str
    read: Callable[[Any], Any] = _same
    write: Callable[[Any], Any] = _same

    def theirs_of(self, value: Any) -> Any:
        """Our value as theirs; what is computed loses the last digits' rounding."""
        if value is None or self.write is _same:
            return value
        rounded = float(f"{self.write(value):.12g}")  # 8.000000000000002 is 8
        return int(rounded) if rounded.is_integer() else rounded


class Family(NamedTuple):
    """How a family's config.json becomes a `ModelConfig`, and back.

    Attributes:
        architecture: what `architectures` lists.
        model_type: what `model_type` says.
        defaults: what transformers assumes where config.json is silent.
        ours: fields of `ModelConfig` that the family alone decides.
        numbers: numbers that only this family has.
        activation: the name of the field that names the activation.
        windows: which layers are local: "never"; "always", where there is a window; "from", all
            after the first `max_window_layers`, where `use_sliding_window`; "pattern", all
            but every so many-th; "unrotated", those that do not rotate, where
            `use_sliding_window`.
        reads_pattern: whether transformers reads sliding_window_pattern; Gemma 2's is fixed.
        scales_embedding: whether the embedding is multiplied by sqrt(D).
        local_rope: how local layers rotate: "" as all do; "own", by a base of their own; "plain",
            by the base of all, not stretched.
        partial_rope: whether a part of each head may rotate; then the types of RoPE are those that
            transformers has for Phi 3.
        names_unrotated: whether `no_rope_layers` says which layers do not rotate.
        says_biases: whether `attention_bias` and `mlp_bias` say what has a bias.
    """

    architecture: str
    model_type: str
    defaults: dict[str, Any]
    ours: dict[str, Any] = {}  # noqa: RUF012 - a constant like the whole table
    numbers: tuple[Number, ...] = ()
    activation: str = "hidden_act"
    windows: str = "never"
    reads_pattern: bool = False
    scales_embedding: bool = False
    local_rope: str = ""
    partial_rope: bool = False
    names_unrotated: bool = False
    says_biases: bool = False


# Their names and ours.
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,  # as many as there are query heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}

_WINDOW = {"sliding_window": 4096}

_QWEN_WINDOW = {"use_sliding_window": False, "max_window_layers": 28, **_WINDOW}

_GEMMA_DEFAULTS: dict[str, Any] = {
    **_DEFAULTS,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    **_WINDOW,
}

_GEMMA_OURS = {"norm_offset": 1.0, "post_norm": True}

_QUERY_SCALE = Number(
    "query_pre_attn_scalar", "attn_scale", "float", lambda x: x**-0.5, lambda x: x**-2
)

_LOGIT_SOFTCAP = Number("final_logit_softcapping", "logit_softcap", "float?")

# What every family has, by the names of both sides.
NUMBERS = (
    Number("vocab_size", "vocab_size", "int"),
    Number("num_hidden_layers", "num_layers", "int"),
    Number("hidden_size", "model_dim", "int"),
    Number("intermediate_size", "ffw_dim", "int"),
    Number("num_attention_heads", "num_heads", "int"),
    Number("rms_norm_eps", "norm_eps", "float"),
    Number("max_position_embeddings", "max_context", "int"),
)

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "llama", _DEFAULTS, says_biases=True),
    "mistral": Family(
        "MistralForCausalLM",
        "mistral",
        {
            **_DEFAULTS,
            **_WINDOW,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
        },
        windows="always",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "qwen2",
        {**_DEFAULTS, **_QWEN_WINDOW, "max_position_embeddings": 32_768},
        {"qkv_bias": True},
        windows="from",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "qwen3",
        {**_DEFAULTS, **_QWEN_WINDOW, "head_dim": 128, "max_position_embeddings": 32_768},
        {"qk_norm": "head"},
        windows="from",
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        "olmo2",
        {**_DEFAULTS, "rms_norm_eps": 1e-5},
        {"qk_norm": "full", "pre_norm": False, "post_norm": True},
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        "olmo3",
        {
            **_DEFAULTS,
            "vocab_size": 50_304,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            **_WINDOW,
            "sliding_window_pattern": 4,
        },
        {"qk_norm": "full", "pre_norm": False, "post_norm": True},
        windows="pattern",
        local_rope="plain",
    ),
    "granite": Family(
        "GraniteForCausalLM",
        "granite",
        {
            **_DEFAULTS,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        numbers=(
            Number("embedding_multiplier", "embed_scale", "float"),
            Number("residual_multiplier", "residual_scale", "float"),
            Number("attention_multiplier", "attn_scale", "float"),
            # It divides; ours multiplies.
            Number("logits_scaling", "logit_scale", "float", lambda x: 1 / x, lambda x: 1 / x),
        ),
        says_biases=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "gemma2",
        {
            **_GEMMA_DEFAULTS,
            "vocab_size": 256_000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
        _GEMMA_OURS,
        numbers=(
            _QUERY_SCALE,
            _LOGIT_SOFTCAP,
            Number("attn_logit_softcapping", "attn_softcap", "float?"),
        ),
        activation="hidden_activation",
        windows="pattern",
        scales_embedding=True,
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        {
            **_GEMMA_DEFAULTS,
            "vocab_size": 262_208,
            "max_position_embeddings": 131_072,
            "final_logit_softcapping": None,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        {**_GEMMA_OURS, "qk_norm": "head"},
        numbers=(_QUERY_SCALE, _LOGIT_SOFTCAP),
        activation="hidden_activation",
        windows="pattern",
        reads_pattern=True,
        scales_embedding=True,
        local_rope="own",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        "phi3",
        {
            **_DEFAULTS,
            "vocab_size": 32_064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
        },
        windows="always",
        partial_rope=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        {
            **_DEFAULTS,
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 11_008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
        },
        windows="unrotated",
        names_unrotated=True,
        says_biases=True,
    ),
}

# Architectures that hold a model of a family within another: the family, where its fields are,
# and the fields of the other that it has no use for.
NESTED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "Gemma3ForConditionalGeneration": (
        "gemma3",
        "text_config",
        (
            "vision_config",
            "mm_tokens_per_image",
            "boi_token_index",
            "eoi_token_index",
            "image_token_index",
            "boi_token_id",
            "eoi_token_id",
            "image_token_id",
        ),
    ),
}
