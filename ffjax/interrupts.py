"""Ctrl-C and signals that end a process: held back while they would do harm, unwound, not lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["ctrl_c_is_kept", "interrupts_held_back", "stops_unwind"]

# What ends a process and lets it say goodbye: `kill`, `timeout`, a container or a batch system
# that stops; a terminal that closes. Windows has no SIGHUP.
_ENDS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
# After which a Ctrl-C that was lost comes again: its callback has ended by then.
_LATER_SECONDS = 0.02


class _Stopped(BaseException):
    """A signal has come that ends the process."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """A Ctrl-C within the block takes effect at its end; a second one at once.

    So does a SIGTERM or SIGHUP that something handles, `stops_unwind` for one.

    Orbax writes from threads of its own. Broken off in between, they would go on writing
    into a directory that is being removed.
    """
    # Python runs handlers in the main thread alone: elsewhere no signal can interrupt.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, *_ENDS)}
    before = {number: handler for number, handler in found.items() if callable(handler)}
    came: list[int] = []

    def hold_back(number, frame):
        came.append(number)
        if len(came) > 1:
            before[number](number, frame)

    for number in before:
        signal.signal(number, hold_back)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def stops_unwind() -> Iterator[None]:
    """A SIGTERM or SIGHUP within the block first unwinds it, then ends the process as ever.

    A second one ends it at once. Signals that the program handles or ignores are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in _ENDS if signal.getsignal(number) is signal.SIG_DFL]
    stopped: _Stopped | None = None

    def stop(number, frame):
        signal.signal(number, signal.SIG_DFL)
        raise _Stopped(number)

    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    except _Stopped as error:
        stopped = error
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
    if stopped is not None:
        signal.raise_signal(stopped.number)
        raise SystemExit(128 + stopped.number)  # where the signal is blocked


@contextlib.contextmanager
def ctrl_c_is_kept() -> Iterator[None]:
    """A Ctrl-C within the block that finds Python in a callback comes again after it.

    What a callback of the garbage collector or of a weak reference raises, or a `__del__`, Python
    would print and forget.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
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
