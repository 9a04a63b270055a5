"""The layouts of compressed-tensors: integers of 4 bits in words, int8 by rows, and FP8.

Of a matrix X `[out, in]` (compressors/quantized_compressors of
https://github.com/vllm-project/compressed-tensors):

- "pack-quantized", 4 bits: X.weight_packed, int32 `[out, in / 8]`, nibble k of a word, the lowest
  one first, is input 8 * i + k, 8 more than the integer q; X.weight_scale `[out, groups]`, one a
  row with strategy "channel"; of asymmetric models X.weight_zero_point, int32 `[out / 8, groups]`,
  packed likewise along the outputs, or int8 `[out, groups]`; X.weight_shape, `[2]`.
- "int-quantized", 8 bits: X.weight, int8, and X.weight_scale `[out, 1]`.
- "float-quantized", 8 bits: see `hf_fp8`.

A weight is scale * (q - zero point). Whether activations are to be quantized, too, is not looked
at: they are not, which is nearer to the model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints.hf_files import StoredTensor
from checkpoints.hf_fp8 import read_fp8
from checkpoints.hf_integers import (
    WEIGHT,
    MatrixOfTensors,
    Settings,
    group_size,
    kept_scales,
    nibbles,
    of_our_groups,
    raw,
    scale_type,
)
from checkpoints.integers import IntegerMatrix
from checkpoints.manifest import CheckpointError
from ffjax.formats import INT8, int4

__all__ = ["read_compressed"]


def read_compressed(
    settings: Settings, tensors: dict[str, StoredTensor]
) -> dict[str, IntegerMatrix]:
    """The matrices of a model that compressed-tensors holds; see `hf_integers.Reader`.

    Raises:
        CheckpointError: the layout is another one.
    """
    layout = settings.only("format", "pack-quantized", "int-quantized", "float-quantized")
    if layout == "float-quantized":
        return read_fp8(settings, tensors)
    sparse = (settings.fields.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense":
        raise settings.refused(f"a sparsity_config of the format {sparse!r}", "Supported: dense.")
    weights = _weights(settings)
    if weights.get("actorder") not in (None, "static", "weight", False):
        raise settings.refused(
            f"actorder={weights['actorder']!r}", "Use a version of the model without it."
        )
    if layout == "int-quantized":
        return _rows(settings, weights, tensors)
    if weights.get("num_bits") != 4:
        raise settings.refused(f"num_bits={weights.get('num_bits')!r} in words", "Supported: 4.")
    symmetric = bool(weights.get("symmetric", True))
    matrices: dict[str, IntegerMatrix] = {}
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        stem = name.removesuffix("_packed")
        weight, scale = tensors.pop(name), _part(settings, tensors, f"{stem}_scale")
        zero = None if symmetric else _part(settings, tensors, f"{stem}_zero_point")
        for other in ("_zero_point", "_shape"):
            tensors.pop(stem + other, None)
        if f"{stem}_g_idx" in tensors:
            raise settings.refused(f"{stem}_g_idx", "Use a version of the model without it.")
        out, eighth = weight.shape
        size = group_size(settings, 8 * eighth, scale.shape[1])
        kept = scale_type(settings, scale)
        parts = [part for part in (weight, scale, zero) if part is not None]
        matrices[stem] = MatrixOfTensors(
            weight.name,
            "W4A16",
            (out, 8 * eighth),
            sum(part.nbytes for part in parts),
            int4(size, kept, None if symmetric else "zero"),
            functools.partial(_numbers, weight),
            functools.partial(_scale, settings, weight, scale, zero, size),
        )
    return matrices


def _weights(settings: Settings) -> Mapping[str, Any]:
    """What is said of weights, by all groups of modules alike."""
    groups = settings.fields.get("config_groups") or {}
    said = [group.get("weights") or {} for group in groups.values()]
    if not said or any(one != said[0] for one in said):
        raise settings.refused(f"{len(said)} config_groups", "Supported: one, or several alike.")
    return said[0]


def _part(settings: Settings, tensors: dict[str, StoredTensor], name: str) -> StoredTensor:
    if name not in tensors:
        raise CheckpointError(
            f"A quantized matrix of {settings.where} lacks {name}. Download the model again."
        )
    return tensors.pop(name)


def _numbers(weight: StoredTensor) -> np.ndarray:
    return nibbles(raw(weight), 1)


def _scale(
    settings: Settings,
    weight: StoredTensor,
    scale: StoredTensor,
    zero: StoredTensor | None,
    size: int,
) -> np.ndarray:
    out, inputs = weight.shape[0], 8 * weight.shape[1]
    kept = kept_scales(settings, scale)
    if zero is None:
        return of_our_groups(kept, inputs, size)
    found = raw(zero)
    less = found + 8 if zero.dtype == "I8" else nibbles(found, 0)[:out]
    return of_our_groups(np.stack([kept, less.astype(kept.dtype)], axis=-1), inputs, size)


def _rows(
    settings: Settings, weights: Mapping[str, Any], tensors: dict[str, StoredTensor]
) -> dict[str, IntegerMatrix]:
    """int8 with a scale a row."""
    if not weights.get("symmetric", True) or weights.get("strategy") not in ("channel", "tensor"):
        raise settings.refused(
            "int8 that is not symmetric, or in groups", "Supported: symmetric, a scale a row."
        )
    matrices: dict[str, IntegerMatrix] = {}
    for name in [name for name, one in tensors.items() if one.dtype == "I8"]:
        if not name.endswith(WEIGHT):
            continue
        weight, scale = tensors.pop(name), _part(settings, tensors, f"{name}_scale")
        for other in ("_zero_point", "_shape"):
            tensors.pop(name + other, None)
        nbytes = weight.nbytes + scale.nbytes
        read = functools.partial(raw, weight), functools.partial(_scale_of_rows, weight, scale)
        matrices[name] = MatrixOfTensors(weight.name, "W8", weight.shape, nbytes, INT8, *read)
    return matrices


def _scale_of_rows(weight: StoredTensor, scale: StoredTensor) -> np.ndarray:
    rows = np.broadcast_to(raw(scale).astype(np.float32).reshape(-1), weight.shape[:1])
    return np.ascontiguousarray(rows)
