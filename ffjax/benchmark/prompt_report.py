"""The results of a benchmark of prompts as JSON-able data and as a table in Markdown."""

from __future__ import annotations

import dataclasses
from typing import Any

from ffjax.benchmark.prompts import PromptPoint, PromptReport
from ffjax.benchmark.tables import (
    finite,
    origin_data,
    origin_text,
    reasons_text,
    samples_data,
    table,
    timing_data,
)

__all__ = ["as_data", "as_text"]


def as_data(report: PromptReport) -> dict[str, Any]:
    """Everything there is to know, in JSON's types; what is not finite is None.

    Times are milliseconds where a name ends in `_ms`, microseconds a step in `_us`; sizes are
    bytes.
    """
    rate = report.rate
    return {
        **origin_data(report.machine, report.sweep.config),
        "steps": report.sweep.steps,
        "repetitions": report.sweep.repetitions,
        "dense_rate": {
            "tflops_per_second": rate.flops_per_second / 1e12,
            "spread": rate.product.spread,
            "size": rate.size,
        },
        "prompts": [_point_data(report, point) for point in report.points],
    }


def _point_data(report: PromptReport, point: PromptPoint) -> dict[str, Any]:
    flops, check, peak = point.flops, point.check, point.peak
    figures = {name: finite(getattr(check, name)) for name in ("cache_error", "position_error")}
    return {
        "batch": point.batch,
        "prompt": str(point.span),
        "lengths": list(point.lengths),
        "implementation": point.implementation,
        "prefill": point.prefill,
        "reason": point.reason,
        "first_token": samples_data(point.first_token),
        "request": samples_data(point.request),
        "compile_seconds": point.compile_seconds,
        "flops": {**dataclasses.asdict(flops), "total": flops.total},
        "floor_ms": 1e3 * report.floor_seconds(point),
        "percent_of_dense_rate": 100 * report.fraction_of_rate(point),
        "step": {
            "position": report.sweep.step_position(point.span),
            **timing_data(point.step),
        },
        "steps_to_first_token": point.steps,
        "reference": None if point.reference is None else samples_data(point.reference),
        "prefill_temp_bytes": point.temp_bytes,
        "peak_bytes": None if peak is None else peak.bytes,
        "peak_is_the_prefills": None if peak is None else peak.raised,
        "correctness": {
            **dataclasses.asdict(check),
            **figures,
            "gap": finite(check.gap),
            "sound": check.sound,
        },
    }


def as_text(report: PromptReport) -> str:
    """What was measured where and how, and a table in Markdown, a row a point."""
    sweep, rate = report.sweep, report.rate
    lines = [
        f"{origin_text(report.machine, sweep.config)} Median of {sweep.repetitions} requests, "
        "programs compiled; spread is (slowest - fastest) / median.",
        f"Dense rate {rate.flops_per_second / 1e12:.3g} TFLOP/s (bfloat16 products of "
        f"{rate.size} x {rate.size}, spread {100 * rate.product.spread:.1f}%); the floor is the "
        "time of the prompts' operations at this rate.",
        "First token: from the prefill's call until the token is on the host; request: from the "
        f"arguments on. A step is a bare decode step after the prompt, of a loop of "
        f"{sweep.steps}.",
        *reasons_text(point.reason for point in report.points),
        "The reference is the model itself, called with chunks of up to 512 tokens.",
        "Caches are compared with the reference's, fed the same prompts: L2 of the worst layer "
        "and sequence, and of the worst single position; first tokens that are the same, and where "
        "they are not, how far the reference prefers its own, in RMS of its logits.",
    ]
    if any(point.peak is not None for point in report.points):
        lines.append(
            "Peak is the most memory that the process has had at a time, weights and all; after a "
            "<=, it had it before, and the prefill no more."
        )
    return "\n".join([*lines, "", *table([_row(report, point) for point in report.points])])


def _row(report: PromptReport, point: PromptPoint) -> dict[str, str]:
    first, check, peak = point.first_token, point.check, point.peak
    row = {
        "batch": str(point.batch),
        "prompt": str(point.span),
        "steps by": point.implementation,
        "prefill by": point.prefill,
        "first token ms": f"{1e3 * first.median:.2f}",
        "spread": f"{100 * first.spread:.1f}%",
        "request ms": f"{1e3 * point.request.median:.2f}",
        "floor ms": f"{1e3 * report.floor_seconds(point):.3g}",
        "% of rate": f"{100 * report.fraction_of_rate(point):.1f}",
        "step µs": f"{1e6 * point.step.step_seconds:.1f}",
        "in steps": f"{point.steps:.2f}",
        "compile s": f"{point.compile_seconds:.1f}",
    }
    if point.reference is not None:
        row["reference ms"] = f"{1e3 * point.reference.median:.2f}"
    row["temp. MB"] = f"{point.temp_bytes / 1e6:.0f}"
    if peak is not None:
        row["peak GB"] = f"{'' if peak.raised else '<='}{peak.bytes / 1e9:.2f}"
    row["cache error"] = f"{check.cache_error:.1e}"
    row["worst position"] = f"{check.position_error:.1e}"
    row["same tokens"] = f"{check.same_tokens}/{check.tokens}"
    row["gap"] = f"{check.gap:.1e}"
    row["bit-equal"] = ("yes" if check.repeats else "NO") if check.finite else "NOT FINITE"
    row["right"] = "yes" if check.sound else "NO"
    return row
