"""Some schedules of the hand-overs, run with tags cut to the bits that words have.

This knows nothing of clocks: memory holds the tag of each item, and a program goes on when all that
it waits for look right. It notes what it then has taken. One program may be as fast, and another as
slow, as can be; the others take turns at random.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from .handovers import CONTROL, Event, Model, tag_bits

__all__ = ["wrong_in"]


class _Memory:
    """Each buffer's words: the tag that each item was last written with, uncut."""

    def __init__(self, model: Model, left: dict[str, int]):
        self.tags = {name: np.full(model.size(name), left[name]) for name in model.buffers}
        self.masks = {name: (1 << tag_bits(model.plan, name)) - 1 for name in model.buffers}

    def write(self, event: Event) -> None:
        self.tags[event.items.buffer][event.items.items] = event.tag

    def look(self, event: Event) -> tuple[np.ndarray, np.ndarray]:
        """Which of the items that are waited for seem to be there, and which are."""
        name = event.items.buffer
        differ = self.tags[name][event.items.items] ^ event.tag
        return differ & self.masks[name] == 0, differ == 0


class _Program:
    """A program: its events, and what of the one it waits at it has taken."""

    def __init__(self, number: int, events: list[Event], memory: _Memory):
        self.number, self.events, self.memory = number, events, memory
        self.at = 0
        self.taken: np.ndarray | None = None
        self.wrong: str | None = None

    @property
    def done(self) -> bool:
        return self.at == len(self.events)

    def go(self) -> bool:
        """Does the next event, or looks at what it waits for; whether it went on."""
        event = self.events[self.at]
        if event.writes:
            self.memory.write(event)
            self.at += 1
            return True
        seems, is_it = self.memory.look(event)
        # A word that has come is not looked at again.
        fresh = seems if self.taken is None else seems & ~self.taken
        if (fresh & ~is_it).any() and event.items.buffer != CONTROL:
            self.wrong = (
                f"Program {self.number} takes {event.items.buffer} of another tag for that of "
                f"{event.tag}."
            )
        self.taken = seems if self.taken is None else seems | self.taken
        if not self.taken.all():
            return False
        self.taken, self.at = None, self.at + 1
        return True


def wrong_in(
    model: Model,
    start: int,
    lengths: Sequence[int],
    seed: int,
    fast: int | None = None,
    slow: int | None = None,
    steps: int = 1,
) -> str | None:
    """What goes wrong in one schedule, as a sentence; None if nothing does.

    Args:
        model: of the hand-overs.
        start: steps before the first.
        lengths: of the sequences before it.
        seed: of the turns that the others take.
        fast: the program that is always asked first.
        slow: the program that is asked only when nobody else can go on.
        steps: how many, one after another.
    """
    draw = random.Random(seed)
    memory: _Memory | None = None
    for number in range(start, start + steps):
        step = model.step(number, model.lengths_after(number - start, lengths))
        memory = memory or _Memory(model, step.left)
        programs = [_Program(p, events, memory) for p, events in enumerate(step.events)]
        if (wrong := _run(programs, draw, fast, slow)) is not None:
            return f"{wrong} (step {number})"
    return None


def _run(
    programs: list[_Program], draw: random.Random, fast: int | None, slow: int | None
) -> str | None:
    """Runs a step to its end.

    Who waits looks again when something was written where it waits, soon or late.
    """
    first = programs[fast] if fast is not None else None
    last = programs[slow] if slow is not None and slow != fast else None
    awake = [program for program in programs if program not in (first, last)]
    asleep: dict[str, list[_Program]] = {}  # by the buffer that they wait for
    dirty: set[str] = set()
    hears = first is not None
    while True:
        while hears and first is not None and not first.done:
            hears = first.go()
            if first.wrong:
                return first.wrong
            _wake(first, awake, asleep, dirty, draw)
        if not awake:
            for buffer in dirty & asleep.keys():
                awake += asleep.pop(buffer)
            dirty.clear()
        if awake:
            index = draw.randrange(len(awake))
            program = awake[index]
        elif last is not None and not last.done:
            index, program = -1, last
        else:
            break
        went = program.done or program.go()
        if program.wrong:
            return program.wrong
        if went:
            written = _wake(program, awake, asleep, dirty, draw)
            hears = first is not None and not first.done and written == _awaited(first)
        elif program is last:
            break  # nobody can go on
        if index >= 0 and (program.done or not went):
            awake[index] = awake[-1]
            awake.pop()
            if not program.done:
                asleep.setdefault(_awaited(program), []).append(program)
    stuck = [program for program in programs if not program.done]
    if stuck:
        event = stuck[0].events[stuck[0].at]
        return (
            f"Nobody can go on: program {stuck[0].number} waits for {event.items.buffer} with the "
            f"tag {event.tag}."
        )
    return None


def _awaited(program: _Program) -> str:
    """The buffer that a program waits for, or is about to write."""
    return program.events[program.at].items.buffer


def _wake(
    program: _Program,
    awake: list[_Program],
    asleep: dict[str, list[_Program]],
    dirty: set[str],
    draw: random.Random,
) -> str:
    """Wakes one of those who wait for what a program has just written; returns which buffer."""
    event = program.events[program.at - 1] if program.at else None
    if event is None or not event.writes:
        return ""
    buffer = event.items.buffer
    dirty.add(buffer)
    if sleepers := asleep.get(buffer):
        awake.append(sleepers.pop(draw.randrange(len(sleepers))))
    return buffer
