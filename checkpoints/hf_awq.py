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
    MatrixOfTensors,
    Settings,
    group_scales,
    kept_scales,
    nibbles,
    raw,
    scale_type,
    stem_of,
)
from checkpoints.integers import IntegerMatrix, Integers
from checkpoints.manifest import CheckpointError
from ffjax.formats import int4

__all__ = ["read_awq"]

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_OTHERS = (".qzeros", ".scales")


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
    for name in [name for name in tensors if name.endswith(".qweight")]:
        stem = name.removesuffix(".qweight")
        if missing := [stem + one for one in _OTHERS if stem + one not in tensors]:
            raise CheckpointError(
                f"A matrix of AWQ has {', '.join(_OTHERS)} beside .qweight; {settings.where} has "
                f"no {missing[0]}. Models without zero points (zero_point false) are not supported."
            )
        weight, zeros, scales = (tensors.pop(stem + one) for one in (".qweight", *_OTHERS))
        inputs, eighth = weight.shape
        try:
            size, _ = group_scales(inputs, np.zeros((1, scales.shape[0])))
        except ValueError as error:
            raise settings.refused(str(error), "Groups of 32, 64 or 128 are.") from None
        kept = scale_type(settings, scales)
        place = stem_of(name, ".qweight")
        assert place is not None
        nbytes = weight.nbytes + zeros.nbytes + scales.nbytes
        matrices[place] = MatrixOfTensors(
            weight.name,
            "AWQ",
            (8 * eighth, inputs),
            nbytes,
            int4(size, kept, "zero"),
            functools.partial(_read, settings, weight, zeros, scales),
        )
    return matrices


def _read(
    settings: Settings, weight: StoredTensor, zeros: StoredTensor, scales: StoredTensor
) -> Integers:
    numbers = np.ascontiguousarray(nibbles(raw(weight), 1, _ORDER).T)
    scale = kept_scales(settings, scales).T
    beside = nibbles(raw(zeros), 1, _ORDER).T.astype(scale.dtype)
    pair = np.stack([scale, beside], axis=-1)
    return Integers(numbers, group_scales(numbers.shape[1], pair)[1])
