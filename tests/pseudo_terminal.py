"""A program at a terminal of a test's: a pseudo terminal, with keys, a size and what it shows."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["CTRL_A", "CTRL_C", "CTRL_D", "CTRL_U", "UP", "Terminal", "terminal"]

CTRL_A, CTRL_C, CTRL_D, CTRL_U, UP = "\x01", "\x03", "\x04", "\x15", "\x1b[A"
_SECONDS = 90  # the machine may be busy
# What readline and dim text send beside the text itself.
_PROMPT = re.compile(r"(^|\n)[^\n ]+ $")
_ORDERS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()=>][0-9A-B]?")


class Terminal:
    """A process whose stdin, stdout and stderr are one pseudo terminal.

    Attributes:
        raw: all that it has sent.
    """

    def __init__(self, process: subprocess.Popen[bytes], main: int):
        self.raw = b""
        self._process, self._main, self._seen = process, main, 0

    @property
    def text(self) -> str:
        """What it has sent, without orders to the terminal."""
        return _plain(self.raw.decode(errors="replace"))

    def keys(self, text: str) -> None:
        """Types."""
        os.write(self._main, text.encode())

    def line(self, text: str, end: str = "\r") -> None:
        """Types a line once the program waits for one, after a prompt that ends with a space."""
        until = time.monotonic() + _SECONDS
        while not _PROMPT.search(self.text):
            assert self._read(until - time.monotonic()), f"no prompt after {self.text[-200:]!r}"
        self.keys(text + end)

    def expect(self, pattern: str) -> str:
        """Waits for text that a regular expression finds, after what was found before.

        A space of the expression is a line's end, too, and its indent: lines are wrapped.
        """
        pattern = re.sub(" (?!$)", r"\\s+", pattern)
        end = time.monotonic() + _SECONDS
        while True:
            text = self.text
            if (found := re.search(pattern, text[self._seen :])) is not None:
                self._seen += found.end()
                return found[0]
            if not self._read(end - time.monotonic()):
                raise AssertionError(f"{pattern!r} did not come after {text[self._seen :]!r}")

    def end(self) -> int:
        """Waits for the process to end, and returns its exit code."""
        until = time.monotonic() + _SECONDS
        while self._process.poll() is None and time.monotonic() < until:
            self._read(0.1)
        while self._read(0.1):
            pass
        return self._process.wait(1)

    def _read(self, seconds: float) -> bool:
        """Takes in what has come; returns whether something did."""
        ready, _, _ = select.select([self._main], [], [], max(0.0, seconds))
        if not ready:
            return False
        try:
            data = os.read(self._main, 65536)
        except OSError:  # the other end is closed
            return False
        self.raw += data
        return bool(data)


def _plain(text: str) -> str:
    return _ORDERS.sub("", text).replace("\r\n", "\n")


@contextlib.contextmanager
def terminal(
    command: Sequence[str | Path],
    *,
    columns: int = 100,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> Iterator[Terminal]:
    """Runs a command at a pseudo terminal, and ends it with the block."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    # Processes that share the tests are told the size of the terminal that shows their results.
    sizes = "COLUMNS", "LINES"
    inherited = {name: value for name, value in os.environ.items() if name not in sizes}
    process = subprocess.Popen(
        [sys.executable, "-S", __file__, *map(str, command)],
        stdin=side,
        stdout=side,
        stderr=side,
        cwd=cwd,
        env={**inherited, "TERM": "xterm-256color", **(env or {})},
        start_new_session=True,
    )
    os.close(side)
    try:
        yield Terminal(process, main)
    finally:
        process.kill()
        process.wait()
        os.close(main)


def _take() -> None:
    """In the new process: makes the terminal its own, so that Ctrl-C reaches it, and goes on."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    _take()
