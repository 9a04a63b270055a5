"""The results of a benchmark of generations as JSON-able data and as a table in Markdown."""

from __future__ import annotations

from typing import Any

from ffjax.benchmark.loops import LoopPoint, LoopReport, Way
from ffjax.benchmark.tables import (
    origin_data,
    origin_text,
    reasons_text,
    table,
    timing_data,
)
from ffjax.benchmark.timing import Samples

__all__ = ["as_data", "as_text"]


def as_data(report: LoopReport) -> dict[str, Any]:
    """Everything there is to know, in JSON's types. Times are microseconds a token or step."""
    return {
        **origin_data(report.machine, report.sweep.config),
        "steps": report.sweep.steps,
        "repetitions": report.sweep.repetitions,
        "loops": [_point_data(point) for point in report.points],
    }


def _point_data(point: LoopPoint) -> dict[str, Any]:
    return {
        "batch": point.batch,
        "position": point.position,
        "implementation": point.implementation,
        "reason": point.reason,
        "step": timing_data(point.step),
        "same_tokens_as_bare_steps": point.same_tokens,
        "ways": [_way_data(way, point.step.step_seconds) for way in point.ways],
    }


def _way_data(way: Way, step_seconds: float) -> dict[str, Any]:
    def each(samples: Samples) -> list[float]:
        return [1e6 * seconds / way.steps for seconds in samples.seconds]

    return {
        "name": way.name,
        "us_per_token": 1e6 * way.clock.median / way.steps,
        "spread": way.clock.spread,
        "reported_us": 1e6 * way.reported.median / way.steps,
        "reader_us": 1e6 * way.reader.median / way.steps,
        "over_step": way.over(step_seconds),
        "over_longer": way.over_longer(step_seconds),
        "reported_over_step": way.reported.median / way.steps / step_seconds,
        "repetitions_us": each(way.clock),
        "reported_repetitions_us": each(way.reported),
        "sound": way.sound,
    }


def as_text(report: LoopReport) -> str:
    """What was measured where and how, and a table in Markdown, a row a way to generate."""
    sweep = report.sweep
    lines = [
        f"{origin_text(report.machine, sweep.config)} Median of {sweep.repetitions} generations of "
        f"{sweep.steps} steps each, programs compiled; spread is (slowest - fastest) / median.",
        "Bare steps are a loop on the device over the same positions. By the clock: of a stream, "
        "from its first token to its last; of generate, what the call took beyond a call for one "
        "token. Reported: the generation's own account. A slow reader sleeps about a step's time "
        "at each token, a busy one computes for 0.7 of it; the stream's time is over that of a "
        "bare step or of its reader, whichever is longer.",
        *reasons_text(point.reason for point in report.points),
    ]
    for point in report.points:
        lines.append(
            f"Batch {point.batch}, position {point.position}: greedy tokens are those of the bare "
            f"steps for {point.same_tokens} of {sweep.steps} steps."
        )
    rows = [row for point in report.points for row in _rows(point)]
    return "\n".join([*lines, "", *table(rows)])


def _rows(point: LoopPoint) -> list[dict[str, str]]:
    step = point.step.step_seconds
    at = {"batch": str(point.batch), "position": str(point.position)}
    bare = {
        **at,
        "what": f"bare steps ({point.implementation})",
        "µs/token": f"{1e6 * step:.1f}",
        "spread": f"{100 * point.step.spread:.1f}%",
        "over step": "",
        "reported µs/token": "",
        "reader µs/token": "",
        "same tokens": "",
    }
    return [bare, *({**bare, **at, **_cells(way, step)} for way in point.ways)]


def _cells(way: Way, step: float) -> dict[str, str]:
    reader = way.reader.median / way.steps
    return {
        "what": way.name,
        "µs/token": f"{1e6 * way.clock.median / way.steps:.1f}",
        "spread": f"{100 * way.clock.spread:.1f}%",
        "over step": f"{way.over_longer(step):.3f}x",
        "reported µs/token": f"{1e6 * way.reported.median / way.steps:.1f}",
        "reader µs/token": f"{1e6 * reader:.1f}" if reader else "",
        "same tokens": "yes" if way.sound else "NO",
    }
