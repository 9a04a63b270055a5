"""A progress bar of bytes, on stderr where that is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

__all__ = ["byte_bar", "peak_host_memory"]


@contextlib.contextmanager
def byte_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for the block; what it yields is told the bytes done, and of how many."""
    from tqdm import tqdm

    # disable=None: where stderr is no terminal.
    with tqdm(
        desc=what, unit="B", unit_scale=True, file=sys.stderr, leave=False, disable=None
    ) as bar:

        def told(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield told


def peak_host_memory() -> int | None:
    """The most memory this process has held so far, in bytes; None where that is not known."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
