"""What readers of files hand on: tensors that are described, and not yet read."""

from __future__ import annotations

from typing import Protocol

import numpy as np

__all__ = ["Described", "Stored"]


class Described(Protocol):
    """What is said of a tensor, or a matrix, in a file."""

    @property
    def name(self) -> str:
        """Its name there."""
        ...

    @property
    def dtype(self) -> str:
        """What the file's format calls its numbers: "BF16", "Q4_K", "GPTQ"."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, that of a matrix [out, in]."""
        ...

    @property
    def nbytes(self) -> int:
        """How many bytes of the file it takes."""
        ...


class Stored(Described, Protocol):
    """A tensor in a file, not yet read."""

    def parts(self) -> list[slice]:
        """Parts that can be read side by side."""
        ...

    def read_into(self, out: np.ndarray, part: slice) -> None:
        """Reads one of the parts into an array of the whole tensor's shape, rounding to its dtype.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        ...
