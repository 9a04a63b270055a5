"""Texts that end a text, looked for as it comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Looks for stop strings in one text, however it is cut, and holds back as little as it can.

    The match that is complete first wins; of those that end with the same character, the longest.
    So the outcome hangs on the text alone, and not on how it was cut. What `push` and `finish`
    return is, joined, the text up to the match, or all of it where there is none.

    Attributes:
        found: the stop string that has come; None as long as none has.
    """

    def __init__(self, strings: Sequence[str], *, include: bool = False):
        """Starts at the beginning of a text.

        Args:
            strings: what ends it, none of them empty; there may be none.
            include: whether the match itself is returned too.
        """
        self._strings = tuple(strings)
        self._longest = max(map(len, self._strings), default=0)
        self._include = include
        self._held = ""  # the longest end of the text that begins a stop string
        self.found: str | None = None

    def push(self, piece: str, *, may_end: bool = True) -> str:
        """What of the text is certain with another piece of it.

        Args:
            piece: what has come.
            may_end: whether the text may end with this piece. If not, matches that are complete
                in it are passed over.

        Returns:
            Characters that belong to no stop string, whatever comes; nothing once one was found.
        """
        if self.found is not None:
            return ""
        text = self._held + piece
        if may_end and (match := self._first(text)) is not None:
            start, end = match
            self.found, self._held = text[start:end], ""
            return text[: end if self._include else start]
        kept = len(text) - self._open(text)
        self._held = text[kept:]
        return text[:kept]

    def finish(self) -> str:
        """What was held back of a text that ends here."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str) -> tuple[int, int] | None:
        """Where the match that is complete first begins and ends; None: there is none."""
        starts = [(text.find(string), len(string)) for string in self._strings]
        ends = [(start + length, start) for start, length in starts if start >= 0]
        if not ends:
            return None
        end, start = min(ends)
        return start, end

    def _open(self, text: str) -> int:
        """How many characters at the end of a text may become a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(len(one) > length and one.startswith(end) for one in self._strings):
                return length
        return 0
