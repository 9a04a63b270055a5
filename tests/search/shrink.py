"""Makes a failing case as small as it can be and still fail."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

from .draw import Case

__all__ = ["shrunk", "smaller"]

# What a field is tried at, from the smallest on; beside half of what it is, and less.
_SIMPLE = {
    "family": ("llama",),
    "tuning": ((),),
    "step": (0, 84),
    "tied": (False,),
    "seed": (0,),
}
_LEAST = {
    "layers": 1,
    "vocab": 8,
    "capacity": 9,
    "model_dim": 128,
    "ffw_dim": 128,
    "heads": 1,
    "kv_heads": 1,
}


def smaller(case: Case) -> Iterator[Case]:
    """Simpler cases, the boldest steps first; only those that can be models."""
    for changes in _changes(case):
        made = dataclasses.replace(case, **changes)
        if made == case:
            continue
        try:
            _ = made.config
        except ValueError:
            continue
        yield made


def _changes(case: Case) -> Iterator[dict]:
    batch = len(case.lengths)
    for count in dict.fromkeys((1, 2, batch // 2, batch - 1)):
        if 1 <= count < batch:
            yield {"lengths": case.lengths[:count]}
            yield {"lengths": case.lengths[-count:]}
    for tokens in dict.fromkeys((1, 2, case.tokens // 2, case.tokens - 1)):
        if 1 <= tokens < case.tokens:
            yield {"tokens": tokens}
    for name, values in _SIMPLE.items():
        for value in values:
            yield {name: value} | ({"window": None} if name == "family" else {})
    for layers in _halves(case, "layers"):
        yield {"layers": layers}
    for vocab in _halves(case, "vocab"):
        yield {"vocab": vocab}
    if any(case.groups):
        yield {"groups": ("",) * len(case.groups)}
        for i in range(len(case.groups)):
            yield {"groups": (*case.groups[:i], "", *case.groups[i + 1 :])}
    for bits in dict.fromkeys(((16,) * 5, (case.bits[0],) * 5, (*case.bits[:4], 16))):
        yield {"bits": bits}
    for i in range(len(case.bits)):
        yield {"bits": (*case.bits[:i], 16, *case.bits[i + 1 :])}
    grain = 128 if 4 in case.bits else 16
    for name in ("ffw_dim", "model_dim"):
        for width in _halves(case, name):
            yield {name: width // grain * grain}
    group = case.heads // case.kv_heads
    for kv in _halves(case, "kv_heads"):
        yield {"kv_heads": kv, "heads": kv * group}
    for g in range(1, group):
        yield {"heads": case.kv_heads * g}
    if case.head_dim > 64:
        yield {"head_dim": 64}
    for most in (0, 9, 256):
        lengths = tuple(min(length, most) for length in case.lengths)
        yield {"lengths": lengths}
        yield {"lengths": lengths, "capacity": most + 16}
    for i, length in enumerate(case.lengths):
        if length:
            yield {"lengths": (*case.lengths[:i], 0, *case.lengths[i + 1 :])}


def _halves(case: Case, name: str) -> Iterator[int]:
    """Smaller values of a size: the least, then ever nearer to what it is."""
    now, least = getattr(case, name), _LEAST[name]
    tried = [least]
    gap = (now - least) // 2
    while gap > 0:
        tried.append(now - gap)
        gap //= 2
    yield from (value for value in dict.fromkeys(tried) if least <= value < now)


def shrunk(
    case: Case,
    fails: Callable[[Case], bool],
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
) -> Case:
    """The smallest case found that fails, before the deadline.

    Args:
        case: one that fails.
        fails: whether another does.
        deadline: by the clock.
        clock: what says the time.
    """
    tried = {case}
    while clock() < deadline:
        for candidate in smaller(case):
            if candidate in tried:
                continue
            if clock() >= deadline:
                return case
            tried.add(candidate)
            if fails(candidate):
                case = candidate
                break
        else:
            return case
    return case
