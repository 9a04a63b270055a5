"""Quantized matrices of a Hugging Face folder: what its readers share, and which reader it is.

What quantized a model is in `quantization_config` of config.json. Each layout has a reader of its
own; a reader takes the tensors of its matrices out of the folder's, and leaves the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from checkpoints.hf_files import StoredTensor, fill
from checkpoints.integers import IntegerMatrix, with_offset
from checkpoints.manifest import CheckpointError
from ffjax.formats import GROUP_SIZES, ScaleType, WeightFormat

__all__ = [
    "QWEIGHT",
    "WEIGHT",
    "MatrixOfTensors",
    "Reader",
    "Settings",
    "beside_qweight",
    "group_size",
    "kept_scales",
    "nibbles",
    "of_our_groups",
    "raw",
    "scale_type",
]

_RAW = {
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype("<f4"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
WEIGHT = ".weight"
"""What a matrix is called in the table, after the name of its module."""
QWEIGHT = ".qweight"
"""What GPTQ and AWQ call its integers."""
_BESIDE = (".qzeros", ".scales")


class Settings(NamedTuple):
    """What quantized a model.

    Attributes:
        where: the folder, for messages.
        fields: of quantization_config.
        integers: whether integers are wanted, or whole numbers.
    """

    where: Path
    fields: Mapping[str, Any]
    integers: bool

    def refused(self, what: str, hint: str) -> CheckpointError:
        """The error of a layout that is not read."""
        return CheckpointError(
            f"quantization_config of {self.where} says {what}, which is not supported. {hint}"
        )

    def only(self, name: str, *supported: Any, default: Any = None) -> Any:
        """A field that has one of some values.

        Raises:
            CheckpointError: it has another one.
        """
        value = self.fields.get(name, default)
        if value not in supported:
            listed = " or ".join(map(repr, supported))
            raise self.refused(f"{name}={value!r}", f"Supported: {listed}.")
        return value


def raw(tensor: StoredTensor) -> np.ndarray:
    """A tensor's numbers as they are stored.

    Raises:
        CheckpointError: it is of a dtype that no layout has, or the file ends before it does.
    """
    if (dtype := _RAW.get(tensor.dtype)) is None:
        raise CheckpointError(
            f"{tensor.name} of {tensor.file} is of the dtype {tensor.dtype}; quantized matrices "
            f"are made of {', '.join(_RAW)}."
        )
    made = np.empty(tensor.shape, dtype)
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.offset)
        fill(file, made.reshape(-1).view(np.uint8), tensor)
    return made


def nibbles(words: np.ndarray, axis: int, order: Collection[int] = range(8)) -> np.ndarray:
    """Integers of 4 bits, eight a word, which lie side by side along an axis: uint8.

    Args:
        words: int32.
        axis: 0 or 1, of two.
        order: which of the eight each nibble is, the lowest one first.
    """
    parts = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(*words.shape, 4)
    shape = list(words.shape)
    made = np.empty((*shape[: axis + 1], 8, *shape[axis + 1 :]), np.uint8)
    eights = np.moveaxis(made, axis + 1, -1)
    for nibble, which in enumerate(order):
        part = parts[..., nibble // 2]
        eights[..., which] = part >> 4 if nibble % 2 else part & 15
    shape[axis] *= 8
    return made.reshape(shape)


def scale_type(settings: Settings, tensor: StoredTensor) -> ScaleType:
    """The dtype that a group's scales are kept in.

    Scales of float32 are taken where one of 16 bits holds them exactly: nothing is rounded.

    Args:
        settings: which say whether integers are wanted; of whole numbers it does not matter.
        tensor: the scales.

    Raises:
        CheckpointError: neither float16 nor bfloat16 holds them.
    """
    if tensor.dtype in ("F16", "BF16"):
        return "float16" if tensor.dtype == "F16" else "bfloat16"
    numbers = raw(tensor).astype(np.float32)
    for name in ("bfloat16", "float16"):
        with np.errstate(over="ignore"):
            if (numbers.astype(name).astype(np.float32) == numbers).all():
                return name
    if not settings.integers:
        return "bfloat16"
    raise CheckpointError(
        f"Scales of groups are 16-bit numbers; {tensor.name} of {tensor.file} is {tensor.dtype}, "
        "and holds what neither float16 nor bfloat16 does. Convert the model with --whole "
        "(integers=False), which makes whole weights of it."
    )


def kept_scales(settings: Settings, tensor: StoredTensor) -> np.ndarray:
    """The scales in the dtype that they are kept in; as they are, to make whole numbers."""
    return raw(tensor).astype(scale_type(settings, tensor)) if settings.integers else raw(tensor)


def group_size(settings: Settings, inputs: int, groups: int) -> int:
    """The size of groups of ours for so many of theirs: a whole row, or more than ours have, is
    several.

    Raises:
        CheckpointError: no size of ours divides theirs.
    """
    size = inputs // groups
    ours = next((one for one in sorted(GROUP_SIZES, reverse=True) if size % one == 0), None)
    if ours is None or size * groups != inputs:
        raise settings.refused(f"Groups of {size} inputs", "Groups of 32, 64 or 128 are.")
    return ours


def of_our_groups(scale: np.ndarray, inputs: int, size: int) -> np.ndarray:
    """Scales `[out, groups, ...]` of theirs as those of groups of ours, of `size` inputs each."""
    return np.repeat(scale, inputs // scale.shape[1] // size, axis=1)


def beside_qweight(
    settings: Settings, tensors: dict[str, StoredTensor], name: str, layout: str, hint: str
) -> tuple[StoredTensor, StoredTensor, StoredTensor]:
    """Takes X.qweight, X.qzeros and X.scales out of the tensors, as GPTQ and AWQ call them.

    Args:
        settings: of the model.
        tensors: that are left.
        name: X.qweight.
        layout: what to call it.
        hint: what to do where one is missing.

    Raises:
        CheckpointError: one is missing.
    """
    stem = name.removesuffix(QWEIGHT)
    if missing := [stem + one for one in _BESIDE if stem + one not in tensors]:
        raise CheckpointError(
            f"A matrix of {layout} has {', '.join(_BESIDE)} beside {QWEIGHT}; {settings.where} "
            f"has no {missing[0]}. {hint}"
        )
    weight, zeros, scales = (tensors.pop(stem + one) for one in (QWEIGHT, *_BESIDE))
    return weight, zeros, scales


@dataclasses.dataclass(frozen=True)
class MatrixOfTensors:
    """A matrix that several tensors make up; see `integers.IntegerMatrix`.

    Attributes:
        name: the tensor with its numbers.
        dtype: what the layout is called.
        shape: `[out, in]`.
        nbytes: of all its tensors.
        format: how it is stored, as ours.
        read_numbers: reads its integers, as `IntegerMatrix.numbers`.
        read_scale: reads its scales, in its own format.
        order: of the inputs as they are read, where that is none of the matrix; such a matrix is
            made whole.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    format: WeightFormat
    read_numbers: Callable[[], np.ndarray]
    read_scale: Callable[[], np.ndarray]
    order: np.ndarray | None = None

    def numbers(self) -> np.ndarray:
        """Its integers; see `IntegerMatrix`."""
        return self.read_numbers()

    def scale(self, format: WeightFormat) -> np.ndarray:
        """Its scales in a format of ours; see `IntegerMatrix`."""
        return with_offset(self.read_scale(), self.format, format, self.name)


Reader = Callable[[Settings, dict[str, StoredTensor]], dict[str, IntegerMatrix]]
"""Takes the tensors of matrices out of those given, by the names in the table, and returns the
matrices, by theirs: "X.weight"."""
