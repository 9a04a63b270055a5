"""A model's arrays a few rows at a time, on the host: as they go to a disk or to a device.

The arrays of a model with L layers are stacks `[L, ...]`. Of a model of 70 billion weights a stack
takes up to 75 GB, and one of its layers 0.9 GB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Block", "blocks_of", "is_large", "ranges", "rows_of_a_block", "rows_of_a_chunk"]

# Numbers that TensorStore writes at a time, in bytes. A chunk is copied before.
_CHUNK_BYTES = 64 << 20
# Numbers that are on the host at a time, in bytes, if they are more than a row.
_BLOCK_BYTES = 256 << 20


class Block(NamedTuple):
    """Some rows of an array, those of its first dimension: layers of a stack.

    Attributes:
        name: the array's dotted name.
        start: the first row.
        numbers: the rows.
    """

    name: str
    start: int
    numbers: np.ndarray


def rows_of_a_chunk(shape: Sequence[int], dtype: Any) -> int:
    """How many rows of an array are written as one, or, where one is more than that, in parts.

    Either all of them or a power of two, so that blocks of two dtypes begin at chunks of both.
    """
    return _rows_of(shape, dtype, _CHUNK_BYTES)


def rows_of_a_block(shape: Sequence[int], dtype: Any) -> int:
    """How many rows of an array are on the host at a time: whole chunks."""
    return _rows_of(shape, dtype, max(_BLOCK_BYTES, _CHUNK_BYTES))


def is_large(shape: Sequence[int], dtype: Any) -> bool:
    """Whether an array is more than one block."""
    return len(ranges(shape, dtype)) > 1


def ranges(shape: Sequence[int], dtype: Any) -> list[tuple[int, int]]:
    """The first row of each block of an array, and the one after its last."""
    step = rows_of_a_block(shape, dtype)
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def blocks_of(name: str, array: Any) -> Iterator[Block]:
    """The blocks of an array, each copied to the host when it is asked for.

    Args:
        name: its dotted name.
        array: of JAX or numpy.
    """
    # On a CPU this is the device's memory. Elsewhere it would be a copy that the array keeps.
    whole = np.asarray(array) if not is_large(array.shape, array.dtype) or _on_cpu(array) else array
    for start, stop in ranges(array.shape, array.dtype):
        yield Block(name, start, np.asarray(whole[start:stop]))


def _on_cpu(array: Any) -> bool:
    if isinstance(array, np.ndarray):
        return True
    return all(device.platform == "cpu" for device in array.devices())


def _rows_of(shape: Sequence[int], dtype: Any, most_bytes: int) -> int:
    row = math.prod(shape[1:]) * np.dtype(dtype).itemsize
    rows = max(1, most_bytes // max(row, 1))
    return max(1, shape[0]) if rows >= shape[0] else 1 << (rows.bit_length() - 1)
