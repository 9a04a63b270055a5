"""A tensor of a model with a LoRA adapter merged into it, computed while it is read.

The sums are those of peft's `merge_and_unload` on a CPU, rounded where it rounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from checkpoints.hf_files import StoredTensor
from checkpoints.stored import ALL, Derived

__all__ = ["Factors", "MergedTensor"]

# Numbers that are merged at a time: each takes some 16 bytes on the way.
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Factors:
    """The two matrices of a module's adapter.

    Attributes:
        a: lora_A `[r, in]`, or lora_embedding_A `[r, V]`.
        b: lora_B `[out, r]`, or lora_embedding_B `[D, r]`.
        scaling: what their product is multiplied by.
        embedding: whether the module is the embedding, whose matrix `[V, D]` is (b @ a).T.
    """

    a: StoredTensor
    b: StoredTensor
    scaling: float
    embedding: bool = False

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Two float32 matrices, `[rows, r]` and `[r, columns]`, of the module's matrix.

        Raises:
            CheckpointError: the file ends before a tensor does.
        """
        a, b = (np.empty(tensor.shape, np.float32) for tensor in (self.a, self.b))
        self.a.read_into(a)
        self.b.read_into(b)
        return (a.T, b.T) if self.embedding else (b, a)


@dataclasses.dataclass(frozen=True)
class MergedTensor(Derived):
    """A tensor W of a model as W + scaling * B @ A (LoRA, arXiv 2106.09685, equation 3).

    Attributes:
        base: the tensor W, not yet read, a matrix `[out, in]`.
        factors: its adapter, whose bytes are few beside W's.
    """

    factors: Factors

    def read_into(self, out: np.ndarray, part: slice = ALL) -> None:
        """Reads W, rounds it to the array's dtype, and merges.

        The product and its scaling are float32. They are added in float32 and the sum is
        rounded once. Only what an embedding is given is rounded to its dtype before, too.

        Args:
            out: contiguous, of the tensor's shape; bfloat16 or float32.
            part: all of it.

        Raises:
            CheckpointError: a file ends before a tensor does.
        """
        self.read_base(out)
        left, right = self.factors.read()
        scaling = np.float32(self.factors.scaling)
        for rows in _blocks(*out.shape):
            delta = left[rows] @ right
            delta *= scaling
            if self.factors.embedding:
                delta = delta.astype(out.dtype)
            out[rows] = out[rows].astype(np.float32) + delta.astype(np.float32, copy=False)


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    """Rows that are merged at a time, in blocks of one size or nearly.

    A block of a single row would be another function of BLAS, which sums in another order.
    """
    count = max(1, min(rows // 2, -(-rows * columns // _BLOCK)))
    for k in range(count):
        yield slice(rows * k // count, rows * (k + 1) // count)
