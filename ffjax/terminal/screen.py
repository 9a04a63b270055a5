"""What is printed where: answers on stdout, all else on stderr, dim where that can be shown."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import textwrap
from collections.abc import Mapping
from typing import TextIO

__all__ = ["Screen", "harmless"]

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_ERASED = "\r\x1b[K"
_NARROWEST = 20
# A model may say what a terminal would take for an order: those characters are shown as pictures.
_SHOWN = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t\r"},
    **dict.fromkeys([0x7F, *range(0x80, 0xA0)], 0xFFFD),
    ord("\r"): None,
}


def harmless(text: str) -> str:
    """The text without characters that move a terminal's cursor or change its colours."""
    return text.translate(_SHOWN)


class Screen:
    """Prints for a person at a terminal, or for whoever reads a pipe.

    Attributes:
        interactive: whether a person types: stdin is a terminal.
        edits: whether lines can be edited: stdout is one, too.
    """

    def __init__(self, environ: Mapping[str, str]):
        """Looks at this process's three files.

        Args:
            environ: for NO_COLOR and TERM.
        """
        self.interactive = _is_terminal(sys.stdin)
        self.edits = self.interactive and _is_terminal(sys.stdout)
        self._shows = _is_terminal(sys.stdout)
        self._notes_shown = _is_terminal(sys.stderr)
        self._moves = self._notes_shown and environ.get("TERM", "dumb") not in ("dumb", "")
        self._dims = self._moves and not environ.get("NO_COLOR")
        self._waits = False

    def piece(self, text: str) -> None:
        """A piece of an answer."""
        if text:
            print(harmless(text) if self._shows else text, end="", flush=True)

    def note(self, text: str, *, indent: str = "") -> None:
        """Something about the chat, a line or several, wrapped where a terminal shows it.

        Args:
            text: its lines.
            indent: put before a line's second row and those that follow.
        """
        lines = text.splitlines() or [""]
        if self._notes_shown:
            width = max(_NARROWEST, shutil.get_terminal_size().columns - 1)
            lines = [
                row
                for line in lines
                for row in textwrap.wrap(harmless(line), width, subsequent_indent=indent) or [""]
            ]
        self._put("\n".join(lines), end="\n")

    def wait(self, text: str) -> None:
        """Something that is shown until `waited`, where a terminal can take it away again."""
        if self._moves and self.edits:
            self._put(text[: shutil.get_terminal_size().columns - 1], end="")
            self._waits = True

    def waited(self) -> None:
        """Takes it away."""
        if self._waits:
            self._waits = False
            with contextlib.suppress(OSError, ValueError):
                print(_ERASED, end="", file=sys.stderr, flush=True)

    def _put(self, text: str, *, end: str) -> None:
        if self._dims and text:
            text = f"{_DIM}{text}{_PLAIN}"
        # stdout first: both may be one terminal. Where stderr is closed, the chat goes on.
        sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError):
            print(text, end=end, file=sys.stderr, flush=True)

    def read_any_bytes(self) -> None:
        """From here on, bytes of stdin that are no text are lone surrogates, and can be told of.

        Before anything has been read.
        """
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")


def _is_terminal(file: TextIO | None) -> bool:
    try:
        return file is not None and file.isatty()
    except ValueError:  # closed
        return False
