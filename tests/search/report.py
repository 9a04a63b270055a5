"""What a search has done: a line a failure while it runs, and a table when it ends."""

from __future__ import annotations

import collections
from typing import Any

from .draw import Case
from .worker import Verdict

__all__ = ["Report"]


class Report:
    """Counts verdicts, by family, by formats and by sizes."""

    def __init__(self):
        self.kinds: collections.Counter[str] = collections.Counter()
        self.refusals: collections.Counter[str] = collections.Counter()
        self.groups: dict[str, collections.Counter[str]] = {}
        self.failures: list[tuple[int, Case, Verdict]] = []

    def add(self, seed: int, case: Case, verdict: Verdict) -> None:
        """Counts one; prints it if it is a failure."""
        self.kinds[verdict.kind] += 1
        if verdict.kind == "refused":
            # Sizes apart, the same reason.
            words = verdict.why.split()
            self.refusals[" ".join(w for w in words if not any(c.isdigit() for c in w))[:100]] += 1
        sequences = "1 sequence" if len(case.lengths) == 1 else "2 to 8 sequences"
        tokens = "1 token" if case.tokens == 1 else "2 to 8 tokens"
        for name in (case.family, case.formats, sequences, tokens):
            group = self.groups.setdefault(name, collections.Counter())
            group[verdict.kind] += 1
        if verdict.failed:
            self.failures.append((seed, case, verdict))
            print(f"seed {seed}: {verdict.kind}: {verdict.why}\n    {case!r}", flush=True)

    @property
    def run(self) -> int:
        """Cases that were not refused."""
        return self.kinds.total() - self.kinds["refused"]

    @property
    def failed(self) -> int:
        """Cases that failed."""
        return len(self.failures)

    def print_table(self, seconds: float, what: str = "shapes") -> None:
        """The summary."""
        print("\n| | run | failed | refused |\n| --- | ---: | ---: | ---: |")
        for name in sorted(self.groups):
            print(_row(name, self.groups[name]))
        print(_row("all", self.kinds))
        for reason, count in self.refusals.most_common():
            print(f"refused {count} time{'' if count == 1 else 's'}: {reason}")
        rate = self.run / max(seconds, 1e-9)
        print(f"{self.run} {what} in {seconds:.0f} s, {rate:.2f} a second; {self.failed} failed.")

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "kinds": dict(self.kinds),
            "groups": {name: dict(kinds) for name, kinds in sorted(self.groups.items())},
            "refusals": dict(self.refusals),
            "failures": [
                {"seed": seed, "case": case.to_json(), **verdict._asdict()}
                for seed, case, verdict in self.failures
            ],
        }


def _row(name: str, kinds: collections.Counter[str]) -> str:
    refused = kinds["refused"]
    run = kinds.total() - refused
    return f"| {name} | {run} | {run - kinds['right']} | {refused} |"
