"""Ctrl-C, held back while it would do harm."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

__all__ = ["interrupts_held_back"]


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """A Ctrl-C within the block takes effect at its end; a second one at once.

    Orbax writes from threads of its own. Broken off in between, they would go on writing
    into a directory that is being removed.
    """
    before = signal.getsignal(signal.SIGINT)
    # Python runs handlers in the main thread alone: elsewhere no Ctrl-C can interrupt.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came = 0

    def hold_back(number, frame):
        nonlocal came
        came += 1
        if came > 1:
            before(number, frame)

    signal.signal(signal.SIGINT, hold_back)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)
