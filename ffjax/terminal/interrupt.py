"""Ctrl-C while an answer comes: it stops the answer, and not the program."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator

__all__ = ["Stop", "stops_the_answer"]


@dataclasses.dataclass
class Stop:
    """Whether a person wants an answer to stop.

    Attributes:
        asked: whether they do.
        began: whether some of the answer has been shown.
    """

    asked: bool = False
    began: bool = False


@contextlib.contextmanager
def stops_the_answer(tell: Callable[[str], None]) -> Iterator[Stop]:
    """Within it, a Ctrl-C is noted, and a second one raises KeyboardInterrupt where it comes.

    The first one finds the answer between two pieces of text, where all is in order. The second
    one is for what takes longer, the prefill of a long text or compiling.

    Args:
        tell: shows a line; it is called while nothing else is printed.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number, frame):
        if stop.asked:
            signal.default_int_handler(number, frame)
        stop.asked = True
        if not stop.began:
            tell("\nStopping at the first token; Ctrl-C again breaks off sooner.")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
