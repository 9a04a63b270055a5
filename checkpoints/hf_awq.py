"""AWQ's layout of quantized matrices: "gemm", of 4 bits.

Of a matrix X `[out, in]` (awq/modules/linear/gemm.py of https://github.com/casper-hansen/AutoAWQ):

- X.qweight, int32 `[in, out / 8]`: nibble k of a word, the lowest one first, is output 8 * i +
  o(k), with o = 0, 2, 4, 6, 1, 3, 5, 7;
- X.qzeros, int32 `[groups, out / 8]`, in the same order: the integers z that stand for 0;
- X.scales, float16 `[groups, out]`.

A weight is scale * (n - z).
"""

from __future__ import annotations

import functools

import numpy as np

from checkpoints.hf_files import StoredTensor
from checkpoints.hf_integers import (
    QWEIGHT,
    WEIGHT,
    MatrixOfTensors,
    Settings,
    beside_qweight,
    group_size,
    kept_scales,
    nibbles,
    of_our_groups,
    raw,
    scale_type,
)
from checkpoints.integers import IntegerMatrix
from ffjax.formats import int4

__all__ = ["read_awq"]

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read_awq(settings: Settings, tensors: dict[str, StoredTensor]) -> dict[str, IntegerMatrix]:
    """The matrices of a model that AWQ quantized; see `hf_integers.Reader`.

    Raises:
        CheckpointError: the layout is another one.
    """
    bits = "bits" if "bits" in settings.fields else "w_bit"
    settings.only(bits, 4)
    version = str(settings.fields.get("version", "gemm")).lower()
    if version != "gemm":
        raise settings.refused(f"version={version!r}", "Supported: 'gemm'.")
    matrices: dict[str, IntegerMatrix] = {}
    for name in [name for name in tensors if name.endswith(QWEIGHT)]:
        hint = "Models without zero points (zero_point false) are not supported."
        weight, zeros, scales = beside_qweight(settings, tensors, name, "AWQ", hint)
        inputs, eighth = weight.shape
        size = group_size(settings, inputs, scales.shape[0])
        matrices[name.removesuffix(QWEIGHT) + WEIGHT] = MatrixOfTensors(
            weight.name,
            "AWQ",
            (8 * eighth, inputs),
            weight.nbytes + zeros.nbytes + scales.nbytes,
            int4(size, scale_type(settings, scales), "zero"),
            functools.partial(_numbers, weight),
            functools.partial(_scale, settings, zeros, scales, inputs, size),
        )
    return matrices


def _numbers(weight: StoredTensor) -> np.ndarray:
    return nibbles(raw(weight).T, 0, _ORDER)


def _scale(
    settings: Settings, zeros: StoredTensor, scales: StoredTensor, inputs: int, size: int
) -> np.ndarray:
    scale = kept_scales(settings, scales).T
    beside = nibbles(raw(zeros), 1, _ORDER).T.astype(scale.dtype)
    pair = np.stack([scale, beside], axis=-1)
    return of_our_groups(pair, inputs, size)
