"""A benchmark's results as JSON-able data and as a table in Markdown."""

from __future__ import annotations

from typing import Any

from ffjax.benchmark.suite import Point, Report
from ffjax.benchmark.tables import (
    finite,
    origin_data,
    origin_text,
    reasons_text,
    table,
    timing_data,
)

__all__ = ["as_data", "as_text"]


def as_data(report: Report) -> dict[str, Any]:
    """Everything there is to know, in JSON's types; what is not finite is None.

    Times are microseconds a step where a name ends in `_us`; sizes are bytes.
    """
    bandwidth = report.bandwidth
    return {
        **origin_data(report.machine, report.sweep.config),
        "steps": report.sweep.steps,
        "repetitions": report.sweep.repetitions,
        "read_bandwidth": {
            "tb_per_second": bandwidth.bytes_per_second / 1e12,
            "spread": bandwidth.spread,
            "array_bytes": bandwidth.array_bytes,
        },
        "points": [_point_data(report, point) for point in report.points],
    }


def _point_data(report: Report, point: Point) -> dict[str, Any]:
    check, baseline = point.check, point.baseline
    return {
        "batch": point.batch,
        "position": point.position,
        "tokens": point.tokens,
        "capacity": point.capacity,
        "implementation": point.implementation,
        "reason": point.reason,
        **timing_data(point.timing),
        "tokens_per_second": point.tokens_per_second,
        "weight_bytes": point.traffic.weight_bytes,
        "cache_bytes": point.traffic.cache_bytes,
        "bytes_per_step": point.traffic.total,
        "tb_per_second": point.bytes_per_second / 1e12,
        "percent_of_read_bandwidth": 100 * report.fraction_of_bandwidth(point),
        "floor_us": 1e6 * report.floor_seconds(point),
        "baseline": None if baseline is None else timing_data(baseline),
        "speedup": point.speedup,
        "correctness": {
            "steps": check.steps,
            "tokens": check.tokens,
            "finite": check.finite,
            "repeats": check.repeats,
            "against": check.against,
            "difference": {k: finite(v) for k, v in check.difference._asdict().items()},
        },
    }


def as_text(report: Report) -> str:
    """What was measured where and how, and a table in Markdown, a row a point."""
    sweep, bandwidth = report.sweep, report.bandwidth
    lines = [
        f"{origin_text(report.machine, sweep.config)} "
        f"Median of {sweep.repetitions} loops of {sweep.steps} steps; spread is "
        "(slowest - fastest) / median.",
        f"Read bandwidth {bandwidth.bytes_per_second / 1e12:.3f} TB/s "
        f"(array of {bandwidth.array_bytes / 1e9:.2f} GB, spread {100 * bandwidth.spread:.1f}%).",
    ]
    lines += reasons_text(point.reason for point in report.points)
    lines += map(_how_checked, dict.fromkeys(point.check.against for point in report.points))
    rows = [_row(report, point) for point in report.points]
    return "\n".join([*lines, "", *table(rows)])


def _how_checked(against: str) -> str:
    if against == "one by one":
        return (
            "A step of several tokens keeps the first of them, so that all steps go through the "
            "same positions; tokens/s are those of steps that keep all. Logits are compared with "
            "the reference's, which is fed the same tokens one by one."
        )
    other = {"xla": "reference"}.get(against, against)
    return (
        f"Logits are compared with the {other}'s, same tokens and cache: L2 and largest difference "
        "in the worst step, greedy tokens that are the same, and where they are not, how far the "
        f"{other} prefers its own."
    )


def _row(report: Report, point: Point) -> dict[str, str]:
    timing, check, baseline = point.timing, point.check, point.baseline
    row = {
        "batch": str(point.batch),
        "position": str(point.position),
        **({"tokens": str(point.tokens)} if report.sweep.tokens != (1,) else {}),
        "timed": point.implementation,
        "µs/step": f"{1e6 * timing.step_seconds:.1f}",
        "spread": f"{100 * timing.spread:.1f}%",
        "tokens/s": f"{point.tokens_per_second:.1f}",
        "MB/step": f"{point.traffic.total / 1e6:.1f}",
        "TB/s": f"{point.bytes_per_second / 1e12:.3f}",
        "% of read": f"{100 * report.fraction_of_bandwidth(point):.1f}",
        "compile s": f"{timing.compile_seconds:.1f}",
    }
    if baseline is not None:
        row["XLA µs/step"] = f"{1e6 * baseline.step_seconds:.1f}"
        row["XLA spread"] = f"{100 * baseline.spread:.1f}%"
        row["speedup"] = f"{point.speedup:.2f}x"
    difference = check.difference
    row["rel. error"] = f"{difference.relative_error:.1e}"
    row["largest diff."] = f"{difference.largest_difference:.1e}"
    row["same tokens"] = f"{difference.same_tokens}/{check.tokens}"
    row["largest gap"] = f"{difference.largest_gap:.1e}"
    row["bit-equal"] = ("yes" if check.repeats else "NO") if check.finite else "NOT FINITE"
    return row
