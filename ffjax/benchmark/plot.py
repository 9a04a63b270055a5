"""Draws a benchmark: time a step against position and against batch, over the memory floor."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ffjax.benchmark.suite import Point, Report
from ffjax.benchmark.tables import stored_as

__all__ = ["check_plot", "draw"]


def check_plot(path: Path) -> None:
    """Raises a sentence where no plot could be written, before anything has been measured.

    Raises:
        ValueError: the file is no PNG, or its directory does not exist.
        NotImplementedError: matplotlib is not installed.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"--plot writes a PNG file: its name ends in .png, got {path}.")
    if not path.parent.is_dir():
        raise ValueError(f"--plot writes into a directory that exists; {path.parent} does not.")
    if importlib.util.find_spec("matplotlib") is None:
        raise NotImplementedError(
            "--plot draws with matplotlib, which is not installed. Install the extra that "
            "brings it: pip install 'ffjax[plot]'."
        )


def draw(report: Report, path: Path) -> None:
    """Writes a PNG: time a step against position, a line a batch; and the other way round.

    The floor, what reading takes at the measured bandwidth, is a dashed line of the same
    colour; the baseline, where it was timed, a dotted one.

    Args:
        report: the results.
        path: the file.
    """
    # matplotlib is an extra, and this class of its draws without a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_position, by_batch = figure.subplots(1, 2, sharey=True)
    _panel(by_position, report, "position", lambda p: p.position, "batch", lambda p: p.batch)
    _panel(by_batch, report, "batch", lambda p: p.batch, "position", lambda p: p.position)
    by_position.set_ylabel("µs a step")
    config = report.sweep.config
    title = f"{config.name}, {stored_as(config)}, {report.machine.device}"
    figure.suptitle(textwrap.fill(title, 110))  # formats of several matrices fill more than a line
    figure.savefig(path, format="png", dpi=150)


def _panel(
    axes: Any,
    report: Report,
    along: str,
    x_of: Callable[[Point], int],
    each: str,
    line_of: Callable[[Point], int],
) -> None:
    """Draws time against `along`, a line for each value of `each`."""
    for number, value in enumerate(sorted({line_of(point) for point in report.points})):
        points = sorted((p for p in report.points if line_of(p) == value), key=x_of)
        x, color = [x_of(point) for point in points], f"C{number}"
        names = ", ".join(sorted({point.implementation for point in points}))
        times = [1e6 * point.timing.step_seconds for point in points]
        axes.plot(x, times, "o-", color=color, label=f"{each} {value} ({names})")
        floor = [1e6 * report.floor_seconds(point) for point in points]
        axes.plot(x, floor, "--", color=color, label="memory floor" if number == 0 else None)
        others = [point.baseline for point in points if point.baseline is not None]
        if len(others) == len(points):
            times = [1e6 * timing.step_seconds for timing in others]
            label = "XLA baseline" if number == 0 else None
            axes.plot(x, times, "s:", color=color, alpha=0.6, label=label)
    axes.set_xlabel(along)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
