"""The most memory a process holds, told apart by what the system can take back. Linux alone tells.

`python -m tests.peak_memory ffjax convert IN OUT` runs a command and prints it.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Peak", "Watch", "main", "measured"]

_EVERY_SECONDS = 0.005


class Watch:
    """Looks at a process's memory every 5 ms, from a thread.

    Attributes:
        held: the most of RssAnon + RssShmem so far, in bytes: what a machine runs out of.
        mapped: the most of RssFile so far, in bytes: pages of mapped files, which the system takes
            back.
    """

    def __init__(self, pid: int | str = "self"):
        """Begins to look.

        Args:
            pid: the process.
        """
        self.held = self.mapped = 0
        self._status = Path(f"/proc/{pid}/status")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self.look()
        self._thread.start()

    def look(self) -> None:
        """Looks once; of a process that has ended there is nothing to see."""
        try:
            lines = self._status.read_text().splitlines()
        except OSError:
            return
        pairs = (line.split(":") for line in lines if line.startswith("Rss"))
        now = {name: int(value.split()[0]) * 1024 for name, value in pairs}
        self.held = max(self.held, now.get("RssAnon", 0) + now.get("RssShmem", 0))
        self.mapped = max(self.mapped, now.get("RssFile", 0))

    def end(self) -> None:
        """Looks no more."""
        self._ended.set()
        self._thread.join()

    def _look_on(self) -> None:
        while not self._ended.wait(_EVERY_SECONDS):
            self.look()


@dataclasses.dataclass(frozen=True)
class Peak:
    """What a process took.

    Attributes:
        held: as in `Watch`.
        mapped: likewise.
        resident: ru_maxrss, in bytes: the most of both together.
        seconds: from start to end.
        cpu: seconds of processors.
        code: its exit code.
        said: its stdout and stderr.
    """

    held: int
    mapped: int
    resident: int
    seconds: float
    cpu: float
    code: int
    said: str


def measured(command: Sequence[str | Path], env: dict[str, str] | None = None) -> Peak:
    """Runs a command.

    Args:
        command: the program and its arguments.
        env: variables besides those of this process.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(one) for one in command],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    watch = Watch(process.pid)
    assert process.stdout is not None
    said = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    watch.end()
    return Peak(
        watch.held,
        watch.mapped,
        usage.ru_maxrss * 1024,
        time.perf_counter() - start,
        usage.ru_utime + usage.ru_stime,
        process.returncode,
        said,
    )


def main(arguments: list[str]) -> int:
    """Runs a command, and prints what it said and took; returns its exit code."""
    if arguments[:1] == ["ffjax"]:
        arguments = [sys.executable, "-m", *arguments]
    peak = measured(arguments)
    print(peak.said, end="")
    print(
        f"held {peak.held / 2**30:.2f} GiB, mapped {peak.mapped / 2**30:.2f} GiB, "
        f"resident {peak.resident / 2**30:.2f} GiB; {peak.seconds:.0f} s, {peak.cpu:.0f} s of CPU"
    )
    return peak.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
