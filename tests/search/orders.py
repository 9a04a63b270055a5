"""Whether hand-overs go right in every schedule, by vector clocks.

A program knows of another's event if a chain of hand-overs leads from that to its own. What it does
not know of may come at any time. So

1. a wait for what nobody writes is one for ever;
2. a word that is waited for may hold any earlier version that is as new as the newest that the
   reader knows somebody to have read: none of them may have the bits of the tag that is waited for;
3. who writes must know that all have read what is overwritten, and that it was written.

A launch's beginning orders everything before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .handovers import CONTROL, ItemSet, Model, Step, tag_bits

__all__ = ["Fault", "faults_of"]

# Of a kind, so many are told of.
_MOST = 3


class Fault(NamedTuple):
    """What goes wrong in some schedule.

    Attributes:
        kind: "never written", "stale" or "overwritten".
        buffer: whose word.
        what: a sentence.
    """

    kind: str
    buffer: str
    what: str


class _Write(NamedTuple):
    program: int
    items: ItemSet
    clock: np.ndarray  # the program's, when it had written


class _Read(NamedTuple):
    program: int
    items: ItemSet
    before: np.ndarray  # the program's clock, before it heard of what it read
    at: int  # its own time, when it had


class _HandOver:
    """One version of a buffer's words."""

    def __init__(self, size: int):
        self.writes: list[_Write] = []
        self.reads: list[_Read] = []
        self.row = np.full(size, -1)  # of each item, which write
        self.missing = size
        self.clocks: dict[int, np.ndarray] = {}

    def write(self, write: _Write) -> None:
        self.row[write.items.items] = len(self.writes)
        self.missing -= len(write.items.items)
        self.writes.append(write)

    def clock(self, items: ItemSet) -> np.ndarray | None:
        """What is known of by who has read these items; None if some are not written."""
        known = self.clocks.get(items.number)
        if known is not None:
            return known
        if items.full:
            if self.missing > 0:
                return None
            clocks = [write.clock for write in self.writes]
        else:
            rows = self.row[items.items]
            if rows.min(initial=0) < 0:
                return None
            clocks = [self.writes[row].clock for row in np.unique(rows)]
        # Who waits for nothing has heard of nobody.
        self.clocks[items.number] = np.max(clocks, axis=0) if clocks else np.zeros((), np.int32)
        return self.clocks[items.number]


class _Clocks:
    """A run of all programs' events that notes who knew of what."""

    def __init__(self, model: Model):
        self.model = model
        self.clock = np.zeros((model.plan.programs, model.plan.programs), np.int32)
        self.handovers: dict[str, dict[int, _HandOver]] = {}

    def run(self, step: Step) -> list[Fault]:
        """Goes through a step's events, as long as somebody can go on; what stays is at fault."""
        self.clock[:] = self.clock.max(axis=0)  # the launch orders what was before
        self.handovers = {name: {} for name in self.model.buffers}
        at = [0] * len(step.events)
        going = True
        while going:
            going = False
            for program, events in enumerate(step.events):
                start = at[program]
                at[program] = self._advance(program, events, start)
                going |= at[program] > start
        faults = []
        for program, events in enumerate(step.events):
            if at[program] < len(events):
                _, items, tag = events[at[program]]
                what = (
                    f"Program {program} waits for {len(items.items)} items of {items.buffer} with "
                    f"the tag {tag}, and some are never written with it."
                )
                faults.append(Fault("never written", items.buffer, what))
        return faults

    def _advance(self, program: int, events: list, start: int) -> int:
        clock = self.clock[program]
        for number in range(start, len(events)):
            writes, items, tag = events[number]
            versions = self.handovers[items.buffer]
            if tag not in versions:
                if not (writes or items.buffer == CONTROL):
                    return number
                versions[tag] = _HandOver(self.model.size(items.buffer))
            handover = versions[tag]
            if writes:
                clock[program] += 1
                handover.write(_Write(program, items, clock.copy()))
                continue
            heard = handover.clock(items)
            if heard is None and items.buffer == CONTROL:
                heard = clock  # it was there before the launch
            if heard is None:
                return number
            before = clock.copy()
            np.maximum(clock, heard, out=clock)
            clock[program] += 1
            handover.reads.append(_Read(program, items, before, int(clock[program])))
        return len(events)


class _Incidence:
    """Which sets of a buffer's items have which, and have some in common."""

    def __init__(self, size: int):
        self.size = size
        self.rows: dict[int, np.ndarray] = {}
        self.known: dict[tuple[bytes, bytes], np.ndarray] = {}

    def of(self, sets: Sequence[ItemSet]) -> np.ndarray:
        """Sets by items, float32: 1 where it is in."""
        made = np.zeros((len(sets), self.size), np.float32)
        for row, one in zip(made, sets, strict=True):
            row[one.items] = 1
        return made

    def common(self, left: Sequence[ItemSet], right: Sequence[ItemSet]) -> np.ndarray:
        """Whether each of the left has an item of each of the right."""
        key = (
            np.array([one.number for one in left]).tobytes(),
            np.array([one.number for one in right]).tobytes(),
        )
        if key not in self.known:
            self.known[key] = self.of(left) @ self.of(right).T > 0
        return self.known[key]


def faults_of(model: Model, start: int, lengths: Sequence[int], steps: int = 2) -> list[Fault]:
    """What can go wrong in some steps in a row, in any schedule; empty where nothing can.

    Args:
        model: of the hand-overs.
        start: steps before the first.
        lengths: of the sequences before it.
        steps: how many.
    """
    clocks, faults = _Clocks(model), []
    incidence = {name: _Incidence(model.size(name)) for name in model.buffers}
    left: dict[str, int] | None = None
    for number in range(start, start + steps):
        step = model.step(number, model.lengths_after(number - start, lengths))
        faults += clocks.run(step)
        left = left or step.left
        for name, versions in clocks.handovers.items():
            handovers = [versions[tag] for tag in sorted(versions)]
            tags = [left[name], *sorted(versions)]
            if name != CONTROL:
                faults += _stale(model, name, tags, handovers, incidence[name])
            faults += _overwritten(name, handovers, incidence[name])
            left[name] = max(left[name], *tags) if versions else left[name]
        if faults:
            return faults
    return faults


def _stale(
    model: Model,
    name: str,
    tags: list[int],
    handovers: list[_HandOver],
    incidence: _Incidence,
) -> list[Fault]:
    """Versions that pass for others; `tags` begins with what the step found."""
    mask, faults = (1 << tag_bits(model.plan, name)) - 1, []
    for number, handover in enumerate(handovers, 1):
        alike = [old for old in range(number) if (tags[old] ^ tags[number]) & mask == 0]
        if not alike or not handover.reads:
            continue
        bad = _unknowing(handover, handovers[alike[-1] : number], incidence)
        for read in bad[:_MOST]:
            what = (
                f"Program {handover.reads[read].program} waits for {name} with the tag "
                f"{tags[number]}; words of the tag {tags[alike[-1]]} may still be there, and have "
                f"the same {mask.bit_length()} bits."
            )
            faults.append(Fault("stale", name, what))
    return faults


def _unknowing(handover: _HandOver, later: list[_HandOver], incidence: _Incidence) -> list[int]:
    """Reads by programs that do not know of each item that somebody has read a later version.

    Args:
        handover: what is read.
        later: what versions would be late enough to know of.
        incidence: of the buffer.
    """
    before = np.array([read.before for read in handover.reads])
    known: list[dict[int, ItemSet]] = [{} for _ in handover.reads]
    for between in later:
        if not between.reads:
            continue
        sets = {read.items.number: read.items for read in between.reads}
        heard = before[:, [read.program for read in between.reads]] >= [
            read.at for read in between.reads
        ]
        numbers = np.array([read.items.number for read in between.reads])
        for number, items in sets.items():
            for read in np.flatnonzero(heard[:, numbers == number].any(axis=1)):
                known[read][number] = items
    bad = []
    for number, read in enumerate(handover.reads):
        if read.items.number in known[number]:
            continue
        heard_of = incidence.of(list(known[number].values())).sum(axis=0)
        if heard_of[read.items.items].min() == 0:
            bad.append(number)
    return bad


def _overwritten(name: str, handovers: list[_HandOver], incidence: _Incidence) -> list[Fault]:
    """Versions that are overwritten before all have read them, or before they are written."""
    faults = []
    for old, new in itertools.pairwise(handovers):
        if not new.writes:
            continue
        clocks = np.array([write.clock for write in new.writes])
        if old.reads:
            sets = [write.items for write in new.writes]
            meet = incidence.common(sets, [read.items for read in old.reads])
            who = [read.program for read in old.reads]
            late = meet & (clocks[:, who] < [read.at for read in old.reads])
            for write, read in np.argwhere(late)[:_MOST]:
                what = (
                    f"Program {new.writes[write].program} may write {name} anew before program "
                    f"{old.reads[read].program} has read it."
                )
                faults.append(Fault("overwritten", name, what))
        both = np.flatnonzero((old.row >= 0) & (new.row >= 0))
        if old.writes and both.size:
            first = np.array([write.program for write in old.writes])[old.row[both]]
            time = np.array([write.clock[write.program] for write in old.writes])[old.row[both]]
            early = clocks[new.row[both], first] < time
            for item in both[early][:_MOST]:
                what = (
                    f"Program {new.writes[new.row[item]].program} may write {name} before program "
                    f"{old.writes[old.row[item]].program} has written the version before."
                )
                faults.append(Fault("overwritten", name, what))
    return faults
