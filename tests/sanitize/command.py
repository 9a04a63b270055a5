"""The command: runs the tools over the cases side by side, then says what they found."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import queue
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from sanitize.apart import APART
from sanitize.cases import CASES
from sanitize.findings import Finding, explanation_of, findings_in, has_summary
from sanitize.planted import PLANTED
from sanitize.sanitizer import (
    TOOLS,
    Ran,
    Sanitizer,
    environment,
    find,
    plain_command,
    run,
)
from sanitize.steps import DONE

__all__ = ["main"]

PLAIN = "without"
"""The column of runs that nobody watches."""

# Planted errors are planted in this one.
_PLANTED_IN = "bfloat16, 1"
_MOST_JOBS = 12
_TAIL = 15


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        findings: that no explanation fits.
        explained: those that one fits, and the reason.
        broken: why the run says nothing, or None.
        output: all that it said.
        seconds: it took.
    """

    findings: list[Finding]
    explained: list[tuple[Finding, str]]
    broken: str | None
    output: str
    seconds: float

    @property
    def cell(self) -> str:
        """The result in a table."""
        if self.broken is not None:
            return "BROKEN"
        if self.findings:
            return f"{len(self.findings)} FOUND"
        return f"{len(self.explained)} explained" if self.explained else "clean"


def read(tool: str, case: str, ran: Ran, seconds: float) -> Result:
    """What a run's output says.

    Args:
        tool: its name, or `PLAIN`.
        case: the case's name.
        ran: the run.
        seconds: it took.
    """
    found = findings_in(ran.output)
    pairs = [(finding, explanation_of(tool, case, finding)) for finding in found]
    broken = None
    if ran.code is None:
        broken = f"did not end within {seconds:.0f} s"
    elif tool != PLAIN and not has_summary(ran.output):
        broken = f"ended with exit code {ran.code} and no summary of the tool's"
    elif DONE not in ran.output and all(why is not None for _, why in pairs):
        broken = f"ended with exit code {ran.code} before its steps were taken"
    return Result(
        findings=[finding for finding, why in pairs if why is None],
        explained=[(finding, why) for finding, why in pairs if why is not None],
        broken=broken,
        output=ran.output,
        seconds=seconds,
    )


class Runs:
    """Runs side by side, each with a number that no other has at the same time."""

    def __init__(self, sanitizer: Sanitizer, jobs: int, seconds: float, folder: pathlib.Path):
        self._sanitizer, self._seconds, self._folder = sanitizer, seconds, folder
        self._environment = environment(str(folder / "programs"))
        self._pool = ThreadPoolExecutor(jobs)
        self._numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(jobs):
            self._numbers.put(number)

    def all(self, asked: Iterable[tuple[str, str, tuple[str, ...]]]) -> dict[str, Result]:
        """The results of (name, tool, arguments of the steps), by name, as they were asked for."""
        futures = {
            name: self._pool.submit(self._one, name, tool, arguments)
            for name, tool, arguments in asked
        }
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise

    def _one(self, name: str, tool: str, arguments: tuple[str, ...]) -> Result:
        number, start = self._numbers.get(), time.monotonic()
        try:
            command = (
                plain_command(*arguments)
                if tool == PLAIN
                else self._sanitizer.command(tool, number, *arguments)
            )
            ran = run(command, self._environment, self._seconds)
        finally:
            self._numbers.put(number)
        (self._folder / f"{name}.txt").write_text(ran.output, encoding="utf-8")
        result = read(tool, arguments[0], ran, time.monotonic() - start)
        _say(f"{name}: {result.cell}, {result.seconds:.0f} s")
        return result


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 1 where something was found that nothing explains."""
    asked = _parser().parse_args(arguments)
    try:
        sanitizer = Sanitizer.at(find(asked.sanitizer))
        cases = [name for name in CASES if re.search(asked.only, name)]
    except (OSError, re.error) as error:
        print(f"tests.sanitize: {error}", file=sys.stderr)
        return 2
    if not cases:
        names = "; ".join(CASES)
        print(f"tests.sanitize: --only {asked.only!r} fits no case of {names}", file=sys.stderr)
        return 2
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        if asked.keep is None:
            folder = tempfile.TemporaryDirectory(prefix="ffjax_sanitize_")
            kept = pathlib.Path(stack.enter_context(folder))
        else:
            kept = asked.keep
            kept.mkdir(parents=True, exist_ok=True)
        runs = Runs(sanitizer, asked.jobs, asked.seconds, kept)
        report = _planted if asked.planted else _clean
        code = report(runs, asked.tool or list(TOOLS), cases, asked.as_it_is)
    print(f"\ncompute-sanitizer {sanitizer.version}, {time.monotonic() - start:.0f} s")
    return code


def _changes(tool: str, as_it_is: bool) -> tuple[str, ...]:
    """How the kernel is changed for a tool."""
    return (APART,) if tool == "racecheck" and not as_it_is else ()


def _clean(runs: Runs, tools: list[str], cases: list[str], as_it_is: bool) -> int:
    """Runs the tools over the cases; prints what they found, and a table."""
    # Unwatched, first: it compiles what the tools then run, and shows that the steps are sound.
    plain = runs.all((f"{case}, {PLAIN}", PLAIN, (case,)) for case in cases)
    grid = [(case, tool) for tool in tools for case in cases]
    watched = runs.all(
        (f"{case}, {tool}", tool, (case, *_changes(tool, as_it_is))) for case, tool in grid
    )
    results = plain | watched
    for name, result in results.items():
        _print_findings(name, result)
    columns = [PLAIN, *tools]
    rows = [[case, *(results[f"{case}, {tool}"].cell for tool in columns)] for case in cases]
    _print_table(["case", *columns], rows)
    wrong = [result for result in results.values() if result.findings or result.broken]
    print(f"\n{len(wrong)} of {len(results)} runs found something, or broke.")
    return 1 if wrong else 0


def _planted(runs: Runs, tools: list[str], cases: list[str], as_it_is: bool) -> int:
    """Plants errors; each tool must find one of its own, and says which kinds it does not see."""
    planted = {name: one for name, one in PLANTED.items() if one.tool in tools}
    runs_of = [
        (name, one.tool, (_PLANTED_IN, *_changes(one.tool, as_it_is), name))
        for name, one in planted.items()
    ]
    # What a tool says without them is no sign that it sees them.
    clean = [(tool, tool, (_PLANTED_IN, *_changes(tool, as_it_is))) for tool in tools]
    results = runs.all([*clean, *runs_of])
    rows, blind, seeing = [], [], set()
    for name, one in planted.items():
        result, usual = results[name], {_kind(x) for x in results[one.tool].findings}
        new = [finding.what for finding in result.findings if _kind(finding) not in usual]
        said = new[0] if new else result.broken or ""
        rows.append([one.tool, one.what, "found" if new else "NOT FOUND", said])
        if new:
            seeing.add(one.tool)
        else:
            _print_findings(name, result)
            blind.append(f"{one.tool} does not see {one.what}, in this kernel.")
    _print_table(["tool", "planted", "", "what it said"], rows)
    print("".join(f"\n{line}" for line in blind))
    missing = [tool for tool in tools if tool not in seeing]
    for tool in missing:
        print(f"{tool} found none of its planted errors: that it finds nothing else means nothing.")
    return 1 if missing else 0


def _kind(finding: Finding) -> str:
    """What was found, whatever the instruction."""
    return re.sub(r"\+0x[0-9a-f]+", "", finding.what)


def _print_findings(name: str, result: Result) -> None:
    if result.findings:
        print(f"\n{name}")
        for finding in result.findings:
            where = f" at {finding.where}" if finding.where else ""
            print(f"  {finding.count} times: {finding.what}{where}")
    for finding, why in result.explained:
        print(f"\n{name}\n  {finding.what}: explained. {why}")
    if result.broken is not None:
        tail = result.output.strip().splitlines()[-_TAIL:]
        print(f"\n{name}: {result.broken}. Its last words:", *tail, sep="\n  ")


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    print()
    for row in (head, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"is a number of at least {least}, got {text!r}")
        return int(text)

    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sanitize",
        description="Runs NVIDIA's compute-sanitizer over small decode steps of every kind. Exit "
        "code 1: it found something that tests/sanitize/findings.py does not explain.",
    )
    parser.add_argument("--sanitizer", metavar="PATH", help="compute-sanitizer; default: found")
    parser.add_argument(
        "--tool", choices=TOOLS, action="append", help="may be repeated; default: all"
    )
    parser.add_argument(
        "--only", metavar="EXPRESSION", default="", help="cases whose names it is found in"
    )
    parser.add_argument(
        "--planted",
        action="store_true",
        help="plant errors instead: each tool must find one of its own",
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=_at_least(1),
        default=min(_MOST_JOBS, os.cpu_count() or 1),
        help="processes side by side; default: %(default)s",
    )
    parser.add_argument(
        "--seconds",
        metavar="S",
        type=_at_least(1),
        default=240,
        help="that a run may take; default: %(default)s",
    )
    parser.add_argument(
        "--as-it-is",
        action="store_true",
        help="show racecheck the kernel as it is, with the pairs that tests/sanitize/apart.py "
        "says are harmless",
    )
    parser.add_argument(
        "--keep",
        metavar="FOLDER",
        type=pathlib.Path,
        help="keep what every run said, and the compiled programs that were watched",
    )
    return parser
