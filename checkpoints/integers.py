"""Matrices that a file keeps as integers with scales, and that stay as they are.

Each layout of files has a reader (`gguf.integers`, `hf_gptq` and so on) whose matrices say what
they hold as numbers: integers by row and input, and a scale for each group of inputs. What is made
of them is here: our words and scales, or whole numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from checkpoints.hf_table import Slot
from checkpoints.manifest import CheckpointError
from checkpoints.stored import ALL, Described
from ffjax.config import ModelConfig
from ffjax.formats import WeightFormat, WeightFormats
from ffjax.rounding import grouped_weights
from pallas_kernels.dims import WORD_SHIFTS

__all__ = [
    "IntegerMatrix",
    "Keeping",
    "Kept",
    "WholeMatrix",
    "common_format",
    "keep_integers",
    "packed",
    "row_blocks",
    "wholes",
    "with_offset",
]

_MATRICES = ("qkv", "attn_out", "gate_up", "down", "head")
# Numbers that are packed, or made whole, at a time: each takes up to some 20 bytes on the way.
_BLOCK = 1 << 20


class IntegerMatrix(Described, Protocol):
    """A matrix of integers in a file, not yet read."""

    @property
    def format(self) -> WeightFormat:
        """How it is stored, as ours."""
        ...

    def numbers(self) -> np.ndarray:
        """Its integers `[out, in]`: of int4 uint8, 0 to 15; of int8 int8.

        Raises:
            CheckpointError: the file ends before the matrix does.
        """
        ...

    def scale(self, format: WeightFormat) -> np.ndarray:
        """Its scales in a format of ours: its own, or one that holds the same weights.

        Returns:
            float16 or bfloat16 `[out, in / group]`, with a second number
            `[out, in / group, 2]`; float32 `[out]` of int8 without groups.

        Raises:
            CheckpointError: the file ends before they do, or holds what the format cannot.
        """
        ...


def packed(numbers: np.ndarray) -> np.ndarray:
    """Words of eight integers of 0 to 15: `ffjax.packing.pack`, of an array on the host.

    Args:
        numbers: uint8 `[..., in]`.

    Returns:
        int32 `[..., in / 8]`.
    """
    eights = numbers.reshape(*numbers.shape[:-1], -1, len(WORD_SHIFTS))
    # Byte by byte, the lowest first: a pass over words of 32 bits takes four times as long.
    made = np.empty((*eights.shape[:-1], 4), np.uint8)
    for byte in range(4):
        low, high = WORD_SHIFTS.index(8 * byte), WORD_SHIFTS.index(8 * byte + 4)
        made[..., byte] = eights[..., low] | eights[..., high] << 4
    return made.view("<i4")[..., 0].astype(np.int32, copy=False)


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Rows of a matrix that are worked on at a time, for the memory."""
    step = max(1, _BLOCK // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def _whole(numbers: np.ndarray, scale: np.ndarray, format: WeightFormat) -> np.ndarray:
    """The weights that integers and scales stand for, float32 `[out, in]`."""
    if format.group_size is None:
        return numbers.astype(np.float32) * scale.astype(np.float32)[:, None]
    groups = numbers.reshape(len(numbers), -1, format.group_size)
    # Operators alone: of arrays of numpy it makes such, on the host.
    whole: Any = grouped_weights(groups, scale, format)  # pyright: ignore[reportArgumentType]
    return whole.reshape(numbers.shape)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A tensor of ours that is made of a matrix; as `stored.Stored`."""

    matrix: IntegerMatrix
    to: WeightFormat

    @property
    def name(self) -> str:
        return self.matrix.name

    @property
    def dtype(self) -> str:
        return self.matrix.dtype

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape

    def parts(self) -> list[slice]:
        """The matrix is read at once."""
        return [ALL]


class WholeMatrix(_Part):
    """Whole numbers made of a matrix."""

    def read_into(self, out: np.ndarray, part: slice = ALL) -> None:
        """Reads it, rounding to the array's dtype."""
        numbers, scale = self.matrix.numbers(), self.matrix.scale(self.to)
        order = getattr(self.matrix, "order", None)
        out = out[part]
        for rows in row_blocks(*numbers.shape):
            whole = _whole(numbers[rows], scale[rows], self.to)
            out[rows, slice(None) if order is None else order] = whole


class Kept(_Part):
    """The integers of a matrix."""

    def read_into(self, out: np.ndarray, part: slice = ALL) -> None:
        """Reads it: words of int4, or int8."""
        numbers, out = self.matrix.numbers(), out[part]
        for rows in row_blocks(*numbers.shape):
            out[rows] = packed(numbers[rows]) if self.to.bits == 4 else numbers[rows]


class _Scales(_Part):
    """The scales of a matrix; its bytes are counted with its integers."""

    @property
    def dtype(self) -> str:
        return ""

    @property
    def nbytes(self) -> int:
        return 0

    def read_into(self, out: np.ndarray, part: slice = ALL) -> None:
        """Reads them."""
        out[part] = self.matrix.scale(self.to)


def wholes(matrices: Mapping[str, IntegerMatrix]) -> dict[str, WholeMatrix]:
    """The matrices made whole, by the same names."""
    return {name: WholeMatrix(matrix, matrix.format) for name, matrix in matrices.items()}


class Keeping(NamedTuple):
    """A model whose integers stay: its configuration, places and tensors; see `Incoming`."""

    config: ModelConfig
    slots: dict[str, list[Slot]]
    tensors: dict[str, Any]


def common_format(formats: set[WeightFormat]) -> WeightFormat | None:
    """A format that holds the weights of several exactly; None if there is none of ours."""
    if len(formats) == 1:
        return next(iter(formats))
    # Without a second number is with one: 8 for the integer that stands for 0, or -8 scales.
    if len({dataclasses.replace(one, offset=None) for one in formats if one.bits == 4}) != 1:
        return None
    offsets = {one.offset for one in formats}
    if any(one.bits == 8 for one in formats) or {"zero", "minimum"} <= offsets:
        return None
    return next(one for one in formats if one.offset is not None)


def with_offset(scale: np.ndarray, own: WeightFormat, to: WeightFormat, name: str) -> np.ndarray:
    """Scales in a format that has a second number of each group, where `own` has none.

    Raises:
        CheckpointError: the dtype of the scales does not hold it.
    """
    if own == to:
        return scale
    with np.errstate(over="ignore"):  # looked at below
        least = scale * scale.dtype.type(-8)
    second = np.full_like(scale, 8) if to.offset == "zero" else least
    if not np.isfinite(second.astype(np.float32)).all():
        raise CheckpointError(
            f"A scale of {name} is so large that its minimum is no {to.scale_dtype}. Take another "
            "file of the model."
        )
    return np.stack([scale, second], axis=-1)


def keep_integers(
    config: ModelConfig,
    slots: Mapping[str, list[Slot]],
    tensors: Mapping[str, Any],
    matrices: Mapping[str, IntegerMatrix],
    *,
    integers: bool = True,
) -> Keeping:
    """Has matrices of integers stay as they are, where all tensors of one of our matrices can.

    That are those of all layers, and of what is fused. Others are made whole, as all are where
    integers are not wanted.

    Args:
        config: the configuration of the model, made whole.
        slots: the places of its tensors.
        tensors: these, by the names in the table: those of integers as they are made whole, if the
            reader has a way of its own.
        matrices: those that are stored as integers, by the names in the table.
        integers: whether they are wanted.
    """
    made, places, formats = dict(tensors), dict(slots), {}
    for name in _MATRICES:
        place = name if name == "head" else f"layers.{name}"
        mine = [slot for slot in slots.get(place, []) if slot.theirs in matrices]
        if not integers or not mine or len(mine) != len(slots[place]):
            continue
        common = common_format({matrices[slot.theirs].format for slot in mine})
        if common is None or common.why_not(mine[0].shape[-1]) is not None:
            continue
        formats[name], scales = common, []
        for slot in mine:
            matrix, called = matrices[slot.theirs], f"{slot.theirs} (scales)"
            made[slot.theirs], made[called] = Kept(matrix, common), _Scales(matrix, common)
            out, inputs = slot.shape
            shape = common.shape_of_scales(out, inputs)
            scales.append(slot._replace(theirs=called, ours=f"{place}_scale", shape=shape))
        places[f"{place}_scale"] = scales
    for name, matrix in wholes(matrices).items():
        made.setdefault(name, matrix)
    kept = dataclasses.replace(config, weights=WeightFormats(**formats)) if formats else config
    return Keeping(kept, places, made)
