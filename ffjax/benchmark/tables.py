"""What the reports of all benchmarks are made of: facts about the run, and tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ffjax.benchmark.machine import Machine
from ffjax.benchmark.timing import Samples, Timing
from ffjax.config import ModelConfig
from ffjax.failures import without_advice

__all__ = [
    "finite",
    "origin_data",
    "origin_text",
    "reasons_text",
    "samples_data",
    "stored_as",
    "table",
    "timing_data",
]


def stored_as(config: ModelConfig) -> str:
    """How the weights are stored, as in "bfloat16" or "int8: qkv, down; the rest bfloat16"."""
    return f"{config.weights}; the rest bfloat16" if config.weights.quantized else "bfloat16"


def origin_data(machine: Machine, config: ModelConfig) -> dict[str, Any]:
    """What ran where, as JSON."""
    return {
        "device": machine.device,
        "platform": machine.platform,
        "versions": machine.versions,
        "config": config.name,
        "dtype": "bfloat16",
        "quantized": str(config.weights) or None,
    }


def origin_text(machine: Machine, config: ModelConfig) -> str:
    """What ran where, a sentence."""
    versions = machine.versions
    return (
        f"{config.name}, {stored_as(config)}, on {machine.device} ({machine.platform}); "
        f"ffjax {versions['ffjax']}, JAX {versions['jax']}."
    )


def reasons_text(reasons: Iterable[str | None]) -> list[str]:
    """Why steps are the reference's, each reason once."""
    return [
        f"The reference, 'xla', is timed, because: {without_advice(reason)}"
        for reason in dict.fromkeys(reasons)
        if reason is not None
    ]


def timing_data(timing: Timing) -> dict[str, Any]:
    """Microseconds a step, as JSON."""
    return {
        "us_per_step": 1e6 * timing.step_seconds,
        "fastest_us": 1e6 * timing.fastest_step_seconds,
        "spread": timing.spread,
        "repetitions_us": [1e6 * seconds / timing.steps for seconds in timing.loop_seconds],
        "compile_seconds": timing.compile_seconds,
    }


def samples_data(samples: Samples) -> dict[str, Any]:
    """Milliseconds, as JSON."""
    return {
        "ms": 1e3 * samples.median,
        "fastest_ms": 1e3 * samples.fastest,
        "spread": samples.spread,
        "repetitions_ms": [1e3 * seconds for seconds in samples.seconds],
    }


def finite(value: float) -> float | None:
    """The value for JSON, which has no others."""
    return value if math.isfinite(value) else None


def table(rows: list[dict[str, str]]) -> list[str]:
    """Lines of a Markdown table, aligned for reading as it is."""
    names = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]

    def line(cells: list[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 1) + ":" for width in widths)
    return [line(names), f"|{rule}|", *(line(list(row.values())) for row in rows)]
