"""Where the time goes from the start of a command to its first token."""

from __future__ import annotations

import time

__all__ = ["StartUp"]

# As early as there is anything of ours: the command line imports this module first. Python itself
# has taken some hundredths of a second before.
_STARTED = time.perf_counter()


class StartUp:
    """The stages of a start, in seconds.

    Attributes:
        seconds: of each stage by its name, in the order in which they came.
    """

    def __init__(self) -> None:
        """Begins with the first stage, as old as this process."""
        self.seconds: dict[str, float] = {}
        self._last = _STARTED

    def ended(self, stage: str) -> None:
        """Notes that a stage has ended; the next begins now."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now
