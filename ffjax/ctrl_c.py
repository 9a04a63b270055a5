"""Ctrl-C that comes where Python or JAX would lose it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["ctrl_c_is_kept", "ctrl_c_waits"]

# Functions that Python calls of its own accord: what they raise is printed and forgotten.
_FORGETFUL = ("_xla_gc_callback", "__del__")
_LATER_SECONDS = 0.02


@contextlib.contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """A Ctrl-C within the block takes effect at its end."""
    if not _is_ours():
        yield
        return
    came = []
    signal.signal(signal.SIGINT, lambda *_: came.append(1))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


@contextlib.contextmanager
def ctrl_c_is_kept() -> Iterator[None]:
    """A Ctrl-C within the block that finds Python in a callback comes again after it."""
    if not _is_ours():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_name in _FORGETFUL:
                again = threading.Timer(_LATER_SECONDS, os.kill, (os.getpid(), number))
                again.daemon = True
                again.start()
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_ours() -> bool:
    """Whether this thread gets Ctrl-C, and nobody else has seen to it."""
    return (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
