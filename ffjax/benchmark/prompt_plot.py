"""Draws a benchmark of prompts: time to the first token against the prompt's length."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from ffjax.benchmark.prompts import PromptReport
from ffjax.benchmark.tables import stored_as

__all__ = ["draw_prompts"]


def draw_prompts(report: PromptReport, path: Path) -> None:
    """Writes a PNG: time to the first token against tokens a prompt, a line a batch.

    The floor of the multiplications is a dashed line of the same colour, the bare step a thin
    one, and the reference model, where it was timed, a dotted one. Prompts of unequal lengths
    are single marks at their mean length.

    Args:
        report: the results.
        path: the file.
    """
    # matplotlib is an extra, and this class of its draws without a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for number, batch in enumerate(sorted({point.batch for point in report.points})):
        _lines(axes, report, batch, f"C{number}", first=number == 0)
    axes.set_xlabel("tokens of a prompt")
    axes.set_ylabel("ms to the first token")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    config = report.sweep.config
    title = f"{config.name}, {stored_as(config)}, {report.machine.device}"
    figure.suptitle(textwrap.fill(title, 70))  # formats of several matrices fill more than a line
    figure.savefig(path, format="png", dpi=150)


def _lines(axes: Any, report: PromptReport, batch: int, color: str, *, first: bool) -> None:
    """Draws what was measured of a batch; the first one's lines name the kinds of lines."""
    points = [point for point in report.points if point.batch == batch]
    even = sorted(
        (point for point in points if not point.span.ragged), key=lambda p: p.span.longest
    )

    def line(seconds: list[float], style: str, label: str | None, **options: Any) -> None:
        lengths = [point.span.longest for point in even]
        axes.plot(lengths, [1e3 * s for s in seconds], style, color=color, label=label, **options)

    if even:
        line([p.first_token.median for p in even], "o-", f"batch {batch}")
        floor = "multiplications at the dense rate" if first else None
        line([report.floor_seconds(p) for p in even], "--", floor)
        step = "bare decode step" if first else None
        line([p.step.step_seconds for p in even], "-", step, linewidth=0.8, alpha=0.6)
        if report.sweep.reference:
            times = [p.reference.median for p in even if p.reference is not None]
            line(times, "s:", "reference model" if first else None, alpha=0.6)
    ragged = [point for point in points if point.span.ragged]
    for point in ragged:
        mean = sum(point.lengths) / len(point.lengths)
        label = f"batch {batch}, prompts of {point.span}"
        axes.plot([mean], [1e3 * point.first_token.median], "D", color=color, label=label)
