"""The hand-overs of a step: for each program, what it waits for and what it writes, in order.

The words of a buffer that have one writer and are read together are an *item*. An *event* is a wait
for a set of items that carry a tag, or a write of a set of items with a tag. `orders` asks of all
schedules, `schedules` runs some of them.

What is assumed: a word is read whole; a program writes what depends on a word after it has read it;
what one program has read, others that hear of it find too. Nothing is assumed of the order in which
different words become visible.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pallas_kernels.stream.plan import Segment, StreamPlan

from .shares import Shares, groups_of

__all__ = [
    "F297B28",
    "HEAD_APART",
    "PAIRS",
    "Event",
    "ItemSet",
    "Model",
    "Protocol",
    "Step",
    "tag_bits",
]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What hand-overs have in common, but for who has what.

    Attributes:
        name: of it.
        head: the buffer of the head's input.
        head_counts_steps: whether that is written with the number of the step plus one, instead of
            the tag that a layer after the last one would have.
        odd_pairs: whether pairs carry twice the tag and one, which is never what pairs hold that
            were not written yet.
    """

    name: str
    head: str
    head_counts_steps: bool
    odd_pairs: bool = False

    def tag(self, layers: int, step: int, layer: int) -> int:
        """Of what is handed over in a layer; as whole numbers, which never come round."""
        return step * (layers + 1) + layer + 1

    def head_tag(self, layers: int, step: int) -> int:
        """Of the head's input."""
        return step + 1 if self.head_counts_steps else self.tag(layers, step, layers)

    def pair_tag(self, tag: int) -> int:
        """What pairs carry of a tag."""
        return 2 * tag + 1 if self.odd_pairs else tag


# As of that commit, the head's input is the residual that a layer after the last would have.
F297B28 = Protocol("f297b28", head="x_in", head_counts_steps=False)
# As the kernel has it: `test_handovers.py` compares what steps leave in a cache.
HEAD_APART = Protocol("head apart", head="x_head", head_counts_steps=True, odd_pairs=True)


# Buffers by what their words are. Those of half2 have 2 bits of a tag, other words 8, pairs 32.
HALF2 = ("x_in", "x_head", "x_mid", "attn", "ffw", "ffw_copy", "attn_block", "ffw_block")
WORDS = ("qkv",)
PAIRS = ("partial", "parts", "best")
# Read when a program begins, and written by the last one when all have ended: not exchanged.
CONTROL = "lengths"


def tag_bits(plan: StreamPlan, buffer: str) -> int:
    """Bits of a tag that a buffer's words carry."""
    if buffer in PAIRS or buffer == CONTROL:
        return 32
    return 2 if plan.half2 and buffer in HALF2 else 8


# What stands for an item.
Key = tuple[int, ...]


class ItemSet(NamedTuple):
    """Some items of a buffer; equal ones are the same object.

    Attributes:
        buffer: its name.
        number: of the set among the buffer's.
        items: sorted.
        full: whether these are all.
    """

    buffer: str
    number: int
    items: np.ndarray
    full: bool


class Event(NamedTuple):
    """A wait, or a write."""

    writes: bool
    items: ItemSet
    tag: int


class _Buffer:
    """A buffer's items, by what stands for them, and the sets of them."""

    def __init__(self, name: str, keys: Iterable[Key]):
        self.name = name
        self.index = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        self.sets: dict[bytes, ItemSet] = {}

    def some(self, keys: Iterable[Key]) -> ItemSet:
        return self._set(np.unique(np.array([self.index[key] for key in keys], np.int64)))

    @functools.cached_property
    def all(self) -> ItemSet:
        return self._set(np.arange(len(self.index)))

    def _set(self, items: np.ndarray) -> ItemSet:
        known = items.tobytes()
        if known not in self.sets:
            full = len(items) == len(self.index)
            self.sets[known] = ItemSet(self.name, len(self.sets), items, full)
        return self.sets[known]


class Step(NamedTuple):
    """A step's events, a list a program, and the tags that its words have before."""

    events: list[list[Event]]
    left: dict[str, int]


class Model:
    """The hand-overs of a plan's steps.

    Args:
        plan: the step's.
        protocol: what hand-overs have in common.
    """

    def __init__(self, plan: StreamPlan, protocol: Protocol = HEAD_APART):
        self.plan = plan
        self.protocol = protocol
        self._none = Shares(plan, (0,) * plan.dims.batch)  # of what no length changes
        self.buffers = self._buffers()
        self._own = self._owners()

    def size(self, buffer: str) -> int:
        """Items of a buffer."""
        return len(self.buffers[buffer].index)

    def _buffers(self) -> dict[str, _Buffer]:
        plan, d, none = self.plan, self.plan.dims, self._none
        owners = [(p,) for p, owned in enumerate(none.owned) if len(owned)]
        pieces = d.head_dim // none.combined
        heads = [(column, q) for column in range(d.columns) for q in range(d.num_heads)]
        keys: dict[str, Iterable[Key]] = dict.fromkeys(
            ("x_in", "x_head", "x_mid", "attn_block", "ffw_block"), owners
        )
        keys["qkv"] = [key for p in range(plan.programs) for key in self._qkv_items(p)]
        keys["attn"] = [(*head, piece) for head in heads for piece in range(pieces)]
        hidden = [key for p in range(plan.programs) for key in self._hidden_items(p)]
        keys["ffw"] = keys["ffw_copy"] = hidden
        keys["partial"] = [key for p in range(plan.programs) for key in self._partial_items(p)]
        splits = range(plan.attention.max_splits)
        keys["parts"] = [(*head, split) for head in heads for split in splits]
        keys["best"] = [(p,) for p in range(plan.programs)]
        keys[CONTROL] = [(0,)]
        return {name: _Buffer(name, some) for name, some in keys.items()}

    def _qkv_items(self, program: int) -> list[Key]:
        """Head by head, what a program projects."""
        part = self.plan.segments[Segment.QKV]
        a_head = self.plan.dims.head_dim // part.rows
        return list(dict.fromkeys((g // a_head, program) for g in groups_of(part, program)))

    def _hidden_items(self, program: int) -> list[Key]:
        """By the parts of the down projection's inputs, a program's hidden activations."""
        part, down = self.plan.segments[Segment.GATE_UP], self.plan.segments[Segment.DOWN]
        half, made = part.rows // 2, {}
        for group in groups_of(part, program):
            last = min((group + 1) * half, down.inner) - 1
            for split in range(group * half // down.width, last // down.width + 1):
                made[split, program] = None
        return list(made)

    def _partial_items(self, program: int) -> list[Key]:
        """By the smaller of both groups, rows whose partial sums a program makes."""
        down = self.plan.segments[Segment.DOWN]
        if down.splits == 1:
            return []
        unit = min(down.rows, self.plan.rows)
        units = -(-self.plan.dims.model_dim // unit)
        a_group, split = down.rows // unit, program % down.splits
        made = [g * a_group + i for g in groups_of(down, program) for i in range(a_group)]
        return [(u, split) for u in made if u < units]

    def _partials_wanted(self, program: int) -> list[Key]:
        down, plan = self.plan.segments[Segment.DOWN], self.plan
        if down.splits == 1:
            return []
        unit = min(down.rows, plan.rows)
        units, a_group = -(-plan.dims.model_dim // unit), plan.rows // unit
        mine = [int(g) * a_group + i for g in self._none.owned[program] for i in range(a_group)]
        return [(u, split) for u in mine if u < units for split in range(down.splits)]

    def _owners(self) -> list[dict[str, ItemSet | None]]:
        """Of each program, what is its own, whatever the lengths; None where that is nothing."""
        made = []
        for p in range(self.plan.programs):
            keys: dict[str, Sequence[Key]] = {
                name: [(p,)] if len(self._none.owned[p]) else []
                for name in ("x_in", "x_head", "x_mid", "attn_block", "ffw_block")
            }
            keys["qkv"] = self._qkv_items(p)
            keys["ffw"] = keys["ffw_copy"] = self._hidden_items(p)
            keys["partial"] = self._partial_items(p)
            keys["best"] = [(p,)]
            own = {
                name: self.buffers[name].some(some) if some else None for name, some in keys.items()
            }
            wanted = self._partials_wanted(p)
            own["partials wanted"] = self.buffers["partial"].some(wanted) if wanted else None
            split = p % self.plan.segments[Segment.DOWN].splits
            hidden = [key for key in self.buffers["ffw"].index if key[0] == split]
            for name in ("ffw", "ffw_copy"):
                own[f"{name} wanted"] = self.buffers[name].some(hidden) if hidden else None
            made.append(own)
        return made

    def lengths_after(self, steps: int, lengths: Sequence[int]) -> list[int]:
        """Lengths of the sequences some steps later, where all tokens count."""
        return [length + steps * self.plan.dims.tokens for length in lengths]

    def left(self, step: int) -> dict[str, int]:
        """The tags that words have when a step begins, where every step before wrote them."""
        protocol, layers = self.protocol, self.plan.dims.num_layers
        if step == 0:
            return dict.fromkeys(self.buffers, 0)
        left = dict.fromkeys(self.buffers, protocol.tag(layers, step - 1, layers - 1))
        left["partial"] = protocol.pair_tag(left["partial"])
        left["best"] = protocol.pair_tag(protocol.tag(layers, step - 1, layers))
        left[protocol.head] = protocol.head_tag(layers, step - 1)
        left["parts"] = 0  # as if they had never been wanted
        left[CONTROL] = step
        return left

    def step(self, number: int, lengths: Sequence[int]) -> Step:
        """The events of a step.

        Args:
            number: steps before it.
            lengths: of the sequences before it.
        """
        shares = Shares(self.plan, tuple(lengths))
        local = self.plan.dims.features.local_layers or (False,) * self.plan.dims.num_layers
        attention = {kind: self._attention(shares, kind) for kind in set(local)}
        events = [
            self._program(p, number, [attention[kind][p] for kind in local])
            for p in range(self.plan.programs)
        ]
        return Step(events, self.left(number))

    def _attention(self, shares: Shares, local: bool) -> list[list[tuple[bool, ItemSet]]]:
        """Of each program, what it waits for and writes of a layer's attention."""
        plan, d = self.plan, self.plan.dims
        qkv, attn, between = (self.buffers[name] for name in ("qkv", "attn", "parts"))
        pieces = range(d.head_dim // shares.combined)
        by_head: dict[int, list[Key]] = {}
        for key in qkv.index:
            by_head.setdefault(key[0], []).append(key)
        parts, combines = shares.parts(local), shares.combines(local)
        made = []
        for p in range(plan.programs):
            events: list[tuple[bool, ItemSet]] = []
            for part in parts[p]:
                queries = shares.queries(part)
                heads = {query for _, query in queries}
                key = d.num_heads + part.kv_head
                value = key + d.num_kv_heads
                if d.features.qk_norm == "full":
                    heads |= set(range(d.num_heads))
                if part.has_new:
                    heads |= {key, value}
                    if d.features.qk_norm == "full":
                        heads |= set(range(d.num_heads, d.num_heads + d.num_kv_heads))
                events.append((False, qkv.some(item for head in heads for item in by_head[head])))
                if part.num_splits == 1:
                    done = attn.some((*query, piece) for query in queries for piece in pieces)
                else:
                    done = between.some((*query, part.split) for query in queries)
                events.append((True, done))
            for *query, piece, num_splits in combines[p]:
                events.append((False, between.some((*query, split) for split in range(num_splits))))
                events.append((True, attn.some([(*query, piece)])))
            made.append(events)
        return made

    def _program(
        self, p: int, step: int, attention: list[list[tuple[bool, ItemSet]]]
    ) -> list[Event]:
        """A program's events of a step, in the order in which the kernel has them."""
        plan, own, protocol = self.plan, self._own[p], self.protocol
        layers, busy = plan.dims.num_layers, self._none.busy
        post_norm, split = plan.dims.features.post_norm, plan.segments[Segment.DOWN].splits > 1
        copies = plan.tuning.hidden_copies
        hidden = "ffw_copy" if copies == 2 and p & 1 else "ffw"
        events: list[Event] = []

        def add(writes: bool, items: ItemSet, tag: int) -> None:
            carried = protocol.pair_tag(tag) if items.buffer in PAIRS else tag
            events.append(Event(writes, items, carried))

        def write(items: ItemSet | None, tag: int) -> None:
            if items is not None:
                add(True, items, tag)

        def wait(items: ItemSet | None, tag: int, wanted: bool = True) -> None:
            if items is not None and wanted:
                add(False, items, tag)

        def block(name: str, tag: int) -> None:
            if post_norm:
                write(own[name], tag)
                wait(self.buffers[name].all, tag, own[name] is not None)

        control = self.buffers[CONTROL].all
        wait(control, step)
        write(own["x_in"], protocol.tag(layers, step, 0))
        for layer in range(layers):
            tag = protocol.tag(layers, step, layer)
            wait(self.buffers["x_in"].all, tag, busy[Segment.QKV][p] > 0)
            write(own["qkv"], tag)
            for writes, items in attention[layer]:
                add(writes, items, tag)
            wait(self.buffers["attn"].all, tag, busy[Segment.ATTN_OUT][p] > 0)
            block("attn_block", tag)
            write(own["x_mid"], tag)
            wait(self.buffers["x_mid"].all, tag, busy[Segment.GATE_UP][p] > 0)
            for name in ("ffw", "ffw_copy")[:copies]:
                write(own[name], tag)
            wait(own[f"{hidden} wanted"], tag, busy[Segment.DOWN][p] > 0)
            if split:
                write(own["partial"], tag)
                wait(own["partials wanted"], tag)
            block("ffw_block", tag)
            if layer + 1 < layers:
                write(own["x_in"], tag + 1)
            else:
                write(own[protocol.head], protocol.head_tag(layers, step))
        head = protocol.head_tag(layers, step)
        wait(self.buffers[protocol.head].all, head, busy[Segment.HEAD][p] > 0)
        tag = protocol.tag(layers, step, layers)
        write(own["best"], tag)
        if p == plan.programs - 1:
            wait(self.buffers["best"].all, tag)
            write(control, step + 1)
        return events
