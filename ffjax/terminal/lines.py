"""Where lines come from: a terminal whose lines can be edited, or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from ffjax.terminal.history import History
from ffjax.terminal.screen import Screen

__all__ = ["Completer", "Lines", "lines_for"]

Completer = Callable[[str], Sequence[str]]
"""Takes a line up to the cursor, and returns what its last word may be made."""


class Lines(Protocol):
    """A source of lines."""

    def read(self, prompt: str) -> str:
        """The next line, without its end.

        Args:
            prompt: shown before it, where a person types it.

        Raises:
            EOFError: there is none.
            KeyboardInterrupt: Ctrl-C was typed in its place.
        """
        ...


class PlainLines:
    """Lines as they come, without editing; a prompt for a person is on stderr."""

    def __init__(self, *, prompts: bool):
        self._prompts = prompts

    def read(self, prompt: str) -> str:
        if self._prompts:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline() if sys.stdin is not None else ""
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")


class EditedLines:
    """Lines that Python's readline edits, with a history and completion by the tab key."""

    def __init__(self, completer: Completer, history: Path | None):
        import readline

        self._history = History(readline, history)
        self._completer, self._found = completer, []
        readline.set_completer_delims(" \t")
        readline.set_completer(self._complete)
        is_libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")

    def read(self, prompt: str) -> str:
        line = input(prompt)
        self._history.add(line)
        return line

    def _complete(self, word: str, number: int) -> str | None:
        import readline

        if number == 0:
            self._found = list(self._completer(readline.get_line_buffer()[: readline.get_endidx()]))
        return self._found[number] if number < len(self._found) else None


def lines_for(screen: Screen, completer: Completer, history: Path | None) -> Lines:
    """The lines of this process's stdin.

    readline is imported for a terminal alone: on some systems it writes to stdout when imported.

    Args:
        screen: says whether a person types, and can edit.
        completer: for the tab key.
        history: the file of earlier lines; None to keep none.
    """
    if screen.edits:
        try:
            return EditedLines(completer, history)
        except ImportError:  # Windows, and some small builds
            pass
    return PlainLines(prompts=screen.interactive)
