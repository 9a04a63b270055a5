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

__all__ = ["read_gptq"]

_OTHERS = (".qzeros", ".scales")


def read_gptq(settings: Settings, tensors: dict[str, StoredTensor]) -> dict[str, IntegerMatrix]:
    """The matrices of a model that GPTQ quantized; see `hf_integers.Reader`.

    Raises:
        CheckpointError: the layout is another one, or inputs are in an order of their own.
    """
    settings.only("bits", 4)
    less_one = settings.only("checkpoint_format", "gptq", "gptq_v2", default="gptq") == "gptq"
    symmetric = bool(settings.fields.get("sym", True))
    matrices: dict[str, IntegerMatrix] = {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        stem = name.removesuffix(".qweight")
        if missing := [stem + one for one in _OTHERS if stem + one not in tensors]:
            raise CheckpointError(
                f"A matrix of GPTQ has {', '.join(_OTHERS)} beside .qweight; {settings.where} "
                f"has no {missing[0]}. Download it again."
            )
        weight, zeros, scales = (tensors.pop(stem + one) for one in (".qweight", *_OTHERS))
        eighth, out = weight.shape
        inputs, groups = 8 * eighth, scales.shape[0]
        index, order = tensors.pop(f"{stem}.g_idx", None), None
        if index is not None:
            order = _order(settings, index, inputs, groups)
        try:
            size, _ = group_scales(inputs, np.zeros((1, groups)))
        except ValueError as error:
            raise settings.refused(str(error), "Groups of 32, 64 or 128 are.") from None
        kept = scale_type(settings, scales)
        own = int4(size, kept, None if symmetric else "zero")
        parts = [weight, zeros, scales]
        read = functools.partial(_read, settings, weight, zeros, scales, less_one, symmetric, order)
        place = stem_of(name, ".qweight")
        assert place is not None
        nbytes = sum(part.nbytes for part in parts)
        matrices[place] = MatrixOfTensors(
            weight.name, "GPTQ", (out, inputs), nbytes, own, read, order
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


def _read(
    settings: Settings,
    weight: StoredTensor,
    zeros: StoredTensor,
    scales: StoredTensor,
    less_one: bool,
    symmetric: bool,
    order: np.ndarray | None,
) -> Integers:
    numbers = np.ascontiguousarray(nibbles(raw(weight), 0).T)
    if order is not None:
        numbers = numbers[:, order]
    second = nibbles(raw(zeros), 1).T  # [out, groups]
    if less_one:
        second = (second + 1) & 15
    _, scale = group_scales(numbers.shape[1], kept_scales(settings, scales).T)
    if symmetric:
        if (second != 8).any():
            raise CheckpointError(
                f"quantization_config of {settings.where} says that 8 stands for 0 (sym), and "
                f"{zeros.name} says otherwise. If the model is not symmetric, set sym to false "
                "there."
            )
        return Integers(numbers, np.ascontiguousarray(scale))
    _, beside = group_scales(numbers.shape[1], second.astype(scale.dtype))
    return Integers(numbers, np.stack([scale, beside], axis=-1))
