"""The metadata of a GGUF file as the config.json of the same model.

Every field of the architecture is read, known to change no number, or refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from checkpoints.gguf.header import Header
from checkpoints.gguf.metadata import Metadata
from checkpoints.gguf.names import ROPE_FACTORS
from checkpoints.gguf.ropes import read_long_rope, read_rope_scaling, two_ropes
from checkpoints.gguf.windows import read_windows
from checkpoints.hf_families import FAMILIES
from checkpoints.manifest import CheckpointError

__all__ = ["ARCHITECTURES", "INTERLEAVED", "config_json"]

# GGUF's architectures that are families of ours. Mistral's files are called llama, OLMo 3's olmo2.
ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "olmo2", "granite", "gemma2", "gemma3"),
    *("phi3", "smollm3"),
)
# Those whose rows of queries and keys are in another order.
INTERLEAVED = ("llama", "granite", "smollm3")
# What has a window that the architecture has not by itself is another family.
_WITH_WINDOW = {"llama": "mistral", "olmo2": "olmo3"}

# Layers by which the largest models of a family are known: their queries have another scale.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}

_GEMMA3_THETA = 1_000_000.0

# Fields without a part in what is computed, whatever they say.
_HARMLESS = (
    *("vocab_size", "tensor_data_layout", "pooling_type", "n_deepstack_layers"),
    *("rope.scaling.finetuned", "rope.scaling.original_context_length"),
    *("expert_used_count", "leading_dense_block_count"),
)
# Those that change nothing where they have this value.
_NEUTRAL = {
    "attention.causal": True,
    "use_parallel_residual": False,
    "expert_count": 0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "rope.scaling.attn_factor": 1.0,
}


def config_json(header: Header, ignored: Collection[str] = ()) -> tuple[str, dict[str, Any]]:
    """The architecture as GGUF calls it, and the config.json.

    Args:
        header: of the file.
        ignored: names of fields to leave out, for who knows that they change nothing.

    Raises:
        CheckpointError: the file holds no model of a family that is supported; or it asks for
            what is not supported, or lacks a field.
    """
    arch = _architecture(header)
    metadata = Metadata(header)
    tensors = {tensor.name: tensor for tensor in header.tensors}
    embed = tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        raise CheckpointError(
            f"A model has an embedding, token_embd.weight; {header.file} has none. Take "
            "the file of the whole model."
        )
    prefix = f"{arch}."
    layers = metadata.number(f"{prefix}block_count", "int")
    if layers > len(tensors):  # a damaged number, for which lists would be made
        raise CheckpointError(
            f"{prefix}block_count of {header.file} is {layers}, and the file has {len(tensors)} "
            "tensors. Download or copy it again."
        )
    windows = read_windows(metadata, arch, layers)
    family = FAMILIES[_WITH_WINDOW.get(arch, arch) if windows else arch]
    width = metadata.number(f"{prefix}embedding_length", "int")
    heads = metadata.number(f"{prefix}attention.head_count", "int")
    head_dim = _head_dim(metadata, prefix, width, heads)
    theta = metadata.number(
        f"{prefix}rope.freq_base", "float", _GEMMA3_THETA if arch == "gemma3" else 10_000.0
    )
    context = metadata.number(f"{prefix}context_length", "int")
    if arch == "phi3":
        ropes = read_long_rope(metadata, theta, head_dim, context, tensors)
    else:
        factors = tensors.get(ROPE_FACTORS)
        scaling = read_rope_scaling(metadata, prefix, theta, head_dim, context, factors)
        ropes = {"rope_theta": theta, "rope_scaling": scaling}
        if family.local_rope == "plain":  # of OLMo 3's layers, those without a window alone
            ropes = two_ropes(metadata, prefix, theta, scaling)
    data: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": embed.shape[0],
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": metadata.number(f"{prefix}feed_forward_length", "int"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.number(f"{prefix}attention.head_count_kv", "int", heads),
        "head_dim": head_dim,
        family.activation: family.defaults[family.activation],
        "rms_norm_eps": metadata.number(f"{prefix}attention.layer_norm_rms_epsilon", "float"),
        "max_position_embeddings": context,
        "tie_word_embeddings": "output.weight" not in tensors,
        **ropes,
        **windows,
        **_own(metadata, arch, width, heads, head_dim, layers),
    }
    _check_ignored(metadata, prefix, ignored)
    _refuse_the_rest(metadata, prefix, ignored)
    return arch, data


def _architecture(header: Header) -> str:
    """The architecture, one that is supported."""
    arch, kind = (header.fields.get(f"general.{name}") for name in ("architecture", "type"))
    if kind not in (None, "model"):
        raise CheckpointError(
            f"A GGUF file is read where it holds a model; {header.file} holds something else "
            f"(general.type {json.dumps(kind)}). Take the file of the model itself."
        )
    if arch not in ARCHITECTURES:
        raise CheckpointError(
            f"The architecture {arch} is not supported; supported: {', '.join(ARCHITECTURES)}. "
            f"The metadata of {header.file} asks for it."
        )
    return arch


def _head_dim(metadata: Metadata, prefix: str, width: int, heads: int) -> int:
    """H; the same for values, and all of it turned by RoPE, but of Phi 3."""
    name = f"{prefix}attention.key_length"
    if metadata.get(name) is None and width % heads:
        raise CheckpointError(
            f"The metadata of {metadata.file} gives no {name}, and a width of {width} does not "
            f"divide among {heads} heads."
        )
    size = metadata.number(name, "int", width // heads)
    others = ["attention.value_length", "attention.key_length_swa", "attention.value_length_swa"]
    if prefix != "phi3.":
        others += ["rope.dimension_count", "rope.dimension_count_swa"]
    for other in others:
        if (found := metadata.number(prefix + other, "int", size)) != size:
            raise metadata.unsupported(prefix + other, found, f"{size}, the size of a head")
    return size


def _own(
    metadata: Metadata, arch: str, width: int, heads: int, head_dim: int, layers: int
) -> dict[str, Any]:
    """Fields that only some families have."""

    def number(name: str, default: float) -> float:
        return metadata.number(f"{arch}.{name}", "float", default)

    if arch == "granite":
        return {
            "attention_multiplier": number("attention.scale", head_dim**-0.5),
            "embedding_multiplier": number("embedding_scale", 1.0),
            "residual_multiplier": number("residual_scale", 1.0),
            "logits_scaling": number("logit_scale", 1.0),
        }
    if arch not in ("gemma2", "gemma3"):
        return {}
    by_width = layers == _SCALED_BY_WIDTH[arch]
    share = float(width // heads if by_width else head_dim)
    if metadata.get(f"{arch}.attention.scale") is not None:
        share = float(f"{number('attention.scale', 1.0) ** -2:.6g}")
    data: dict[str, Any] = {"query_pre_attn_scalar": int(share) if share.is_integer() else share}
    cap = f"{arch}.final_logit_softcapping"
    if arch == "gemma2":
        data["final_logit_softcapping"] = metadata.number(cap, "float", 30.0)
        data["attn_logit_softcapping"] = number("attn_logit_softcapping", 50.0)
    else:
        data["final_logit_softcapping"] = (
            metadata.number(cap, "float") if metadata.get(cap) else None
        )
        data["rope_local_base_freq"] = number("rope.freq_base_swa", 10_000.0)
    return data


def _check_ignored(metadata: Metadata, prefix: str, ignored: Collection[str]) -> None:
    """Whether the fields to be ignored are there, and none of them is understood."""
    if isinstance(ignored, str):
        raise TypeError(
            f"ignore_fields is a sequence of names, as ({ignored!r},); got {ignored!r}."
        )
    theirs = {name for name in metadata.fields if name.startswith(prefix)}
    if absent := sorted(set(ignored) - theirs):
        raise CheckpointError(
            f"Fields to be ignored are those of the metadata that begin with {prefix}, each named "
            f"by itself; {metadata.file} has no {', '.join(map(repr, absent))}. Leave it out, or "
            "correct its name."
        )
    if known := sorted(set(ignored) - metadata.left(prefix).keys()):
        raise CheckpointError(
            f"A field that is understood cannot be ignored, for it says what the model is: "
            f"{', '.join(known)} of {metadata.file}. Leave it as it is."
        )


def _refuse_the_rest(metadata: Metadata, prefix: str, ignored: Collection[str]) -> None:
    """Refuses fields of the architecture for which nobody has asked."""
    refused = [
        name
        for name, value in metadata.left(prefix).items()
        if name not in ignored and not _changes_nothing(name.removeprefix(prefix), value)
    ]
    if refused:
        raise metadata.unsupported(
            refused[0],
            metadata.fields[refused[0]],
            "files without it, as it may change what the model computes (where you know that it "
            f"does not: --ignore-field {refused[0]}, in Python ignore_fields)",
        )


def _changes_nothing(name: str, value: Any) -> bool:
    return name in _HARMLESS or (name in _NEUTRAL and value == _NEUTRAL[name])
