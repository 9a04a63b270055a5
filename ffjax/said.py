"""What the library chose, and why: said once in a process, by the logger `ffjax`."""

from __future__ import annotations

import functools
import logging

__all__ = ["say_once"]

_log = logging.getLogger("ffjax")


@functools.lru_cache
def say_once(message: str) -> None:
    """Says a sentence at level INFO, unless it has been said.

    Args:
        message: the sentence.
    """
    _log.info(message)
