"""Who has what of a step: tiles, elements of the residual, parts of attention.

This says again, in plain integers, what `descriptors`, `tiles`, `kv_splits` and the segments trace,
so that the model of the hand-overs owes them nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pallas_kernels.dims import ceil_div, next_power_of_2
from pallas_kernels.stream.plan import LOT, Segment, SegmentPlan, StreamPlan

__all__ = ["Part", "Shares", "busy_tiles", "groups_of", "misowned"]

# Elements of a head that a program combines at least, and KV splits that a thread does at most.
_MIN_COMBINED, _MOST_SPLITS = 8, 8


class Part(NamedTuple):
    """One part of a layer's attention."""

    sequence: int
    kv_head: int
    lot: int
    lots: int  # how many times 8 queries it has
    split: int
    num_splits: int

    @property
    def has_new(self) -> bool:
        """Whether the new positions are this part's."""
        return self.split == self.num_splits - 1


def busy_tiles(part: SegmentPlan, program: int) -> int:
    """Tiles of a program that there is a group for."""
    team = program // part.splits
    if team >= part.teams:
        return 0
    return len(range(team, part.groups // part.run, part.teams)) * part.run


def groups_of(part: SegmentPlan, program: int) -> list[int]:
    """Groups of rows that a program's tiles are of, in order."""
    team = program // part.splits
    numbers = range(busy_tiles(part, program))
    return [(team + n // part.run * part.teams) * part.run + n % part.run for n in numbers]


@dataclasses.dataclass(frozen=True)
class Shares:
    """What each program has of a step.

    Attributes:
        plan: the step's.
        lengths: of the sequences before the step.
    """

    plan: StreamPlan
    lengths: tuple[int, ...]

    @functools.cached_property
    def owned(self) -> list[np.ndarray]:
        """Of each program, the residual's groups: of `plan.rows` elements."""
        plan = self.plan
        groups = ceil_div(plan.dims.model_dim, plan.rows)
        return [np.arange(p, groups, plan.programs) for p in range(plan.programs)]

    @functools.cached_property
    def busy(self) -> dict[Segment, list[int]]:
        """Of each segment, the tiles of each program that are not empty."""
        return {
            segment: [busy_tiles(part, p) for p in range(self.plan.programs)]
            for segment, part in self.plan.segments.items()
        }

    def num_splits(self, length: int, local: bool) -> int:
        """KV splits of a head of a sequence of this length."""
        d, cut = self.plan.dims, self.plan.attention
        live = min(length, d.capacity)
        if local and d.features.window is not None:
            live -= max(live - (d.features.window - 1), 0)
        size = ceil_div(ceil_div(live + 1, cut.max_splits), cut.block) * cut.block
        return ceil_div(live + 1, max(size, cut.min_split))

    def parts(self, local: bool) -> list[list[Part]]:
        """Of each program, its parts of a layer's attention, in order."""
        plan, cut = self.plan, self.plan.attention
        d, lots, each = plan.dims, cut.lots, cut.abreast
        # Queries that warps would have side by side are dealt out where there are programs enough.
        whole = sum(self.num_splits(n, local) for n in self.lengths) * d.num_kv_heads * lots
        while each > 1 and whole * (2 * cut.abreast // each) <= plan.programs:
            lots, each = 2 * lots, each // 2
        made = []
        for b, length in enumerate(self.lengths):
            num_splits = self.num_splits(length, local)
            made += [
                Part(b, kv, lot, each, split, num_splits)
                for split in range(num_splits)
                for kv in range(d.num_kv_heads)
                for lot in range(lots)
            ]
        return [made[plan.programs - 1 - p :: plan.programs] for p in range(plan.programs)]

    def queries(self, part: Part) -> list[tuple[int, int]]:
        """A part's queries: column, and query head."""
        d, most = self.plan.dims, LOT * part.lots
        made = []
        for number in range(part.lot * most, min(d.tokens * d.q_per_kv, (part.lot + 1) * most)):
            token, query = divmod(number, d.q_per_kv)
            made.append((part.sequence * d.tokens + token, part.kv_head * d.q_per_kv + query))
        return made

    @functools.cached_property
    def combined(self) -> int:
        """Elements of a head that are combined together."""
        plan, d = self.plan, self.plan.dims
        width = next_power_of_2(ceil_div(d.columns * d.num_heads * d.head_dim, plan.programs))
        width = min(max(width, _MIN_COMBINED), d.head_dim)
        return min(width, plan.threads, _MOST_SPLITS * plan.threads // plan.attention.max_splits)

    def combines(self, local: bool) -> list[list[tuple[int, int, int, int]]]:
        """Of each program, what it combines of a layer: column, query head, piece, KV splits."""
        plan, d = self.plan, self.plan.dims
        pieces = d.head_dim // self.combined
        num_splits = [self.num_splits(length, local) for length in self.lengths]
        numbers = range(d.columns * d.num_heads * pieces)
        made = []
        for p in range(plan.programs):
            some = []
            for number in numbers[p :: plan.programs]:
                column, query = divmod(number // pieces, d.num_heads)
                if (count := num_splits[column // d.tokens]) > 1:
                    some.append((column, query, number % pieces, count))
            made.append(some)
        return made

    def rows_of(self, segment: Segment) -> list[tuple[np.ndarray, int]]:
        """Of each tile that is not empty, the matrix's rows, and the part of the inputs."""
        d, part = self.plan.dims, self.plan.segments[segment]
        made = []
        for p in range(self.plan.programs):
            for group in groups_of(part, p):
                made.append((_rows(d.head_dim, d.ffw_dim, segment, part, group), p % part.splits))
        return made


def _rows(head_dim: int, ffw_dim: int, segment: Segment, part: SegmentPlan, group: int):
    half = part.rows // 2
    if segment == Segment.QKV:
        head, pair = divmod(group * half, head_dim // 2)
        first = head * head_dim + pair + np.arange(half)
        rows = np.concatenate([first, first + head_dim // 2])
        return rows[rows < part.out]
    if segment == Segment.GATE_UP:
        first = group * half + np.arange(half)
        first = first[first < ffw_dim]
        return np.concatenate([first, first + ffw_dim])
    rows = group * part.rows + np.arange(part.rows)
    return rows[rows < part.out]


def misowned(shares: Shares, segments: Sequence[Segment] | None = None) -> list[str]:
    """What is wrong with who computes what, as sentences."""
    plan, d, wrong = shares.plan, shares.plan.dims, []
    for segment in segments or sorted(plan.segments):
        part = plan.segments[segment]
        rows = 2 * d.ffw_dim if segment == Segment.GATE_UP else part.out
        count = np.zeros((part.splits, rows), int)
        for which, split in shares.rows_of(segment):
            np.add.at(count[split], which, 1)
        for split, row in np.argwhere(count != 1)[:1]:
            times = count[split, row]
            wrong.append(f"Row {row}, part {split}, of {segment.name} is computed {times} times.")
        most = max(shares.busy[segment])
        if most > part.tiles:
            wrong.append(f"A program has {most} tiles of {segment.name}, and uses {part.tiles}.")
        if part.splits * part.width < part.inner or (part.splits - 1) * part.width >= part.inner:
            wrong.append(f"The parts of {segment.name}'s inputs are not all of them, or too many.")
    wrong += _not_at_once(plan)
    # What is added to the residual is made where it is kept.
    for segment in (Segment.ATTN_OUT, Segment.DOWN):
        part = plan.segments[segment]
        if part.splits > 1:
            continue
        for p, owned in enumerate(shares.owned):
            mine = [g * part.rows // plan.rows for g in groups_of(part, p)]
            if sorted(set(mine)) != owned.tolist():
                wrong.append(f"Program {p} computes other rows of {segment.name} than it owns.")
                break
    return wrong


def _not_at_once(plan: StreamPlan) -> list[str]:
    """Segments whose sums stay in registers, or are rotated there, must be made use of once."""
    wrong = []
    for segment in (Segment.QKV, Segment.ATTN_OUT, Segment.DOWN):
        part = plan.segments[segment]
        if segment == Segment.DOWN and (part.splits > 1 or part.run > 1):
            continue
        if part.tiles > plan.flush:
            wrong.append(f"The {part.tiles} tiles of {segment.name} are not made use of at once.")
    return wrong
