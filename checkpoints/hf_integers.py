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
from checkpoints.integers import IntegerMatrix, Integers, with_offset
from checkpoints.manifest import CheckpointError
from ffjax.formats import GROUP_SIZES, ScaleType, WeightFormat

__all__ = [
    "MatrixOfTensors",
    "Reader",
    "Settings",
    "group_scales",
    "kept_scales",
    "nibbles",
    "raw",
    "scale_type",
    "stem_of",
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
_WEIGHT = ".weight"


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
    words = words.view(np.uint32)
    parts: dict[int, np.ndarray] = {}
    for nibble, which in enumerate(order):
        parts[which] = (words >> np.uint32(4 * nibble) & np.uint32(15)).astype(np.uint8)
    stacked = np.stack([parts[i] for i in range(8)], axis=axis + 1)
    shape = list(words.shape)
    shape[axis] *= 8
    return stacked.reshape(shape)


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


def group_scales(inputs: int, scale: np.ndarray) -> tuple[int, np.ndarray]:
    """The size of groups of ours for scales that are each of so many inputs, and scales of theirs.

    A scale of a whole row, or of larger groups than ours, stands for several groups.

    Args:
        inputs: of the matrix.
        scale: `[out, groups, ...]`.

    Raises:
        ValueError: no size of ours divides theirs.
    """
    size = inputs // scale.shape[1]
    ours = next((one for one in sorted(GROUP_SIZES, reverse=True) if size % one == 0), None)
    if ours is None or size * scale.shape[1] != inputs:
        raise ValueError(f"Groups of {size} inputs")
    return ours, np.repeat(scale, size // ours, axis=1)


def stem_of(name: str, suffix: str) -> str | None:
    """The name of the matrix that a tensor is a part of: "X.weight" of "X" + suffix."""
    return name.removesuffix(suffix) + _WEIGHT if name.endswith(suffix) else None


@dataclasses.dataclass(frozen=True)
class MatrixOfTensors:
    """A matrix that several tensors make up; see `integers.IntegerMatrix`.

    Attributes:
        name: the tensor with its numbers.
        dtype: what the layout is called.
        shape: `[out, in]`.
        nbytes: of all its tensors.
        format: how it is stored, as ours.
        made: reads it.
        order: of the inputs as they are read, where that is none of the matrix; such a matrix is
            made whole.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    format: WeightFormat
    made: Callable[[], Integers]
    order: np.ndarray | None = None

    def read(self, format: WeightFormat) -> Integers:
        """Its numbers in a format of ours; see `IntegerMatrix`."""
        return with_offset(self.made(), self.format, format, self.name)


Reader = Callable[[Settings, dict[str, StoredTensor]], dict[str, IntegerMatrix]]
"""Takes the tensors of matrices out of those given, by the names in the table, and returns the
matrices, by theirs: "X.weight"."""
