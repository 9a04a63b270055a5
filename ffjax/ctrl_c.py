"""Ctrl-C that comes where Python or JAX would lose it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["ctrl_c_is_kept", "ctrl_c_waits"]

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
    """A Ctrl-C within the block that finds Python in a callback comes again after it.

    What a callback of the garbage collector or of a weak reference raises, or a `__del__`, Python
    would print and forget.
    """
    if not _is_ours():
        yield
        return
    other = sys.unraisablehook

    def again(forgotten: Any) -> None:
        if issubclass(forgotten.exc_type, KeyboardInterrupt):
            # Not at once: this, too, is within the callback.
            later = threading.Timer(_LATER_SECONDS, os.kill, (os.getpid(), signal.SIGINT))
            later.daemon = True
            later.start()
        else:
            other(forgotten)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = other


def _is_ours() -> bool:
    """Whether this thread gets Ctrl-C, and nobody else has seen to it."""
    return (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
