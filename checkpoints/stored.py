"""What readers of files hand on: tensors that are described, and not yet read."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

__all__ = ["ALL", "Derived", "Described", "Stored"]

ALL = slice(None)
"""The one part of what is read whole."""


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


@dataclasses.dataclass(frozen=True)
class Derived:
    """What is made of a tensor in a file when it is read, whole: it is described as that one is.

    Attributes:
        base: the tensor, not yet read.
    """

    base: Stored

    @property
    def name(self) -> str:
        """Its name in its file."""
        return self.base.name

    @property
    def dtype(self) -> str:
        """What its file calls its numbers."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.base.shape

    @property
    def nbytes(self) -> int:
        """How many bytes of its file it takes."""
        return self.base.nbytes

    def parts(self) -> list[slice]:
        """All of it: what one part is of the tensor is the tensor's own affair."""
        return [ALL]

    def read_base(self, out: np.ndarray) -> None:
        """Reads the tensor as it is, part by part.

        Args:
            out: an array of its shape.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        for one in self.base.parts():
            self.base.read_into(out, one)
