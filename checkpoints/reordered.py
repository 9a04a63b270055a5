"""Tensors whose rows lie in another order than those of our arrays."""

from __future__ import annotations

import dataclasses

import numpy as np

from checkpoints.stored import Stored

__all__ = ["Reordered", "in_their_order"]

_ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class Reordered:
    """A tensor read into our order of rows; as `stored.Stored`.

    Attributes:
        base: the tensor, not yet read.
        order: which of its rows each of ours is.
    """

    base: Stored
    order: tuple[int, ...]

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
        """All of it: a row may go anywhere."""
        return [_ALL]

    def read_into(self, out: np.ndarray, part: slice = _ALL) -> None:
        """Reads it into an array of its shape, rounding to the array's dtype.

        Args:
            out: the array.
            part: all of it.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        theirs = np.empty_like(out)
        for one in self.base.parts():
            self.base.read_into(theirs, one)
        np.take(theirs, self.order, axis=0, out=out)


def in_their_order(rows: np.ndarray, order: tuple[int, ...] | None) -> np.ndarray:
    """Rows of ours in the order of the tensor that `Reordered` reads them from.

    Args:
        rows: the rows.
        order: which of the tensor's rows each of these is; None: they are in its order.
    """
    if order is None:
        return rows
    theirs = np.empty_like(rows)
    theirs[list(order)] = rows
    return theirs
