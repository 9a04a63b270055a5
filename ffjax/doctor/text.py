"""The diagnosis as text to paste into a bug report, and as plain data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ffjax.doctor.activations import Largest
from ffjax.doctor.diagnosis import Diagnosis
from ffjax.failures import without_advice

__all__ = ["as_data", "as_text"]

_MOST_LINES = 20


def as_data(found: Diagnosis) -> dict[str, Any]:
    """The diagnosis as JSON has it: "sound" says whether nothing is wrong."""
    data = {"sound": not found.wrong, **dataclasses.asdict(found)}
    if found.bandwidth is not None:
        data["bandwidth"]["bytes_per_second"] = found.bandwidth.bytes_per_second
    return _plain(data)


def _plain(value: Any) -> Any:
    """Without NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(found: Diagnosis) -> str:
    """The diagnosis for people, section by section."""
    sections = {
        "Versions": [f"{name} {version}" for name, version in found.versions.items()],
        "Machine": _machine(found),
        "Settings": [f"{name}={value}" for name, value in found.settings.items()],
        "Model": [f"{name}: {value}" for name, value in found.model.items() if value is not None],
        "What can run": _choices(found),
        "Weights": _weights(found),
        "Activations": _activations(found),
        "Self-test": _self_test(found),
        "Result": found.wrong or [_all_well(found)],
    }
    lines: list[str] = []
    for title, body in sections.items():
        if body:
            lines += [title, *(f"  {line}" for line in body), ""]
    return "\n".join(lines[:-1])


def _all_well(found: Diagnosis) -> str:
    if found.unread is None:
        return "All is well."
    return "What was looked at is well; no text was read, see above for why."


def _machine(found: Diagnosis) -> list[str]:
    facts = found.platform
    driver = facts["nvidia_driver"] or "none"
    lines = [f"{facts['system']}, {facts['processors']} processors, NVIDIA driver: {driver}"]
    for device in found.devices:
        parts = [f"{device['kind']} ({device['platform']})", device["runtime"]]
        if device["capability"] is not None:
            parts.append(f"compute capability {device['capability']}")
        if device["cores"] is not None:
            parts.append(f"{device['cores']} cores")
        if device["memory_bytes"] is not None:
            parts.append(f"{device['memory_bytes'] / 1e9:.1f} GB for JAX")
        lines.append(", ".join(parts))
    return lines


def _choices(found: Diagnosis) -> list[str]:
    lines = []
    for choice in found.choices:
        lines.append(f"batch {choice['batch']}: {choice['chosen']!r} is chosen")
        for name, reason in choice["why_not"].items():
            lines.append(f"  {name!r}: {without_advice(reason or 'can run.')}")
        lines.append("  'xla': can run.")
    return lines


def _weights(found: Diagnosis) -> list[str]:
    if found.weights is None:
        return []
    if not found.weights:
        return ["All are finite."]
    lines = [
        f"{bad.name}{'' if bad.layer is None else f', layer {bad.layer}'}: {bad.count} of "
        f"{bad.size} are not finite, the first at [{', '.join(map(str, bad.first))}]: {bad.value}"
        for bad in found.weights[:_MOST_LINES]
    ]
    rest = len(found.weights) - len(lines)
    return [*lines, f"and {rest} more (--json has all of them)"] if rest else lines


def _activations(found: Diagnosis) -> list[str]:
    seen = found.activations
    if seen is None:
        return []
    lines = [f"{seen.tokens} tokens by the reference: {found.read}"]
    if found.unread is not None:
        lines.insert(0, f"No text was read: {found.unread}")
    if seen.first_bad is None:
        lines.append("All are finite.")
    else:
        bad = seen.first_bad
        where = "" if bad.layer is None else f" of layer {bad.layer}"
        lines.append(
            f"first not finite: {bad.tensor}{where}, {bad.count} of {bad.size}, at position "
            f"{bad.position}, channel {_channel(bad.channel)}; {seen.bad} tensors in all"
        )
    head = ("largest magnitude", "value", "layer", "position", "channel", "rms of the layer")
    rows = [head, *map(_row, seen.largest)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    return lines


def _row(one: Largest) -> tuple[str, ...]:
    if math.isnan(one.magnitude):
        return (one.tensor, "none is finite", "", "", "", "")
    return (
        one.tensor,
        f"{one.magnitude:.4g}",
        "" if one.layer is None else str(one.layer),
        str(one.position),
        _channel(one.channel),
        f"{one.rms:.4g}",
    )


def _channel(index: tuple[int, ...]) -> str:
    return str(index[0]) if len(index) == 1 else "head {}, element {}".format(*index)


def _self_test(found: Diagnosis) -> list[str]:
    if found.trials is None or found.bandwidth is None:
        return []
    lines = [found.tried or ""]
    for trial in found.trials:
        lines.append(
            f"{trial.kernel!r}, batch {trial.batch}, {trial.steps} steps from position "
            f"{trial.position}: logits {trial.relative_error:.4f} of their norm from the "
            f"reference's, {trial.same_tokens} of {trial.batch * trial.steps} tokens the same, "
            f"{'a second run has the same bits' if trial.repeats else 'A SECOND RUN DIFFERS'}"
        )
    speed, spread = found.bandwidth.bytes_per_second, found.bandwidth.spread
    lines.append(f"memory is read at {speed / 1e12:.3f} TB/s (spread {100 * spread:.0f}%)")
    return lines
