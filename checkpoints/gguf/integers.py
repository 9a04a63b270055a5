"""Matrices of a GGUF file whose blocks are integers with scales that we keep.

Blocks of 32 inputs (ggml-common.h of https://github.com/ggml-org/ggml): Q4_0 is a float16 d and 16
bytes, of which the low nibbles are the first 16 integers n and the high ones the others; it stands
for d * (n - 8). Q4_1 has a float16 m after d, and stands for d * n + m. Q8_0 is a float16 d and 32
bytes with signs, and stands for d * n.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from checkpoints.gguf.tensors import GGUFTensor
from checkpoints.hf_files import fill
from checkpoints.integers import with_offset
from ffjax.formats import WeightFormat, int4

__all__ = ["KEPT", "GGUFIntegers"]

KEPT = {
    "Q4_0": int4(32, "float16"),
    "Q4_1": int4(32, "float16", "minimum"),
    "Q8_0": WeightFormat(bits=8, group_size=32, scale_dtype="float16"),
}
"""Types whose numbers are kept, and the formats of ours that hold them."""

_INPUTS = 32
_HALF = np.dtype("<f2")


@dataclasses.dataclass(frozen=True)
class GGUFIntegers:
    """A matrix of blocks; see `checkpoints.integers`.

    Attributes:
        tensor: where it lies, and whose rows are in GGUF's order for RoPE.
    """

    tensor: GGUFTensor

    @property
    def name(self) -> str:
        """Its name there."""
        return self.tensor.name

    @property
    def dtype(self) -> str:
        """Its type: "Q4_0"."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """`[out, in]`."""
        return self.tensor.shape

    @property
    def nbytes(self) -> int:
        """How many bytes of the file it takes."""
        return self.tensor.nbytes

    @property
    def format(self) -> WeightFormat:
        """How it is stored, as ours."""
        return KEPT[self.tensor.dtype]

    def numbers(self) -> np.ndarray:
        """Its integers; see `IntegerMatrix`."""
        stored = self._stored()[..., self._ends :]
        if self.format.bits == 8:
            return np.ascontiguousarray(stored).view(np.int8).reshape(self.shape)
        made = np.empty((*stored.shape[:-1], _INPUTS), np.uint8)
        made[..., : _INPUTS // 2] = stored & 15
        made[..., _INPUTS // 2 :] = stored >> 4
        return made.reshape(self.shape)

    def scale(self, format: WeightFormat) -> np.ndarray:
        """Its scales in a format of ours; see `IntegerMatrix`."""
        stored = np.ascontiguousarray(self._stored()[..., : self._ends])
        scale = stored.view(_HALF).astype(np.float16)
        scale = scale if self.format.offset else scale[..., 0]
        return with_offset(scale, self.format, format, self.name)

    @property
    def _ends(self) -> int:
        """Bytes of a block before its integers."""
        return 4 if self.format.offset else 2

    def _stored(self) -> np.ndarray:
        """Its blocks, uint8 `[out, blocks, bytes]`."""
        tensor = self.tensor
        rows, inputs = tensor.shape
        blocks = inputs // _INPUTS
        stored = np.empty((rows, blocks, tensor.nbytes // (rows * blocks)), np.uint8)
        with tensor.file.open("rb", buffering=0) as file:
            file.seek(tensor.offset)
            fill(file, stored, tensor)
        if tensor.heads:  # as in `GGUFTensor.read_into`, of whole rows
            half = rows // tensor.heads // 2
            stored = stored.reshape(tensor.heads, half, 2, blocks, -1).swapaxes(1, 2)
            stored = np.ascontiguousarray(stored).reshape(rows, blocks, -1)
        return stored
