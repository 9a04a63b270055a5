"""Lengths of prompts: the same for all sequences, or from a shortest to a longest."""

from __future__ import annotations

import dataclasses

__all__ = ["Span"]


@dataclasses.dataclass(frozen=True)
class Span:
    """Lengths of the prompts of a batch, evenly spread.

    Attributes:
        shortest: tokens of the first prompt.
        longest: tokens of the last.
    """

    shortest: int
    longest: int

    @property
    def ragged(self) -> bool:
        """Whether the lengths differ."""
        return self.shortest != self.longest

    def lengths(self, batch: int) -> tuple[int, ...]:
        """Tokens of each of `batch` prompts, shortest first; two at least where they differ."""
        if not self.ragged:
            return (self.shortest,) * batch
        step = (self.longest - self.shortest) / (batch - 1)
        return tuple(round(self.shortest + i * step) for i in range(batch))

    def __str__(self) -> str:
        return f"{self.shortest}-{self.longest}" if self.ragged else str(self.shortest)
