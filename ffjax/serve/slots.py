"""Which row a request enters, so that as little as possible is fed twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["Slots"]


class Slots:
    """What the caches of a batch's rows hold, and which free row suits a prompt.

    A conversation's next turn begins with all that its row holds, so it goes on there. Another
    conversation may share a beginning too, as a system message: to go on there would cost the first
    one its cache. So a row is continued where it keeps at least as many tokens as it loses; else
    the row is taken that was not used for the longest time, with what it happens to share.
    """

    def __init__(self, rows: int):
        """Of rows whose caches hold nothing."""
        self._held = [np.empty(0, np.int32) for _ in range(rows)]
        self._used = [0] * rows
        self._clock = 0

    def choose(self, free: Iterable[int], prompt: Sequence[int]) -> tuple[int, int]:
        """A row for a prompt.

        Args:
            free: the rows without a request, at least one.
            prompt: its token ids, at least one.

        Returns:
            The row, and how many of the prompt's first tokens its cache holds. At least one token
            is left to feed: its logits choose the first new one.
        """
        tokens = np.asarray(prompt, np.int32)
        shared = {row: self._shared(row, tokens) for row in free}
        best = max(shared, key=lambda row: (shared[row], -self._used[row]))
        if 2 * shared[best] < len(self._held[best]) or not shared[best]:
            best = min(shared, key=lambda row: (self._used[row], row))
        return best, min(shared[best], len(tokens) - 1)

    def entered(self, row: int) -> None:
        """A request has entered the row: nobody knows now what its cache holds."""
        self._clock += 1
        self._used[row] = self._clock
        self._held[row] = np.empty(0, np.int32)

    def left(self, row: int, tokens: Sequence[int]) -> None:
        """A request has left the row, whose cache holds these tokens from its beginning."""
        self._held[row] = np.asarray(tokens, np.int32)

    def _shared(self, row: int, tokens: np.ndarray) -> int:
        held = self._held[row]
        most = min(len(held), len(tokens))
        differ = np.flatnonzero(held[:most] != tokens[:most])
        return int(differ[0]) if differ.size else most
