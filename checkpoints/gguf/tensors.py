"""The numbers of a GGUF file's tensors: read, made whole, and put in our order.

Quantized ones are made whole by the package gguf, of the extra `gguf`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from checkpoints.hf_files import fill
from checkpoints.stored import ALL

__all__ = ["PLAIN", "SIZES", "GGUFTensor", "check_package", "type_name"]

# Of the types that are read: how many numbers a block has, and how many bytes.
SIZES = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "F64": (1, 8),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}

PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F64": np.dtype(np.float64),
}

# All types there are, by the number in the file: what is refused is called by its name.
_TYPES = {
    **dict(enumerate(("F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0"))),
    **dict(enumerate(("Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"), 9)),
    **dict(enumerate(("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S"), 16)),
    **dict(enumerate(("IQ4_XS", "I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16"), 23)),
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}

# Numbers that are made whole at a time: each takes up to some 20 bytes on the way.
_BLOCK = 1 << 18
# Numbers that a thread reads at a time.
_PART = 16 << 20


def type_name(number: int) -> str:
    """What a type of tensors is called, by its number in the file."""
    return _TYPES.get(number, f"type {number}")


class GGUFTensor(NamedTuple):
    """A tensor in a GGUF file.

    Attributes:
        name: its name there.
        file: the file.
        dtype: its type: "F32", "Q4_K".
        shape: its shape, that of a matrix [out, in].
        offset: where its bytes start in the file.
        nbytes: how many bytes it takes.
        heads: how many heads' rows are in GGUF's order for RoPE; 0, none are.
        less: what is subtracted from its numbers.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    heads: int = 0
    less: float = 0.0

    @property
    def rows(self) -> int:
        """How many rows it has; a vector is one row."""
        return math.prod(self.shape[:-1])

    def parts(self) -> list[slice]:
        """The rows of the tensor in parts that can be read side by side."""
        step = self._unit * max(1, _PART // (self._unit * self._columns))
        return [slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def read_into(self, out: np.ndarray, part: slice = ALL) -> None:
        """Reads rows into an array, rounding where the array's dtype is another.

        Args:
            out: contiguous, of the tensor's shape; bfloat16 or float32.
            part: which of the rows, one of `parts`; all of them if not said.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        first, last, _ = part.indices(self.rows)
        step = self._unit * max(1, _BLOCK // (self._unit * self._columns))
        rows = out.reshape(self.rows, self._columns)
        row_bytes = self.nbytes // max(1, self.rows)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + first * row_bytes)
            for start in range(first, last, step):
                count = min(step, last - start)
                stored = np.empty((count, row_bytes), np.uint8)
                fill(file, stored, self)
                numbers = self._whole(stored)
                if self.less:
                    numbers = numbers.astype(np.float32) - np.float32(self.less)
                into = rows[start : start + count]
                if self.heads:
                    # Theirs has the two numbers that RoPE turns together side by side; ours has
                    # all the first ones of a head, then all the second ones.
                    half = self._unit // 2
                    into = into.reshape(-1, 2, half, self._columns).swapaxes(1, 2)
                    numbers = numbers.reshape(-1, half, 2, self._columns)
                into[...] = numbers

    @property
    def _columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def _unit(self) -> int:
        """Rows that are read together."""
        return self.rows // self.heads if self.heads else 1

    def _whole(self, stored: np.ndarray) -> np.ndarray:
        """Numbers from the bytes of rows."""
        if (plain := PLAIN.get(self.dtype)) is not None:
            return stored.view(plain)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return dequantize(stored, GGMLQuantizationType[self.dtype])


def check_package(tensors: list[GGUFTensor]) -> None:
    """Whether the package is there that makes quantized tensors whole, if some are.

    Raises:
        NotImplementedError: it is not installed.
    """
    kinds = sorted({tensor.dtype for tensor in tensors} - PLAIN.keys())
    if not kinds:
        return
    try:
        import gguf.quants  # noqa: F401 - it is used when numbers are read
    except ImportError as error:
        raise NotImplementedError(
            f"Reading {', '.join(kinds)} of a GGUF file needs the package gguf. Install it with: "
            "pip install 'ffjax[gguf]'."
        ) from error
