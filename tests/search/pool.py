"""Has several workers check the cases of seeds, each the next one that nobody has."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from .draw import Case
from .report import Report
from .shrink import shrunk
from .worker import Worker

__all__ = ["check_all", "shrink_with"]


def check_all(
    seeds: Iterable[int],
    case_of: Callable[[int], Case],
    workers: list[Worker],
    report: Report,
    deadline: float,
) -> None:
    """Checks the cases of seeds until there are no more, or the time is over.

    Args:
        seeds: in order.
        case_of: the case of a seed.
        workers: that share them.
        report: that hears of each.
        deadline: of `time.monotonic`; who is at it then ends its case.
    """
    left, lock = iter(seeds), threading.Lock()

    def work(worker: Worker) -> None:
        while time.monotonic() < deadline:
            with lock:
                seed = next(left, None)
            if seed is None:
                return
            case = case_of(seed)
            verdict = worker.check(case)
            with lock:
                report.add(seed, case, verdict)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def shrink_with(worker: Worker, case: Case, seconds: float) -> Case:
    """The smallest failing case that is found in so many seconds."""
    return shrunk(case, lambda one: worker.check(one).failed, time.monotonic() + seconds)
