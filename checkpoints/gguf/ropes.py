"""Rotary frequencies of a GGUF file, as the rope_scaling of a config.json.

What Llama 3.1 does to its frequencies is in no field: the file has a tensor of factors, one for
each frequency. They are found again from the rule that made them, and compared.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from checkpoints.gguf.metadata import Metadata
from checkpoints.gguf.names import ROPE_FACTORS
from checkpoints.gguf.tensors import GGUFTensor
from checkpoints.manifest import CheckpointError

__all__ = ["read_rope_scaling"]

# What all of Meta's models have, and where the context of pretraining is looked for.
_LOW, _HIGH = 1.0, 4.0
_CONTEXTS = (8192, *(2**k for k in range(4, 21)))
# Factors are float32, computed in another order.
_NEAR = 2e-6


def read_rope_scaling(
    metadata: Metadata, prefix: str, theta: float, head_dim: int, factors: GGUFTensor | None
) -> dict[str, Any] | None:
    """The rope_scaling of config.json; None where frequencies are as they are.

    Args:
        metadata: the fields.
        prefix: how those of the architecture begin, as in "llama.".
        theta: base of the frequencies.
        head_dim: H.
        factors: the tensor of factors, if the file has one.

    Raises:
        CheckpointError: they ask for what is not supported.
    """
    scaling = _of_fields(metadata, prefix)
    if factors is None:
        return scaling
    if scaling is not None:
        raise metadata.unsupported(f"{prefix}rope.scaling beside {ROPE_FACTORS}", scaling, "one")
    if factors.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{ROPE_FACTORS} of {metadata.file} has one factor for each of the {head_dim // 2} "
            f"frequencies; its shape is {list(factors.shape)}."
        )
    numbers = np.empty(factors.shape, np.float32)
    factors.read_into(numbers)
    return _of_factors(metadata, numbers.astype(np.float64), theta, head_dim)


def _of_fields(metadata: Metadata, prefix: str) -> dict[str, Any] | None:
    """What the fields say: "linear" or nothing."""
    kind = metadata.text(f"{prefix}rope.scaling.type")
    if kind not in (None, "none", "linear"):
        raise metadata.unsupported(f"{prefix}rope.scaling.type", kind, "none", "linear")
    old = metadata.number(f"{prefix}rope.scale_linear", "float", 1.0)  # in files of 2023
    factor = metadata.number(f"{prefix}rope.scaling.factor", "float", old)
    if kind == "none" or factor == 1:
        return None
    return {"rope_type": "linear", "factor": factor}


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
