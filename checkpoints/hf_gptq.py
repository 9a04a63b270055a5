"""GPTQ's layout of quantized matrices.

Of a matrix X `[out, in]` (qlinear_torch.py of https://github.com/ModelCloud/GPTQModel, and
qlinear_cuda_old.py of https://github.com/AutoGPTQ/AutoGPTQ):

- X.qweight, int32 `[in / 8, out]`: nibble k of a word is input 8 * i + k, the lowest one first;
- X.qzeros, int32 `[groups, out / 8]`: the integers z that stand for 0, packed along the outputs;
  "gptq" stores z - 1, which comes round at 16, and "gptq_v2" z;
- X.scales, float16 `[groups, out]`;
- X.g_idx, int32 `[in]`: the group of each input.

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
from checkpoints.manifest import CheckpointError
from ffjax.formats import int4

__all__ = ["read_gptq"]


def read_gptq(settings: Settings, tensors: dict[str, StoredTensor]) -> dict[str, IntegerMatrix]:
    """The matrices of a model that GPTQ quantized; see `hf_integers.Reader`.

    Raises:
        CheckpointError: the layout is another one, or inputs are in an order of their own.
    """
    settings.only("bits", 4)
    less_one = settings.only("checkpoint_format", "gptq", "gptq_v2", default="gptq") == "gptq"
    symmetric = bool(settings.fields.get("sym", True))
    matrices: dict[str, IntegerMatrix] = {}
    for name in [name for name in tensors if name.endswith(QWEIGHT)]:
        weight, zeros, scales = beside_qweight(
            settings, tensors, name, "GPTQ", "Download it again."
        )
        eighth, out = weight.shape
        inputs, groups, order = 8 * eighth, scales.shape[0], None
        stem = name.removesuffix(QWEIGHT)
        if (index := tensors.pop(f"{stem}.g_idx", None)) is not None:
            order = _order(settings, index, inputs, groups)
        size = group_size(settings, inputs, groups)
        parts = weight, zeros, scales
        matrices[stem + WEIGHT] = MatrixOfTensors(
            weight.name,
            "GPTQ",
            (out, inputs),
            sum(part.nbytes for part in parts),
            int4(size, scale_type(settings, scales), None if symmetric else "zero"),
            functools.partial(_numbers, weight, order),
            functools.partial(_scale, settings, zeros, scales, inputs, size, less_one, symmetric),
            order,
        )
    return matrices


def _order(settings: Settings, index: StoredTensor, inputs: int, groups: int) -> np.ndarray | None:
    """The inputs in the order of their groups; None: they are in that order."""
    numbers, size = raw(index).astype(np.int64), inputs // groups
    if (numbers == np.arange(inputs) // size).all():
        return None
    order = np.argsort(numbers, kind="stable")
    if settings.integers or (numbers[order] != np.arange(inputs) // size).any():
        raise CheckpointError(
            f"The inputs of a group are neighbours; {index.name} of {settings.where} has them in "
            "the order of their activations (desc_act). What makes these would have to make them "
            "in that order, which is not supported. Convert the model with --whole "
            "(integers=False), or use a version of it without desc_act."
        )
    return order


def _numbers(weight: StoredTensor, order: np.ndarray | None) -> np.ndarray:
    numbers = nibbles(raw(weight).T, 1)
    return numbers if order is None else numbers[:, order]


def _scale(
    settings: Settings,
    zeros: StoredTensor,
    scales: StoredTensor,
    inputs: int,
    size: int,
    less_one: bool,
    symmetric: bool,
) -> np.ndarray:
    second = nibbles(raw(zeros), 1).T  # [out, groups]
    if less_one:
        second = (second + 1) & 15
    scale = of_our_groups(kept_scales(settings, scales).T, inputs, size)
    if symmetric:
        if (second != 8).any():
            raise CheckpointError(
                f"quantization_config of {settings.where} says that 8 stands for 0 (sym), and "
                f"{zeros.name} says otherwise. If the model is not symmetric, set sym to false "
                "there."
            )
        return np.ascontiguousarray(scale)
    beside = of_our_groups(second.astype(scale.dtype), inputs, size)
    return np.stack([scale, beside], axis=-1)
