"""Lines that were typed, kept in the user's state folder from one chat to the next."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["History", "default_file"]

_MOST_LINES = 1000


def default_file() -> Path | None:
    """Where the lines are kept: in the place that the system has for a program's state.

    None where the user has no home.
    """
    if os.path.isabs(given := os.environ.get("XDG_STATE_HOME", "")):
        return Path(given) / "ffjax" / "chat_history"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "darwin":
        state = home / "Library" / "Application Support"
    elif sys.platform == "win32":
        state = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        state = home / ".local" / "state"
    return state / "ffjax" / "chat_history"


class History:
    """readline's list of lines, and a file that has them.

    The file belongs to the user alone: it holds what they have said. A line is written as soon as
    it is typed, so that a terminal that closes loses none. A file that cannot be read or written
    is passed over: the lines of this chat are there all the same.
    """

    def __init__(self, readline: ModuleType, file: Path | None):
        """Reads the file.

        Args:
            readline: the module.
            file: None to keep nothing.
        """
        self._readline, self._file = readline, file
        readline.set_auto_history(False)
        readline.clear_history()
        readline.set_history_length(_MOST_LINES)
        if file is None:
            return
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.read_history_file(file)
            readline.write_history_file(file)  # which cuts it to the length

    def add(self, line: str) -> None:
        """Takes in a line, unless it says again what the last one does."""
        count = self._readline.get_current_history_length()
        # A line that is pasted may hold several; the file has one in each line.
        for one in line.splitlines():
            if one.strip() and one != self._readline.get_history_item(count):
                self._readline.add_history(one)
                count += 1
                self._keep()

    def _keep(self) -> None:
        append = getattr(self._readline, "append_history_file", None)
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            if append is None:  # some builds with libedit
                self._readline.write_history_file(self._file)
            else:
                append(1, self._file)
