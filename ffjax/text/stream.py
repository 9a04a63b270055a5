"""One text, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from ffjax.text.completion import Completion

__all__ = ["TextStream"]


class TextStream(Iterator[str]):
    """Iterates over the pieces of one text as they come.

    A piece is never empty. None splits a character, loses a word's leading space or shows a part
    of a stop string. Breaking off, by leaving the loop, by `close`, by leaving its `with` block or
    by Ctrl-C, frees what the text needed; what has come stays in `completion`. So it does where
    `NotFiniteError` is raised.
    """

    def __init__(self, pieces: Generator[str, None, None], so_far: Callable[[], Completion]):
        """Made by `Generator.stream`, `Generator.stream_chat` and `ChatSession.reply`."""
        # Neither holds this object: dropping it frees all at once.
        self._pieces, self._so_far = pieces, so_far

    def __iter__(self) -> TextStream:
        """The stream is its own iterator: it can be run through once."""
        return self

    def __next__(self) -> str:
        """The next characters."""
        return next(self._pieces)

    def __enter__(self) -> TextStream:
        """The stream itself; leaving the block closes it."""
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the text where it is; may be called again."""
        self._pieces.close()

    @property
    def completion(self) -> Completion:
        """What has come so far; its finish reason is None while the text goes on."""
        return self._so_far()
