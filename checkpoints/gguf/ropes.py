"""Rotary frequencies of a GGUF file, as the rotary fields of a config.json.

What Llama 3.1 does to its frequencies is in no field: the file has a tensor of factors, one for
each frequency. They are found again from the rule that made them, and compared. LongRoPE has two
such tensors. YaRN has fields; what they mean is what llama.cpp's `ggml_rope_yarn` makes of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints.gguf.metadata import Metadata
from checkpoints.gguf.names import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS
from checkpoints.gguf.tensors import GGUFTensor
from checkpoints.hf_rope import growth_of_long, growth_of_yarn, part_of_head
from checkpoints.manifest import CheckpointError

__all__ = ["read_long_rope", "read_rope_scaling", "two_ropes"]

# What all of Meta's models have, and where the context of pretraining is looked for.
_LOW, _HIGH = 1.0, 4.0
_CONTEXTS = (8192, *(2**k for k in range(4, 21)))
# Factors are float32, computed in another order.
_NEAR = 2e-6


def read_rope_scaling(
    metadata: Metadata,
    prefix: str,
    theta: float,
    head_dim: int,
    context: int,
    factors: GGUFTensor | None,
) -> dict[str, Any] | None:
    """The rope_scaling of config.json; None where frequencies are as they are.

    Args:
        metadata: the fields.
        prefix: how those of the architecture begin, as in "llama.".
        theta: base of the frequencies.
        head_dim: H.
        context: the model's positions.
        factors: the tensor of factors, if the file has one.

    Raises:
        CheckpointError: they ask for what is not supported.
    """
    scaling = _of_fields(metadata, prefix, context)
    if factors is None:
        return scaling
    if scaling is not None:
        raise metadata.unsupported(f"{prefix}rope.scaling beside {ROPE_FACTORS}", scaling, "one")
    numbers = _numbers(metadata, factors, head_dim // 2)
    return _of_factors(metadata, numbers.astype(np.float64), theta, head_dim)


def _numbers(metadata: Metadata, factors: GGUFTensor, pairs: int) -> np.ndarray:
    """A tensor's factors, float32, one for each frequency."""
    if factors.shape != (pairs,):
        raise CheckpointError(
            f"{factors.name} of {metadata.file} has one factor for each of the {pairs} "
            f"frequencies; its shape is {list(factors.shape)}."
        )
    numbers = np.empty(factors.shape, np.float32)
    factors.read_into(numbers)
    return numbers


def _of_fields(metadata: Metadata, prefix: str, context: int) -> dict[str, Any] | None:
    """What the fields say: "linear", "yarn" or nothing."""
    kind = metadata.text(f"{prefix}rope.scaling.type")
    if kind not in (None, "none", "linear", "yarn"):
        raise metadata.unsupported(f"{prefix}rope.scaling.type", kind, "none", "linear", "yarn")
    old = metadata.number(f"{prefix}rope.scale_linear", "float", 1.0)  # in files of 2023
    factor = metadata.number(f"{prefix}rope.scaling.factor", "float", old)
    if kind == "none" or factor == 1:
        return None
    if kind == "yarn":
        return _yarn(metadata, f"{prefix}rope.scaling.", factor, context)
    return {"rope_type": "linear", "factor": factor}


def _yarn(metadata: Metadata, prefix: str, factor: float, context: int) -> dict[str, Any]:
    """YaRN's table.

    llama.cpp multiplies cosines and sines by 1 + 0.1 ln(factor) whatever the fields say, and by
    `attn_factor` beside it. Files have Hugging Face's attention_factor as `yarn_attn_factor`; where
    that is another number, the two disagree.
    """

    def number(name: str, default: float) -> float:
        return metadata.number(prefix + name, "float", default)

    usual = growth_of_yarn(factor)
    if not math.isclose(said := number("yarn_attn_factor", usual), usual, rel_tol=_NEAR):
        raise metadata.unsupported(f"{prefix}yarn_attn_factor", said, f"{usual:.6g}, the usual one")
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata.number(
            f"{prefix}original_context_length", "int", context
        ),
        "beta_fast": number("yarn_beta_fast", 32.0),
        "beta_slow": number("yarn_beta_slow", 1.0),
        "attention_factor": usual * number("attn_factor", 1.0),
    }


def two_ropes(
    metadata: Metadata, prefix: str, theta: float, scaling: dict[str, Any] | None
) -> dict[str, Any]:
    """The rotary fields of a family whose layers with a window have plain frequencies.

    Args:
        metadata: the fields.
        prefix: how those of the architecture begin.
        theta: base of the frequencies of the others.
        scaling: what stretches these.
    """
    near = metadata.number(f"{prefix}rope.freq_base_swa", "float", theta)
    return {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", **(scaling or {}), "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": near},
        }
    }


def read_long_rope(
    metadata: Metadata, theta: float, head_dim: int, context: int, tensors: Mapping[str, GGUFTensor]
) -> dict[str, Any]:
    """The rotary fields of Phi 3: a part of a head, and LongRoPE where the file has its factors.

    Args:
        metadata: the fields.
        theta: base of the frequencies.
        head_dim: H.
        context: the model's positions.
        tensors: the file's, by name.

    Raises:
        CheckpointError: they ask for what is not supported.
    """
    rotated = metadata.number("phi3.rope.dimension_count", "int", head_dim)
    if rotated > head_dim or rotated % 2:
        raise metadata.unsupported(
            "phi3.rope.dimension_count", rotated, f"an even number up to {head_dim}"
        )
    scaling = "phi3.rope.scaling."
    original = metadata.number(f"{scaling}original_context_length", "int", context)
    data: dict[str, Any] = {
        "rope_theta": theta,
        "rope_scaling": None,
        "partial_rotary_factor": part_of_head(rotated, head_dim),
        "original_max_position_embeddings": original,
    }
    short, long = tensors.get(SHORT_FACTORS), tensors.get(LONG_FACTORS)
    if (kind := metadata.text(f"{scaling}type")) not in (None, "none", "longrope"):
        raise metadata.unsupported(f"{scaling}type", kind, "none", "longrope")
    if short is None and long is None:
        return data
    if short is None or long is None:
        absent = SHORT_FACTORS if short is None else LONG_FACTORS
        raise CheckpointError(
            f"LongRoPE has two tensors of factors; {metadata.file} has no {absent}. Download or "
            "copy it again."
        )
    each = {"short_factor": short, "long_factor": long}
    table: dict[str, Any] = {
        "type": "longrope",
        **{name: _numbers(metadata, of, rotated // 2).tolist() for name, of in each.items()},
    }
    growth = metadata.number(f"{scaling}attn_factor", "float", 1.0)
    usual = growth_of_long(context / original, original)
    if not math.isclose(growth, usual, rel_tol=_NEAR):  # else as Hugging Face says it: not at all
        table["attention_factor"] = growth
    data["rope_scaling"] = table
    return data


def _of_factors(
    metadata: Metadata, factors: np.ndarray, theta: float, head_dim: int
) -> dict[str, Any] | None:
    """The rule that gives these factors."""
    if np.all(factors == 1):
        return None
    largest = float(factors.max())
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    for context in _CONTEXTS:
        rule = _llama3(waves, largest, context)
        if np.allclose(factors, rule, rtol=_NEAR, atol=0):
            return {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": context,
            }
    raise CheckpointError(
        f"{ROPE_FACTORS} of {metadata.file} has factors of another rule than that of Llama 3.1 "
        f"(low_freq_factor {_LOW}, high_freq_factor {_HIGH}): {factors[0]:g} to {factors[-1]:g}. "
        "Only these are supported: take the model from Hugging Face in place of the file."
    )


def _llama3(waves: np.ndarray, factor: float, context: int) -> np.ndarray:
    """What a frequency is divided by, for each wavelength in positions."""
    # How many waves the context of pretraining holds: few are stretched, many are not.
    part = np.clip((context / waves - _LOW) / (_HIGH - _LOW), 0, 1)
    return 1 / ((1 - part) / factor + part)
