"""Several walks at once: in threads of this process, or in processes of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from soak.walk import Walk, Walker

__all__ = ["in_processes", "in_threads"]

_ROOT = pathlib.Path(__file__).parents[2]


def in_threads(walker: Walker, count: int) -> list[list[str]]:
    """The digests of so many walks that threads take at once."""
    start = threading.Barrier(count)

    def take() -> list[str]:
        start.wait()
        return walker.take()

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(take) for _ in range(count)]
        return [future.result() for future in futures]


def in_processes(walk: Walk, count: int) -> list[list[str]]:
    """The digests of so many walks that processes take at once, on the same device.

    Each loads its model and compiles first; none begins before all have.

    Raises:
        RuntimeError: a process ended otherwise; the message has its last words.
    """
    command = [sys.executable, "-m", "soak.walk", json.dumps(dataclasses.asdict(walk))]
    paths = [str(_ROOT / "tests"), str(_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # none takes the others' memory
    }
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(_started(command, environment)) for _ in range(count)]
        for process in running:
            _line(process)
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [_line(process) for process in running]


@contextlib.contextmanager
def _started(command: list[str], environment: dict[str, str]):
    with subprocess.Popen(
        command,
        env=environment,
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _line(process: subprocess.Popen[str]):
    """The next thing that a process says."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(
            f"A process of the soak ended with exit code {process.wait()} before it had taken its "
            "steps. Its own words stand above."
        )
    return json.loads(line)
