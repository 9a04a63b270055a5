"""What compute-sanitizer said, and what of it is known and why."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

__all__ = ["EXPLAINED", "Explanation", "Finding", "explanation_of", "findings_in", "has_summary"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that a tool found, however often.

    Attributes:
        what: the first line of its report, without what differs from thread to thread.
        where: the instruction, as "ffjax_decode_step+0x1f0"; empty where it is in `what`.
        count: how many reports said the same.
    """

    what: str
    where: str
    count: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why a finding is none.

    Attributes:
        tool: whose.
        case: expression that the case's name matches.
        what: expression found in `what`.
        why: the reason.
    """

    tool: str
    case: str
    what: str
    why: str


EXPLAINED: tuple[Explanation, ...] = (
    Explanation(
        "initcheck",
        r"(\d tokens, )?(int8|int4|mixed|split down projection, (int8|boxes)), \d",
        r"Uninitialized __global__ memory read of size 32 bytes",
        "Bulk copies move whole 16 bytes. The scales of the head's 101 rows end within such a "
        "piece, and the rest of it lies in the array's allocation, which XLA makes in multiples of "
        "256 bytes. No row is multiplied by it.",
    ),
    Explanation(
        "initcheck",
        r"as an A100, (int8|int4), \d",
        r"Uninitialized __global__ memory read of size 8 bytes",
        "Where threads copy, scales come by 8 bytes each. Those of the head's 101 rows end within "
        "such a piece, as above.",
    ),
)
"""Findings that are known. A reason says why the access is right, not that it is frequent."""

_SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK|LEAK) SUMMARY: ", re.MULTILINE)
# Headings and summaries, and what follows from an error that has a report of its own.
_NOT_FOUND = re.compile(
    r"COMPUTE-SANITIZER|(?:ERROR|RACECHECK|LEAK) SUMMARY|Target application returned an error"
    r"|\S*\d+ errors? (?:was|were) not printed|Saved host backtrace|Note: "
)
# Of a race: how many threads raced, and of which values.
_DIFFERS = re.compile(r"\s*\[\d+ hazards?\]|\s*in block \(\d+,\d+,\d+\)|0x[0-9a-f]{8,}")


def has_summary(output: str) -> bool:
    """Whether the tool ran to its end."""
    return _SUMMARY.search(output) is not None


def findings_in(output: str) -> list[Finding]:
    """The findings of a tool's output, the most frequent first."""
    found: Counter[tuple[str, str]] = Counter()
    for report in _reports(output):
        head, *rest = report
        if _NOT_FOUND.match(head):
            continue
        heads = [head]
        if "Race reported" in head:  # with each of the accesses on the next lines
            heads = [f"{head} {line}" for line in rest if line.startswith("and ")] or heads
        where = next((line.removeprefix("at ") for line in rest if line.startswith("at ")), "")
        for head in heads:
            found[_DIFFERS.sub("", head), _DIFFERS.sub("", where)] += 1
    return [Finding(*key, count) for key, count in found.most_common()]


def _reports(output: str) -> list[list[str]]:
    """The lines of each report: what follows its first line is indented."""
    reports: list[list[str]] = []
    for line in output.splitlines():
        if not (begun := re.match(r"=========( *)(.*)", line)) or not begun[2]:
            continue
        if len(begun[1]) <= 1:
            reports.append([begun[2]])
        elif reports:
            reports[-1].append(begun[2])
    return reports


def explanation_of(tool: str, case: str, finding: Finding) -> str | None:
    """Why the finding is none, or None."""
    for one in EXPLAINED:
        if (
            one.tool == tool
            and re.fullmatch(one.case, case)
            and re.search(one.what, f"{finding.what} {finding.where}")
        ):
            return one.why
    return None
