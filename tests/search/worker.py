"""Processes that check cases: one that dies, or hangs, costs the search nothing but its case.

A worker reads a case a line, as JSON, and answers with a line. What else is printed goes to its
standard error, the end of which tells why it died.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from .draw import Case

__all__ = ["Verdict", "Worker", "serve"]

_ROOT = pathlib.Path(__file__).parents[2]
_TOLD = 600  # characters of what a dead worker last said
# Workers share a GPU: none takes what it does not need.
_ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "JAX_ENABLE_X64": "0",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


class Verdict(NamedTuple):
    """What became of a case.

    Attributes:
        kind: "right", "wrong", "refused", "died" or "hung".
        why: a sentence; of what is right, empty.
    """

    kind: str
    why: str

    @property
    def failed(self) -> bool:
        """Whether it is a failure: a refusal is none."""
        return self.kind not in ("right", "refused")


class Worker:
    """A process, started when it is needed.

    Args:
        limit_s: seconds that a case may take; may be changed.
        command: what is run, instead of the search's own worker.
    """

    def __init__(self, limit_s: float, command: list[str] | None = None):
        self.limit_s = limit_s
        self._command = command or [sys.executable, "-m", "tests.search", "--worker"]
        self._process: subprocess.Popen[str] | None = None
        self._said: Any = None

    def check(self, case: Case) -> Verdict:
        """What becomes of the case in the process; a new one is started if this kills it."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        hung = threading.Event()

        def give_up() -> None:
            hung.set()
            process.kill()

        timer = threading.Timer(self.limit_s, give_up)
        timer.start()
        try:
            process.stdin.write(json.dumps(case.to_json()) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it is gone
            line = ""
        finally:
            timer.cancel()
        if line.endswith("\n"):
            verdict = Verdict(**json.loads(line))
            if verdict.kind == "died":  # its device may be beyond use
                self.close()
            return verdict
        code = process.wait()
        said = self._last_words()
        self.close()
        if hung.is_set():
            return Verdict("hung", f"No answer in {self.limit_s:.0f} s. {said}")
        return Verdict("died", f"The process ended with {code}. {said}")

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
            self._process = subprocess.Popen(
                self._command,
                cwd=_ROOT,
                env=os.environ | _ENVIRONMENT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
            )
        return self._process

    def _last_words(self) -> str:
        self._said.seek(0)
        return " ".join(self._said.read()[-_TOLD:].split())

    def close(self) -> None:
        """Ends the process."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            assert stream is not None
            with contextlib.suppress(OSError):  # what it was to be told does not reach it
                stream.close()
        self._process = None


def serve(check: Callable[[Case], str | None], refused: type[Exception]) -> None:
    """Answers cases until there are none: what a worker does.

    Args:
        check: says what is wrong with a case, or None.
        refused: what it raises where a case is not run.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        case = Case.from_json(json.loads(line))
        try:
            why = check(case)
            verdict = Verdict("right", "") if why is None else Verdict("wrong", why)
        except refused as error:
            verdict = Verdict("refused", str(error))
        except Exception as error:
            words = " ".join(str(error).split())[:_TOLD]
            verdict = Verdict("died", f"{type(error).__name__}: {words}")
        answers.write(json.dumps(verdict._asdict()) + "\n")
        answers.flush()
