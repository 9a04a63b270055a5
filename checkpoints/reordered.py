"""Tensors whose rows lie in another order than those of our arrays."""

from __future__ import annotations

import dataclasses

import numpy as np

from checkpoints.stored import ALL, Derived

__all__ = ["Reordered", "in_their_order"]


@dataclasses.dataclass(frozen=True)
class Reordered(Derived):
    """A tensor read into our order of rows; as `stored.Stored`.

    Attributes:
        base: the tensor, not yet read.
        order: which of its rows each of ours is.
    """

    order: tuple[int, ...]

    def read_into(self, out: np.ndarray, part: slice = ALL) -> None:
        """Reads it into an array of its shape, rounding to the array's dtype.

        Args:
            out: the array.
            part: all of it.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        theirs = np.empty_like(out)
        self.read_base(theirs)
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
