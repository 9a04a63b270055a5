"""Which files of tests take how many seconds of CPUs: `FFJAX_TESTS_CPU=1 pytest`.

Seconds on a clock say little where processes share the CPUs. These are what to look at before a
run of all tests has become long. No test depends on them.
"""

from __future__ import annotations

import os
from collections import defaultdict

import pytest

__all__ = ["CpuSeconds"]

# Files that take less together are not worth a line each.
MOST_LINES = 40


def spent() -> float:
    """Seconds of CPUs that this process has taken, and those of its own that have ended."""
    return sum(os.times()[:4])


class CpuSeconds:
    """Measures every phase of every test where it runs, and prints the sums at the end."""

    def __init__(self):
        self.before = spent()
        self.of_file: dict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        now = spent()
        # With pytest-xdist a report goes to the process that prints, with all it has.
        report.cpu_seconds, self.before = now - self.before, now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.of_file[report.nodeid.partition("::")[0]] += getattr(report, "cpu_seconds", 0.0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        total = sum(self.of_file.values())
        terminalreporter.section(f"{total:.0f} CPU seconds by file")
        longest = sorted(self.of_file.items(), key=lambda one: -one[1])
        for name, seconds in longest[:MOST_LINES]:
            terminalreporter.write_line(f"{seconds:8.1f}  {name}")
