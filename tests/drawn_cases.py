"""Which cases of a test are drawn: few ones in which its parameters still have every value."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

__all__ = ["covering", "numbered"]


def numbered(rows: Sequence[dict[str, Any]]) -> list[tuple[int, ...]]:
    """The cases of a test with their values as numbers, equal ones with the same.

    Args:
        rows: of each case, the values of its parameters, by name.

    Returns:
        Of each case a number for each parameter. Parameters that always change together, such as
        those of one `parametrize` with a list of pairs, have a number each all the same.
    """
    seen: dict[str, dict[Hashable, int]] = {}
    return [
        tuple(
            seen.setdefault(name, {}).setdefault(_key(value), len(seen[name]))
            for name, value in row.items()
        )
        for row in rows
    ]


def _key(value: Any) -> Hashable:
    """What tells a value from others: itself, or which object it is."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value


def covering(cases: Sequence[tuple[int, ...]], together: int, start: int = 0) -> set[int]:
    """Few of these cases, in which every `together` values of the cases occur together.

    Each next one brings most that is new, and of those has the values that were taken least.

    Args:
        cases: of each case, the number of each parameter's value.
        together: 1 for every value, 2 for every pair of values of two parameters.
        start: where to begin among equals, so that tests of the same cases draw others.

    Returns:
        The places of those taken.
    """
    brings = [_brought(case, together) for case in cases]
    missing, times, taken = set().union(*brings), Counter(), set()

    def worth(at: int) -> tuple[int, int, int]:
        used = sum(times[value] for value in enumerate(cases[at]))
        return len(brings[at] & missing), -used, -((at - start) % len(cases))

    while missing:
        best = max(range(len(cases)), key=worth)
        taken.add(best)
        missing -= brings[best]
        times.update(enumerate(cases[best]))
    return taken


def _brought(case: tuple[int, ...], together: int) -> set[tuple[tuple[int, int], ...]]:
    values = list(enumerate(case))
    return set(itertools.combinations(values, min(together, len(values))))
