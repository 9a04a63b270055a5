"""Models to quantize, and what integers and scales stand for, in numpy and bit by bit."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from decode_cases import small_config
from flax import nnx
from reference_cases import random_model

from ffjax.config import ModelConfig
from ffjax.formats import INT8, WeightFormat, WeightFormats, int4
from ffjax.model import Transformer

__all__ = [
    "FORMATS",
    "FOR_KERNELS",
    "GROUPED",
    "INT8_GROUPS",
    "MIXED",
    "by_hand",
    "kernel_config",
    "model_to_quantize",
    "named_arrays",
    "nbytes",
    "numbers_of",
]

# Inputs of 96, 192 and 160: whole groups of 32 and no powers of two; rows and vocabulary are
# no multiples of anything.
_SIZES = (("model_dim", 96), ("ffw_dim", 160), ("head_dim", 32), ("vocab_size", 101))

# Every way a matrix can be stored, and one left as it is.
MIXED = WeightFormats(qkv=int4(32), attn_out=int4(64), gate_up=None, down=INT8, head=int4(32))
FORMATS = {
    "int8": WeightFormats.of_layers(INT8),
    "int8 and its head": WeightFormats.of_layers(INT8, INT8),
    "int4": WeightFormats.of_layers(int4(32)),
    "mixed": MIXED,
}

# What the fused kernel reads: each matrix in every format of some model, and two of them
# as they are.
FOR_KERNELS = {
    "int8": WeightFormats.of_layers(INT8),
    "int8 and its head": WeightFormats.of_layers(INT8, INT8),
    "int4": WeightFormats.of_layers(int4()),
    "int4 and its head": WeightFormats.of_layers(int4(), int4()),
    "mixed": WeightFormats(qkv=int4(), attn_out=INT8, down=int4(), head=INT8),
    "mixed otherwise": WeightFormats(qkv=INT8, attn_out=int4(), gate_up=int4(), head=int4()),
}

# What files have besides: 16-bit scales of another dtype, smaller groups, offsets, int8 in groups.
# Each kind is once multiplied by the residual, by attention's output and by hidden activations.
INT8_GROUPS = WeightFormat(bits=8, group_size=32, scale_dtype="float16")
GROUPED = {
    "of files": WeightFormats(
        qkv=int4(32, "float16"),
        attn_out=int4(64, "bfloat16", "zero"),
        gate_up=int4(32, "float16", "minimum"),
        down=int4(128, "float16", "zero"),
        head=INT8_GROUPS,
    ),
    "of files, otherwise": WeightFormats(
        qkv=INT8_GROUPS,
        attn_out=int4(32, "float16", "minimum"),
        gate_up=int4(128, "float16", "minimum"),
        down=int4(32, "bfloat16"),
        head=int4(64, "float16", "zero"),
    ),
}

# The input that each nibble of a word holds, the lowest nibble first.
_INPUT_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def model_to_quantize(dtype: str = "bfloat16", name: str = "grouped, untied") -> Transformer:
    """A random model whose inputs are whole groups of 32."""
    return random_model(name, dtype, config=_SIZES)


def kernel_config(formats: WeightFormats, **sizes: int) -> ModelConfig:
    """A small configuration of these formats, whose inputs are 1, 2 or 3 whole groups of 128."""
    fields = {"model_dim": 256, "ffw_dim": 384}  # and attention of 128
    config = small_config(**fields | sizes)
    return dataclasses.replace(config, weights=formats)


def named_arrays(model: Transformer) -> dict[str, np.ndarray]:
    """The model's arrays by dotted name."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(param[...]) for path, param in flat}


def numbers_of(words: np.ndarray) -> np.ndarray:
    """The integers of packed words, `[..., in / 8]` to `[..., in]`, nibble by nibble."""
    numbers = np.zeros((*words.shape, 8), np.int64)
    for nibble, which in enumerate(_INPUT_OF_NIBBLE):
        numbers[..., which] = (words.view(np.uint32) // np.uint32(16**nibble)) % 16
    return numbers.reshape(*words.shape[:-1], -1)


def by_hand(
    integers: np.ndarray, scale: np.ndarray, format: WeightFormat | None = None
) -> np.ndarray:
    """The weights that integers and scales stand for, exactly, float64 `[..., out, in]`.

    Args:
        integers: as they are stored.
        scale: likewise.
        format: how; None: int8 with a scale a row, or int4 without an offset.
    """
    exact = scale.astype(np.float32).astype(np.float64)
    if integers.dtype == np.int8 and (format is None or format.group_size is None):
        return integers.astype(np.float64) * exact[..., None]
    numbers = integers.astype(np.int64) if integers.dtype == np.int8 else numbers_of(integers) - 8
    if format is None or format.offset is None:
        return numbers * np.repeat(exact, numbers.shape[-1] // scale.shape[-1], axis=-1)
    wide = np.repeat(exact, numbers.shape[-1] // scale.shape[-2], axis=-2)
    if format.offset == "zero":
        return (numbers + 8 - wide[..., 1]) * wide[..., 0]
    return (numbers + 8) * wide[..., 0] + wide[..., 1]


def nbytes(model: Transformer) -> int:
    """Bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
