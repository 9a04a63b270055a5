"""The kernel's inline PTX, run on a CPU by `ptx_machine`, and that machine itself.

Texts and constraints are those that a lowering for a GPU hands to Triton. What a test asks of a
text it asks in a function that takes an edit of it besides: see `EDITS`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from ptx_inline import Edit, Inline, bound, inline, inlines, map_text, shape
from ptx_machine import Machine, PtxError
from ptx_plans import Planned

from pallas_kernels.stream import ptx
from pallas_kernels.stream.fragment_layout import first_input, place_aside
from pallas_kernels.stream.half2 import HALF2_TAG_BITS
from pallas_kernels.stream.layout import SPARE_BYTES
from pallas_kernels.stream.plan import COLUMNS, PIECE, READ
from pallas_kernels.stream.ptx.giving_up import record_of
from pallas_kernels.stream.segments.attention import combining_threads

pytestmark = pytest.mark.once(
    "The machine and the texts are ours; a sample shows that they are traced.",
    sample=[
        "test_warps_wait_for_words_in_any_order",
        "test_an_instruction_does_what_the_manual_says",
        "test_a_row_is_read",
    ],
)

# bfloat16


def as_bfloat16(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.bfloat16)).view(np.uint16)


def as_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def as_words(bits: np.ndarray) -> np.ndarray:
    """Pairs of neighbours along the last axis as uint32, the first one below."""
    return np.ascontiguousarray(bits).view(np.uint32)


# A tile's products, and their sums


@dataclasses.dataclass(frozen=True)
class Tile(Planned):
    """What a product is made of."""

    rows: int
    pieces: int
    chunked: bool
    product_warps: int = 4
    warps: int = 4
    bits: int = 16

    @property
    def span(self) -> int:
        return self.product_warps * self.pieces * self.line * PIECE


@functools.cache
def product_text(tile: Tile) -> Inline:
    plan = tile.plan

    def body() -> None:
        none = jnp.zeros((plan.threads,), jnp.int32)
        ptx.multiply_tile(
            none,
            none,
            [none] * (4 * tile.pieces),
            none,
            rows=tile.rows,
            step=READ * tile.line,
            chunked=tile.chunked,
            threads=32 * tile.product_warps,
        )

    return inline(body)


@functools.cache
def sum_text(tile: Tile) -> Inline:
    warps = tile.product_warps
    count = COLUMNS * warps if tile.chunked else warps
    step = 4 * tile.rows * (1 if tile.chunked else COLUMNS)
    return inline(lambda: ptx.sum_shared(jnp.zeros((32,), jnp.int32), count, step))


def check_product(
    tile: Tile, edit: Edit = None, sum_edit: Edit = None, order: np.random.Generator | None = None
) -> None:
    """A tile in shared memory times activations in registers, against float64."""
    rng, plan = np.random.default_rng(0), tile.plan
    weights = as_bfloat16(rng.standard_normal((tile.rows, tile.span), np.float32))
    floats = COLUMNS * tile.product_warps * tile.rows
    size = 2 * weights.size + 4 * floats + 256 + SPARE_BYTES * plan.threads // 32
    machine = Machine(plan.threads, size, 16, order=order)
    sequences = 1 if tile.chunked else COLUMNS
    inputs = as_bfloat16(rng.standard_normal((sequences, tile.span), np.float32))
    ring = machine.shared_base
    machine.view(ring, weights.size, np.uint16)[:] = weights.ravel()
    thread = np.arange(plan.threads)
    column = thread % 32 // 4
    sizes = {"reads": tile.pieces, "grain": PIECE, "held": PIECE, "rows": tile.rows}
    part: Any = SimpleNamespace(**sizes, bits=16, fine=False)
    first = np.asarray(first_input(plan, part))
    words = []
    for q in range(tile.pieces):
        at = first[:, None] + q * tile.line * PIECE + np.arange(PIECE)
        # Warps that do not multiply hold zeros.
        held = inputs[0 if tile.chunked else column[:, None], at]
        held = np.where(thread[:, None] < 32 * tile.product_warps, held, 0).astype(np.uint16)
        words += list(as_words(held).T)
    # Products lie after the tile, and for a while nothing after them.
    products = ring + 2 * weights.size
    spare = products + 4 * floats + 256
    machine.spare = range(spare, ring + size)
    where = np.asarray(place_aside(plan, part, products, spare))
    text = product_text(tile).edited(edit)
    text.run(machine, ring + 2 * first, 2 * tile.span, where, *words)
    after = machine.view(products + 4 * floats, 256, np.uint8)
    assert (after == 0xFF).all(), "More is stored than the products."

    row, sequence = np.divmod(np.arange(tile.rows * sequences), sequences)
    at = products + 4 * (row if tile.chunked else row * COLUMNS + sequence)
    at = np.resize(at, plan.threads)  # threads beyond hold elements again
    [sums] = sum_text(tile).edited(sum_edit).run(machine, at)
    wanted = as_float(weights).astype(np.float64) @ as_float(inputs).astype(np.float64).T
    got = sums[: wanted.size].reshape(wanted.shape)
    # Sums of float32, of some thousand products of about 1.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6 * tile.span**0.5 * 8)


CHUNKED = [Tile(2, 1, True), Tile(4, 3, True), Tile(8, 2, True), Tile(16, 2, True)]
BATCHED = [Tile(2, 4, False), Tile(4, 1, False), Tile(8, 9, False), Tile(8, 3, False, 8, 8)]
IDLE = [Tile(4, 2, True, 4, 8), Tile(2, 3, False, 4, 8)]


@pytest.mark.parametrize("tile", [*CHUNKED, *BATCHED, *IDLE], ids=str)
def test_a_tiles_products_summed_up_are_its_rows_times_the_activations(tile):
    check_product(tile)


def test_warps_make_their_products_in_any_order():
    check_product(Tile(8, 2, True, 4, 8), order=np.random.default_rng(3))


# Feeding the ring


# In place of a tile's copies: it comes as a box.
BOX = -1


@dataclasses.dataclass(frozen=True)
class Ring:
    """A ring, and the tiles that pass through it."""

    layers: int
    layer_copies: tuple[int, ...]  # of each tile of a layer; 0 for an empty one
    head_copies: tuple[int, ...]  # all but the last one's are the same
    slots: int
    in_flight: int
    l2_tiles: int = 0
    l2_bytes: int = 48
    size: int = 64  # bytes of a copy
    threads: int = 64
    slot_bytes: int = 512
    scales: int = 0  # copies of a tile's scales at most, 32 bytes each; every other tile has some
    box: tuple[int, int] | None = None  # pieces of 16 bytes and rows of tiles that come as boxes
    bulk: bool = True  # whether by bulk copies, or by 16 bytes a thread
    scale_unit: int = 16  # bytes of which copies of scales have some, and begin at

    @property
    def scale_size(self) -> int:
        """Bytes of a copy of scales."""
        return 2 * self.scale_unit if self.scale_unit == 16 else 3 * self.scale_unit

    @property
    def row_words(self) -> int:
        """Of a descriptor."""
        return 16 if self.scales else 8

    @property
    def copies(self) -> tuple[int, ...]:
        """Of each descriptor; the embedding's comes first, and last the head's two."""
        return (0, *self.layer_copies, self.head_copies[0], self.head_copies[-1])

    @property
    def tensor(self) -> ptx.TensorMap:
        """Of the matrix whose tiles are boxes: rows of three of them, layers of four."""
        assert self.box is not None
        pieces, rows = self.box
        return ptx.TensorMap(
            pieces=3 * pieces,
            rows=4 * rows * self.layers,
            box=(2, pieces, rows),
            thread=self.threads - 32,
        )

    @property
    def feed(self) -> ptx.Feed:
        table = self.slots * self.slot_bytes
        barriers = table + 4 * self.row_words * len(self.copies)
        return ptx.Feed(
            slots=self.slots,
            slot_bytes=self.slot_bytes,
            descriptors=table,
            barriers=barriers,
            control=barriers + 8 * (self.slots + self.slots % 2),
            layer_tiles=len(self.layer_copies),
            layers=self.layers,
            head_tiles=len(self.head_copies),
            total=1 + self.layers * len(self.layer_copies) + len(self.head_copies),
            in_flight=self.in_flight,
            thread=self.threads - 32,
            copies=max(2, *(x for x in self.copies if x != BOX)),
            has_scales=self.scales > 0,
            l2_tiles=self.l2_tiles,
            l2_bytes=self.l2_bytes,
            sharing=0 if self.bulk else self.threads,
            scale_unit=self.scale_unit,
            matrix_rows=4 * self.box[1] if self.box else 0,
        )

    @property
    def bytes(self) -> int:
        return self.feed.control + 64 * self.feeders

    @property
    def feeders(self) -> int:
        """Warps that ask for tiles, each with words of its own."""
        return 1 if self.bulk else self.threads // 32

    @property
    def order(self) -> list[tuple[int, int]]:
        """Descriptor and layer of each tile."""
        within = [(1 + i, n) for n in range(self.layers) for i in range(len(self.layer_copies))]
        # All but the last one as if they were tiles of so many more layers.
        last, behind = len(self.head_copies) - 1, len(self.layer_copies) + 1
        head = [(behind + (i == last), self.layers + i) for i in range(last + 1)]
        return [(0, 0), *within, *head]


@functools.cache
def feed_text(feed: ptx.Feed, store: bool) -> Inline:
    def body(weights: Any) -> None:
        zero = jnp.int32(0)
        ptx.feed_ring(weights, zero, feed, *([zero, zero] if store else []))

    return inline(body, shape(16, jnp.bfloat16))


@functools.cache
def setup_texts(feed: ptx.Feed, threads: int) -> list[Inline]:
    """Clears shared memory, writes rows, makes barriers."""

    def body() -> None:
        rows, zero = jnp.zeros((threads,), jnp.int32), jnp.int32(0)
        ptx.clear_shared(zero, feed.control + 64 * max(1, feed.sharing // 32), threads)
        ptx.write_row(rows, [rows] * 8, rows == 0)
        ptx.start_barriers(zero, feed.slots, feed.sharing, alone=False)

    return inlines(body)


@functools.cache
def wait_text(most: int, bulk: bool) -> Inline:
    return inline(lambda: ptx.wait_copies(jnp.int32(0), jnp.int32(0), most, bulk))


class Fed:
    """A program whose ring is fed: the tiles it should hold, and what has been asked for."""

    def __init__(self, ring: Ring, seed: int, edit: Edit = None, map_edit: Edit = None):
        self.ring, self.feed, self.edit = ring, ring.feed, edit
        rng = np.random.default_rng(seed)
        self.machine = m = Machine(
            ring.threads, ring.bytes, 1 << 16, delay=lambda: int(rng.integers(1500))
        )
        m.memory[:] = rng.integers(0, 256, len(m.memory), np.uint8)
        self.base = m.shared_base
        # The first array begins in the middle: others lie before it.
        self.pointer = m.memory_base + 4096 * 8
        self.used = 0
        # Tiles asked for into the L2 cache, the next one, and what has been asked for of all.
        self.ahead: list[int] = []
        self._next_ahead = 0
        self._left: list[tuple[int, int]] | None = None
        self._pieces: list[tuple[int, int]] = []
        # Places of tiles are drawn, in pieces of 16 bytes from the pointer on.
        units = ring.size // 16
        self.rows = np.zeros((len(ring.copies), ring.row_words), np.int64)
        for number, copies in enumerate(ring.copies):
            in_layers = number <= len(ring.layer_copies)
            self.rows[number, :8] = [
                *self._begin(rng, 300 if in_layers else 20),
                int(rng.integers(units, max(units + 3, 30))),
                ring.size,
                copies,
                int(rng.integers(units, units + 3)) * 16,
                0,
            ]
            if ring.scales:
                some = int(rng.integers(1, ring.scales + 1)) if number % 2 and copies else 0
                self.rows[number, 8:] = [
                    *self._begin(rng, 40 if in_layers else 10),
                    int(rng.integers(2, 9)),
                    ring.scale_size,
                    some,
                    384,  # after the weights
                    16 + ring.scale_size,
                ]
            if copies == BOX:
                self.rows[number, :8] = self._box(rng)
        clear, write, start = setup_texts(self.feed, ring.threads)
        clear.run(m, self.base)
        thread = np.arange(ring.threads)
        mask = thread < len(self.rows)
        words = np.pad(self.rows, ((0, ring.threads - len(self.rows)), (0, 0))).T
        for first in range(0, ring.row_words, 8):
            at = self.base + self.feed.descriptors + 4 * (ring.row_words * thread + first)
            write.run(m, at, mask.astype(int), *words[first : first + 8])
        start.run(m, self.base + self.feed.barriers)
        self.record = m.memory_base + 6 * 128
        m.view(self.record, 2, np.uint32)[:] = 0
        m.view(self.base + self.feed.control + 48, 1, np.uint64)[:] = self.record
        if ring.box is not None:
            m.view(self.base, 128, np.uint8)[:] = 0xA5
            place = self.base + self.feed.control + ptx.MAP_IN_CONTROL
            operands = m.memory_base + 5 * 128, self._matrix, self.base, place
            map_text(ring.tensor).edited(map_edit).run(m, *operands)

    @property
    def _matrix(self) -> int:
        """Where the matrix begins whose tiles are boxes."""
        return self.pointer + 16 * 128

    def _box(self, rng: np.random.Generator) -> list[int]:
        """The descriptor of a tile that comes as a box, its rows as if they were copies."""
        tensor = self.ring.tensor
        _, pieces, rows = tensor.box
        row, piece = int(rng.integers(4)) * rows, int(rng.integers(3)) * pieces
        begin = 128 + row * tensor.pieces + piece
        word = 1 << 31 | piece << 16 | row
        apart, layer = tensor.pieces, tensor.rows // self.ring.layers * tensor.pieces
        return [begin, 0, layer, apart, 16 * pieces, rows, 16 * pieces, word]

    @staticmethod
    def _begin(rng: np.random.Generator, stride: int) -> list[int]:
        begin = int(rng.integers(-2000, 500))
        return [begin & 0xFFFFFFFF, begin >> 32 & 0xFFFFFFFF, stride]

    def places(self, index: int) -> list[tuple[int, int, int]]:
        """Where each copy of a tile comes from, its place in the slot, and its size."""
        row, layer = self.ring.order[index]
        places = []
        for half in range(0, self.ring.row_words, 8):
            low, high, stride, apart, size, copies, *last = self.rows[row, half:][:8].tolist()
            begin = (high << 32 | low) - (1 << 64 if high >> 31 else 0)
            unit = self.ring.scale_unit if half else 16
            at = self.pointer + unit * (begin + layer * stride)
            first, pitch = last if half else (0, last[0])
            places += [(at + unit * apart * i, first + pitch * i, size) for i in range(copies)]
        return places

    def slot(self, index: int) -> int:
        return self.base + index % self.ring.slots * self.ring.slot_bytes

    @property
    def all_asked(self) -> list[int]:
        """Tiles that each warp has asked for."""
        control = self.base + self.feed.control
        blocks = range(self.ring.feeders)
        return [int(self.machine.view(control + 64 * w, 1, np.uint32)[0]) for w in blocks]

    @property
    def asked(self) -> int:
        """Tiles that have been asked for, by all warps that have to."""
        return min(self.all_asked)

    def _small_on_their_way(self) -> set[int]:
        """The same as `on_their_way` of 16 bytes a thread: warps have a share of each tile."""
        wanted: dict[tuple[int, int], int] = {}
        for w, asked in enumerate(self.all_asked):
            for i in range(asked):
                for at, to, size in self.places(i):
                    unit = self.ring.scale_unit if to >= 384 and self.ring.scales else 16
                    warp = 32 * unit
                    mine = [
                        by for by in range(0, size, unit) if by // warp % self.ring.feeders == w
                    ]
                    wanted |= {(i, self.slot(i) + to + by): at + by for by in mine}
        made = [(x.to, x.source) for x in self.machine.copies]
        assert sorted(made) == sorted((to, at) for (_, to), at in wanted.items())
        # Places come round: in flight is what is asked for last.
        last = {(to, at): i for (i, to), at in sorted(wanted.items())}
        flying = {last[x.to, x.source] for x in self.machine.flying}
        return flying | set(range(self.asked, max(self.all_asked)))

    def on_their_way(self) -> set[int]:
        """Tiles of which some copy has not come. All copies are those of the tiles in order."""
        assert max(self.all_asked) <= self.feed.total
        if not self.ring.bulk:
            return self._small_on_their_way()
        flying, number = set(), 0
        copies = self.machine.copies
        for i in range(self.asked):
            wanted = [(self.slot(i) + to, at, size) for at, to, size in self.places(i)]
            made = copies[number : number + len(wanted)]
            # Threads that share the scales' copies begin with the last.
            assert sorted((x.to, x.source, x.size) for x in made) == sorted(wanted)
            if any(x in self.machine.flying for x in made):
                flying.add(i)
            number += len(wanted)
        assert number == len(copies)
        return flying

    def ask(self, used: int | None = None, beyond: int | None = None) -> None:
        """As `feed_ring` does: the next tile is asked for just where it may be."""
        f, numbers, before = self.feed, self.all_asked, self.on_their_way()
        if used is not None:
            self.used = used
        beyond = f.slots if beyond is None else beyond
        text = feed_text(f, used is not None)
        if text.has(self.edit):  # or it is of the other text
            text = text.edited(self.edit)
        text.run(self.machine, self.pointer, self.base, used or 0, beyond)
        after = self.on_their_way()
        limit = min(self.used + beyond, f.total)
        for number, asked in zip(numbers, self.all_asked, strict=True):
            # A warp with a share of each tile catches up, if it need not wait for words.
            while number < asked - 1 and used is not None and not self.ring.bulk:
                assert number < limit and number - f.in_flight not in after
                number += 1
            waits_for = number - f.in_flight
            if number >= limit:
                assert asked == number
            elif waits_for not in before:
                assert asked == number + 1
            elif waits_for in after:
                assert asked == number
        if used is None and numbers[-1] >= limit:
            self._look_ahead(numbers[-1])
        steps = [
            (at + by, step) for at, size in self._pieces for by, step in self._steps(size, 128)
        ]
        assert sorted(self.machine.prefetched) == sorted(steps)

    def _look_ahead(self, number: int) -> None:
        """What should have been asked for into the L2 cache, the ring being full."""
        if self._next_ahead < number:
            self._next_ahead, self._left = number, None
        if self._next_ahead >= min(number + self.feed.l2_tiles, self.feed.total):
            return
        if self._left is None:
            self.ahead.append(self._next_ahead)
            self._left = self.pieces_of([self._next_ahead])
        self._pieces += self._left[:1]
        self._left = self._left[1:]
        if not self._left:
            self._next_ahead, self._left = self._next_ahead + 1, None

    def pieces_of(self, tiles: Sequence[int]) -> list[tuple[int, int]]:
        """Address and size of what is asked for of tiles, one after another."""
        most = self.feed.l2_bytes
        return [
            (at + past, min(most, size - past))
            for index in tiles
            for at, to, size in self.places(index)
            if not self.ring.scales or to < 384  # of scales, none
            for past in range(0, size, most)
        ]

    def _steps(self, size: int, step: int) -> list[tuple[int, int]]:
        """Bytes to each of a copy's steps, and the size of it: all at once by a bulk copy."""
        return [(0, size)] if self.ring.bulk else [(by, step) for by in range(0, size, step)]

    def wait(self, index: int, edit: Edit = None, most: int = 2000) -> None:
        """Waits for a tile, and looks at it."""
        assert index < self.asked
        around, slot = divmod(index, self.ring.slots)
        barrier = self.base + self.feed.barriers + 8 * slot
        wait_text(most, self.ring.bulk).edited(edit).run(self.machine, barrier, around % 2)
        for at, to, size in self.places(index):
            here = self.machine.view(self.slot(index) + to, size, np.uint8)
            there = self.machine.view(at, size, np.uint8)
            np.testing.assert_array_equal(here, there)


def check_feed(
    ring: Ring, seed: int = 0, edit: Edit = None, wait_edit: Edit = None, map_edit: Edit = None
) -> Fed:
    """A program's step, as its loop does it: all tiles in their order."""
    fed = Fed(ring, seed, edit, map_edit)
    rng = np.random.default_rng(seed)
    for _ in range(ring.in_flight):
        fed.ask()
    for index in range(fed.feed.total):
        # Words of other programs may be waited for, or not.
        # Where little is asked for at a time, for longer.
        for _ in range(max(0, int(rng.integers(-3, 6))) * (5 if ring.l2_tiles else 1)):
            fed.machine.pass_time(int(rng.integers(300)))
            fed.ask()
        fed.wait(index, wait_edit)
        # Where words are waited for next, no more than the next tile.
        fed.ask(index + 1, 1 if index % 5 == 4 else None)
        assert fed.asked > index + 1 or fed.asked == fed.feed.total
    assert fed.asked == fed.feed.total
    fed.ask()
    return fed


ONE = Ring(3, (1, 1, 1), (1, 1), slots=4, in_flight=4)
TWO = Ring(3, (2, 1, 0, 2), (1, 1, 0), slots=5, in_flight=3)
MANY = Ring(2, (2, 5, 1, 0), (1,), slots=3, in_flight=2)
AHEAD = Ring(3, (2, 1, 3), (1, 1), slots=2, in_flight=2, l2_tiles=3)
AHEAD_OF_NONE = Ring(3, (2, 0, 3), (1, 0), slots=2, in_flight=2, l2_tiles=3)
SCALED = Ring(3, (2, 1, 3), (1, 1), slots=2, in_flight=2, scales=2, l2_tiles=3)
SCALED_MANY = Ring(2, (2, 4, 1, 0), (1,), slots=3, in_flight=2, scales=2)
BOXES = Ring(3, (2, BOX, 1, BOX), (1,), slots=3, in_flight=2, l2_tiles=2, box=(2, 5))
SCALED_BOXES = Ring(2, (2, BOX, 0), (1, 2), slots=2, in_flight=2, scales=2, box=(1, 8))
LONG = Ring(2, (1, 0, 1), (1,), slots=2, in_flight=2, size=4656, slot_bytes=4864, bulk=False)
RINGS = {
    "one": ONE,
    "two": TWO,
    "many": MANY,
    "l2": AHEAD,
    "l2 and empty ones": AHEAD_OF_NONE,
    "scales": SCALED,
    "many scales": SCALED_MANY,
    "boxes": BOXES,
    "boxes and scales": SCALED_BOXES,
}
RINGS |= {
    f"{name}, 16 bytes a thread": dataclasses.replace(ring, bulk=False)
    for name, ring in RINGS.items()
    if ring.box is None
}
RINGS["long rows, 16 bytes a thread"] = LONG
RINGS["scales by 8 bytes"] = dataclasses.replace(SCALED_MANY, bulk=False, scale_unit=8)
# By whole warps: their threads look for words together, however long any of them does.
BY_WARPS = dataclasses.replace(TWO, bulk=False)
BOTH = pytest.mark.parametrize("ring", [TWO, BY_WARPS], ids=["bulk", "16 bytes a thread"])


@pytest.mark.drawn("A ring comes in one of the orders.")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", RINGS)
def test_tiles_come_to_their_slots_in_order(name, seed):
    fed = check_feed(RINGS[name], seed)
    # Some are asked for ahead, of all layers.
    # Tiles of the head count as layers after those.
    layers = {fed.ring.order[index][1] for index in fed.ahead}
    inside = {layer for layer in layers if layer < fed.ring.layers}
    assert inside == (set(range(fed.ring.layers)) if fed.feed.l2_tiles else set())


def test_no_more_is_asked_for_than_may_be_in_flight():
    fed = Fed(TWO, 0)
    fed.machine.delay = 1 << 30
    for _ in range(20):
        fed.ask()
    # The embedding's tile is empty: it comes at once.
    assert fed.asked == 1 + TWO.in_flight


def test_tiles_beyond_a_full_ring_come_to_the_cache():
    fed = Fed(AHEAD, 0)
    for _ in range(30):
        fed.machine.pass_time(2000)
        fed.ask()
    assert fed.asked == AHEAD.slots
    assert fed.ahead == list(range(AHEAD.slots, AHEAD.slots + AHEAD.l2_tiles))
    # Each copy in two pieces, the last of which is what is left.
    assert [size for _, size in fed.machine.prefetched] == [48, 16] * 6
    assert fed.machine.prefetched == fed.pieces_of(fed.ahead)


def test_no_more_is_asked_for_than_may_be_ahead():
    fed = Fed(TWO, 0)
    for beyond, asked in ((1, 1), (1, 1), (3, 2), (3, 3), (3, 3), (None, 4)):
        fed.machine.pass_time(2000)
        fed.ask(0, beyond)
        assert fed.asked == asked


def check_skipped(edit: Edit = None) -> None:
    """What the ring has asked for meanwhile is not asked for ahead, in whichever layer it is."""
    fed = Fed(AHEAD, 0, edit)
    for number in (2, 9, 11):  # of the first layer, of the last one, and of the head
        while fed.asked < number:
            fed.machine.pass_time(2000)
            fed.ask(used=max(0, fed.asked - AHEAD.slots + 1))
        fed.ask()
    assert fed.ahead == [2, 9, 11]


def test_tiles_that_the_ring_has_asked_for_are_skipped():
    check_skipped()


def test_a_tile_that_never_comes_ends_the_launch():
    fed = Fed(ONE, 0)
    fed.machine.delay = 1 << 30
    for _ in range(3):
        fed.ask()
    fed.wait(0)
    with pytest.raises(PtxError, match="come to a trap"):
        fed.wait(1, most=50)


# Collecting words

TAG, STALE = 0x37, 0x36
WAYS = ("at once", "in any order", "one last")


class Kind(NamedTuple):
    """Of words: how many a piece has, which bits are the tag, and two tags."""

    size: int
    bits: int
    tag: int
    stale: int


ONES = Kind(8, 0xFF, TAG, STALE)
# Their tags differ from the one before in either bit, or in both.
HALF2, ODD_HALF2, EVEN_HALF2 = (
    Kind(4, HALF2_TAG_BITS, 1, stale) for stale in (1 << 16, 1 << 16 | 1, 0)
)


@functools.cache
def collect_text(ring: Ring, pieces: int, step: int, most: int, kind: Kind = ONES) -> Inline:
    places = [q * step for q in range(pieces)]

    def body(exchange: Any, weights: Any) -> None:
        each, zero = jnp.zeros((ring.threads,), jnp.int32), jnp.int32(0)
        how = kind.size, kind.bits, most, weights, zero, ring.feed
        ptx.collect_words(exchange, each, places, each, each, *how)

    return inline(body, shape(1024), shape(16, jnp.bfloat16))


def check_collect(
    pieces: int,
    way: str,
    edit: Edit = None,
    order: np.random.Generator | None = None,
    ring: Ring = TWO,
    kind: Kind = ONES,
) -> Fed:
    """Words that another program writes meanwhile are waited for.

    Args:
        pieces: of each thread at most.
        way: how words are written; of each thread's "one last": each is that of some thread.
        edit: of the text.
        order: of warps.
        ring: that is fed meanwhile.
        kind: of words.
    """
    rng, size = np.random.default_rng(pieces), kind.size
    fed = Fed(ring, pieces)
    m, threads, words = fed.machine, fed.ring.threads, fed.ring.threads * pieces * size
    m.order = order
    there = rng.integers(0, pieces + 1, threads)
    there[fed.feed.thread] = pieces
    if way == "one last":
        there[:] = pieces
    # The exchange lies after the weights: each thread's pieces stand apart. What the threads of a
    # warp load at once, 4 words each, lies side by side.
    exchange = m.memory_base + len(m.memory)
    m.memory = np.concatenate([m.memory, np.zeros(4 * words, np.uint8)])
    by_loads = np.arange(words).reshape(pieces, threads // 32, size // 4, 32, 4)
    by_thread = by_loads.swapaxes(2, 3).reshape(pieces, threads, size)
    held = m.view(exchange, words, np.uint32)
    values = rng.integers(0, 1 << 32, words) & ~kind.bits | kind.tag
    held[:] = rng.integers(0, 1 << 32, words) & ~kind.bits | kind.stale
    is_there = np.arange(pieces)[:, None] < there  # [pieces, threads]
    # Words that no thread waits for are never written.
    waited = np.broadcast_to(is_there[..., None], (pieces, threads, size))
    turn = rng.integers(0, 1 if way == "at once" else 40, waited.shape)
    if way == "one last":
        piece, thread, word = np.indices(waited.shape)
        last = thread % (size * pieces)
        # That of the last piece, which may be waited for first, before those of others.
        turn = np.where(size * piece + word == last, 1 + (last + size) % (size * pieces), 0)

    def write(number: int) -> None:
        some = by_thread[waited & (turn == number)]
        held[some] = values[some]

    for number in range(turn.max() + 1):
        m.later(70 * number, functools.partial(write, number))
    text = collect_text(fed.ring, pieces, size * threads, 512, kind).edited(edit)
    operands = (exchange + 4 * by_thread[0, :, 0], kind.tag, there, fed.pointer, fed.base)
    got = np.stack(text.run(m, *operands)).reshape(pieces, size, threads)
    wanted = values[by_thread].swapaxes(1, 2)
    np.testing.assert_array_equal(got, np.where(is_there[:, None], wanted, kind.tag))
    # Meanwhile the ring was fed, by each look: of some pieces, the last one is looked for first.
    looks = 2 if size == 8 and 4 < pieces <= 8 else 1
    assert way != "at once" or fed.asked == looks
    assert way != "in any order" or fed.asked == fed.ring.slots
    for index in range(fed.asked):
        fed.wait(index)
    fed.on_their_way()
    return fed


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pieces", [1, 4, 5, 8, 9])
def test_words_are_waited_for_until_all_carry_the_tag(pieces, way):
    check_collect(pieces, way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pieces", [1, 5])
def test_warps_wait_for_words_together(pieces, way):
    check_collect(pieces, way, ring=BY_WARPS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [HALF2, ODD_HALF2, EVEN_HALF2])
def test_words_of_two_activations_are_waited_for(kind, way):
    check_collect(8, way, kind=kind)


@pytest.mark.parametrize("way", WAYS)
@BOTH
def test_warps_wait_for_words_in_any_order(way, ring):
    check_collect(5, way, order=np.random.default_rng(1), ring=ring)


@pytest.mark.parametrize("seed", range(4))
def test_tiles_are_asked_for_ahead_while_words_are_waited_for(seed):
    # As there are few looks, all of a copy with each.
    ring = dataclasses.replace(AHEAD, l2_bytes=64)
    fed = check_collect(5, "in any order", order=np.random.default_rng(seed), ring=ring)
    ahead = range(AHEAD.slots, AHEAD.slots + AHEAD.l2_tiles)
    assert fed.machine.prefetched == fed.pieces_of(ahead)


class Waiting:
    """A program that waits for words of an exchange, of which no other program writes any."""

    def __init__(self, program: int = 5, used: int = 77, bulk: bool = True):
        self.fed = Fed(dataclasses.replace(ONE, bulk=bulk), 0)
        self.machine = m = self.fed.machine
        control = self.fed.base + self.fed.feed.control
        say = inline(lambda x: ptx.say_where(x, 0, jnp.int32(0), jnp.int32(0)), shape(64))
        say.run(m, self.fed.record, control, program)
        m.view(control + 20, 1, np.uint32)[:] = used
        self.said = used, program
        m.memory = np.concatenate([m.memory, np.zeros(1 << 16, np.uint8)])
        self.exchange = m.memory_base + len(m.memory) - (1 << 16)
        m.view(self.exchange, 1 << 14, np.uint32)[:] = STALE

    @property
    def record(self) -> np.ndarray:
        return self.machine.view(self.fed.record, 1, np.uint64)

    @property
    def missed(self) -> int:
        """Bytes from the exchange's beginning to the word that the record says is missing."""
        used, distance, program = ptx.said_by(int(self.record[0]))
        assert (used, program) == self.said
        return self.fed.record + 4 * distance - self.exchange


@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize("pieces", [2, 6])
def test_who_waits_for_words_in_vain_says_so_and_takes_nan(pieces, bulk):
    waiting = Waiting(bulk=bulk)
    text = collect_text(waiting.fed.ring, pieces, 64, 32)
    m, fed = waiting.machine, waiting.fed
    there = np.where(np.arange(ONE.threads) == 40, pieces, 0)
    at = waiting.exchange + 32 * np.arange(ONE.threads)
    words = np.stack(text.run(m, at, TAG, there, fed.pointer, fed.base))
    assert waiting.missed == 32 * 40
    assert words[0].tolist() == [0xFFFFFFFF if n else TAG for n in there]
    # A program that has nothing to wait for goes on.
    words = np.stack(text.run(m, at, TAG, 0, fed.pointer, fed.base))
    assert (words == TAG).all()


@pytest.mark.drawn("A word and a pair, of either ring.")
@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize("used", [76, 78])
def test_who_waits_leaves_when_another_has_given_up(used, bulk):
    """Of both, what is missing earlier in the step is what the record says."""
    waiting = Waiting(used=77, bulk=bulk)
    m, fed, record = waiting.machine, waiting.fed, waiting.record
    text = collect_text(fed.ring, 2, 64, 1 << 20)  # more looks than it could make here
    other = record_of(used, distance=1 << 20, program=3)
    m.later(3000, lambda: record.__setitem__(0, other))
    words = text.run(m, waiting.exchange, TAG, 2, fed.pointer, fed.base, limit=200_000)
    assert (words[0] == 0xFFFFFFFF).all()
    if used < 77:
        assert record[0] == other
    else:
        assert waiting.missed == 0


def test_of_words_awaited_together_the_first_one_is_named():
    waiting = Waiting()
    m, fed = waiting.machine, waiting.fed
    at = waiting.exchange + 32 * np.arange(ONE.threads)[::-1]
    collect_text(ONE, 2, 64, 32).run(m, at, TAG, 2, fed.pointer, fed.base)
    assert waiting.missed == 0


def test_records_are_what_was_said():
    for said in ((0, 1, 0), (77, 12345, 131), ((1 << 20) - 1, (1 << 31) - 1, 319)):
        assert ptx.said_by(record_of(*said)) == said
        assert 0 < record_of(*said) < 1 << 64


def test_a_program_that_hears_of_a_fault_still_takes_what_is_there():
    waiting = Waiting()
    m, fed = waiting.machine, waiting.fed
    waiting.record[:] = 3
    m.view(waiting.exchange, 1 << 14, np.uint32)[:] = 0x100 | TAG
    words = collect_text(ONE, 2, 64, 32).run(m, waiting.exchange, TAG, 2, fed.pointer, fed.base)
    assert (np.stack(words) == 0x100 | TAG).all()
    assert waiting.record[0] == 3


@functools.cache
def each_text(
    ring: Ring, arrays: int, together: int, pairs: bool, most: int, sparing: bool = False
) -> Inline:
    def body(exchange: Any, weights: Any) -> None:
        each = [jnp.zeros((ring.threads * together,), jnp.int32)] * arrays
        zero = jnp.int32(0)
        how = pairs, together, most, weights, zero, ring.feed
        ptx.collect_each(exchange, each, zero, *how, sparing=sparing)

    return inline(body, shape(1024), shape(16, jnp.bfloat16))


def check_each(
    arrays: int,
    together: int,
    pairs: bool,
    edit: Edit = None,
    order: Any = None,
    ring: Ring = TWO,
    late: int | None = None,
) -> None:
    """Words or pairs of several arrays, anywhere, which another program writes meanwhile.

    Args:
        arrays: that are waited for together.
        together: elements of each, of a thread.
        pairs: whether pairs are waited for.
        edit: of the text.
        order: of warps.
        ring: that is fed meanwhile.
        late: which of a thread's elements comes last, in one thread of each warp: the others look
            on as long as it is missing. None: they come in any order.
    """
    rng, fed = np.random.default_rng(arrays), Fed(ring, arrays)
    m, threads, count = fed.machine, ring.threads, arrays * together
    m.order = order
    places = rng.permutation(count * threads).reshape(count, threads)
    mask = rng.random(places.shape) < 0.8
    mask[:, fed.feed.thread] = True  # who feeds the ring waits as well
    last = np.zeros_like(mask)
    if late is not None:
        last[late, 5::32] = mask[late, 5::32] = True
    exchange, tag = m.memory_base + len(m.memory), 0x37 if not pairs else 0x1234_5637
    m.memory = np.concatenate([m.memory, np.zeros(4 * (1 + pairs) * places.size, np.uint8)])
    held = m.view(exchange, (1 + pairs) * places.size, np.uint32).reshape(-1, 1 + pairs)
    values = rng.integers(0, 1 << 24, held.shape) << 8 | 0x37
    held[:] = values ^ 0x100  # of others
    if pairs:
        values[:, 1], held[:, 1] = tag, tag ^ (1 << rng.integers(0, 32, len(held)))
    else:
        bit = rng.integers(0, 8, held.shape)
        bit[places[last]] = 0
        held ^= (1 << bit).astype(np.uint32)
    stale, wanted = held.copy(), np.where(mask, values[places, 0], 0 if pairs else tag)
    # What is not waited for never comes.
    turn = np.full(len(held), 1 << 30)
    turn[places[mask]] = rng.integers(0, 30, mask.sum()) if late is None else 0
    turn[places[last]] = 29

    def write(number: int) -> None:
        held[turn == number] = values[turn == number]

    for number in range(30):
        m.later(90 * number, functools.partial(write, number))
    text = each_text(ring, arrays, together, pairs, 512).edited(edit)
    offsets = np.where(mask, (1 + pairs) * places, -1 - rng.integers(0, 5, places.shape))
    others = [x for x in (tag, exchange, fed.pointer, fed.base) for _ in range(together)]
    got = np.stack(text.run(m, *offsets, *others, limit=60_000))
    np.testing.assert_array_equal(got, wanted)
    assert (held[turn == 1 << 30] == stale[turn == 1 << 30]).all()
    assert fed.asked == ring.slots
    for index in range(fed.asked):
        fed.wait(index)


@pytest.mark.parametrize("pairs", [False, True], ids=["words", "pairs"])
@pytest.mark.parametrize(("arrays", "together"), [(1, 1), (3, 2), (2, 4)])
@BOTH
def test_arrays_are_waited_for_until_all_carry_the_tag(arrays, together, pairs, ring):
    check_each(arrays, together, pairs, ring=ring)
    check_each(arrays, together, pairs, order=np.random.default_rng(7), ring=ring)


@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize("pairs", [False, True], ids=["words", "pairs"])
@pytest.mark.parametrize("sparing", [False, True])
def test_who_waits_for_arrays_in_vain_says_so_and_takes_nan(sparing, pairs, bulk):
    waiting = Waiting(bulk=bulk)
    m, fed, missing = waiting.machine, waiting.fed, np.arange(ONE.threads) == 9
    text = each_text(fed.ring, 2, 1, pairs, 32, sparing)
    # Of the first array all is there; of the second, one thread's.
    m.view(waiting.exchange, 64, np.uint32)[:] = TAG
    first, second = np.where(missing, 0, -1), np.where(missing, 512, -1)
    others = TAG, waiting.exchange, fed.pointer, fed.base
    words = np.stack(text.run(m, first, second, *others))
    nothing = 0 if pairs else TAG
    assert waiting.missed == 4 * 512
    np.testing.assert_array_equal(words, [np.where(missing, 0xFFFFFFFF, nothing)] * 2)
    # What is missing may be of the first array, too.
    waiting.record[:] = 0
    text.run(m, np.where(missing, 768, -1), np.where(missing, 0, -1), *others)
    assert waiting.missed == 4 * 768
    waiting.record[:] = 0
    # A program that has nothing to wait for goes on.
    words = np.stack(text.run(m, -1, -1, *others))
    assert (words == nothing).all()


# Combining KV splits


@functools.cache
def combine_text(ring: Ring, count: int, lanes: int, step: int, most: int = 512) -> Inline:
    def body(exchange: Any, weights: Any) -> None:
        each, zero = jnp.zeros((ring.threads,), jnp.int32), jnp.int32(0)
        out = ptx.combine_splits(
            exchange, each, each, each, zero, count, lanes, step, most, weights, zero, ring.feed
        )
        # Of no use, it would be dropped.
        ptx.store_word(exchange, each, out.astype(jnp.int32), each == 0, interpret=False)

    return inlines(body, shape(1024), shape(16, jnp.bfloat16))[0]


def check_combine(
    splits: int, width: int, edit: Edit = None, order: Any = None, ring: Ring = TWO
) -> None:
    """Elements of KV splits that other programs hand over meanwhile, more or fewer of them."""
    size, tag = 32, 0x7654_3210
    lanes, *split = combining_threads(jnp.arange(ring.threads), width, splits)
    number, within = (np.asarray(x, np.int64) for x in split)
    element = 16 + (within & (width - 1))
    rng, row = np.random.default_rng(splits), 2 * (size + 2)
    for num_splits in {2, splits // 2 + 1, splits}:
        fed = Fed(ring, 0)
        m, exchange = fed.machine, fed.machine.memory_base + len(fed.machine.memory)
        m.order = order
        m.memory = np.concatenate([m.memory, np.full(4 * row * splits, 0xFF, np.uint8)])
        held = m.view(exchange, row * splits, np.uint32).reshape(splits, size + 2, 2)
        out, top = rng.normal(size=(num_splits, size)), 30 * rng.normal(size=(num_splits, 1)) - 300
        total = rng.uniform(1, 200, (num_splits, 1))
        made = np.concatenate([out, total, top], axis=1).astype(np.float32)
        turn = rng.integers(0, 20, made.shape)

        def write(now: int, held=held, made=made, turn=turn, num_splits=num_splits) -> None:
            held[:num_splits, :, 0][turn == now] = made.view(np.uint32)[turn == now]
            held[:num_splits, :, 1][turn == now] = tag

        for now in range(20):
            m.later(150 * now, functools.partial(write, now))
        text = combine_text(ring, splits // lanes, lanes, lanes * row).edited(edit)
        at = exchange + 4 * (number * row)
        there = -((number - num_splits) // lanes)
        operands = (at + 8 * element, at + 8 * size, there, tag, fed.pointer, fed.base)
        [got] = text.run(m, *operands, limit=60_000)
        made = made.astype(np.float64)
        weight = np.exp2(made[:, -1:] - made[:, -1].max())
        wanted = (weight * made[:, :size]).sum(axis=0) / (weight * made[:, size : size + 1]).sum()
        np.testing.assert_allclose(got, wanted[element], rtol=2e-5, atol=1e-6)
        assert fed.asked == ring.slots


@pytest.mark.parametrize(("splits", "width"), [(16, 4), (4, 16), (2, 16), (32, 8)])
@BOTH
def test_splits_are_combined_when_all_have_come(splits, width, ring):
    check_combine(splits, width, ring=ring)


@pytest.mark.parametrize("bulk", [True, False])
def test_who_combines_splits_in_vain_says_so_and_makes_nan(bulk):
    waiting = Waiting(bulk=bulk)
    m, fed, count = waiting.machine, waiting.fed, 4
    text = combine_text(fed.ring, count, 1, 64, 32)
    # Threads of the second warp wait for a KV split each, and it has all but its value.
    thread = np.arange(ONE.threads)
    m.view(waiting.exchange + 4 * 4096, 4, np.uint32)[:] = (0, TAG, 0, TAG)
    there, sums = np.where(thread == 40, 1, 0), waiting.exchange + 4 * 4096
    operands = (waiting.exchange, sums, there, TAG, fed.pointer, fed.base)
    [out] = text.run(m, *operands)
    assert np.isnan(out[40])
    assert waiting.missed == 4 * 4096


def test_warps_combine_splits_in_any_order():
    check_combine(16, 8, order=np.random.default_rng(1))


@pytest.mark.parametrize("threads", [128, 256])
@pytest.mark.parametrize(
    ("width", "splits"), [(8, 16), (16, 16), (16, 32), (128, 8), (32, 2), (8, 1)]
)
def test_threads_of_a_warp_combine_an_element(threads, width, splits):
    lanes, *split = combining_threads(jnp.arange(threads), width, splits)
    number, within = (np.asarray(x) for x in split)
    for element in range(width):
        mine = np.flatnonzero(within == element)
        np.testing.assert_array_equal(number[mine], np.arange(lanes))
        assert len({*(mine // 32)}) == 1
        # A shuffle reaches them.
        assert (np.diff(mine) == 32 // lanes).all()
    assert splits % lanes == 0


def test_a_pair_is_stored_as_one():
    def body(exchange: Any) -> None:
        each = jnp.zeros((32,), jnp.int32)
        ptx.store_word(exchange, each, each, each == 0, interpret=False)
        ptx.store_pair(exchange, each, each, each, each == 0, interpret=False)

    word, pair = inlines(body, shape(64))
    machine, lane = Machine(32, 16, 512), np.arange(32)
    at, odd = machine.memory_base + 8 * lane, lane % 2
    pair.run(machine, at, lane, lane + 100, odd)
    word.run(machine, at, lane + 50, 1 - odd)
    first, second = machine.view(machine.memory_base, 64, np.uint32).reshape(32, 2).T
    np.testing.assert_array_equal(first, np.where(odd, lane, lane + 50))
    np.testing.assert_array_equal(second, np.where(odd, lane + 100, 0xFFFFFFFF))


def check_pieces(pieces: int, edit: Edit = None) -> None:
    """Each thread's pieces, as many as it has; those it has not may lie beyond memory."""
    threads, step = 32, 256

    def body(weights: Any) -> None:
        each = jnp.zeros((threads,), jnp.int32)
        words = ptx.load_pieces([weights], [], each, [q * step for q in range(pieces)], each)
        # Of no use, it would be dropped.
        ptx.write_row(each, [words[0]] * 8, each == 0)

    text, _ = inlines(body, shape(16, jnp.bfloat16))
    text, thread = text.edited(edit), np.arange(threads)
    # There is room for the last piece of half of the threads.
    machine = Machine(threads, 16, 2 * step * (pieces - 1) + 16 * 16)
    held = np.random.default_rng(pieces).integers(1, 1 << 32, len(machine.memory) // 4)
    machine.view(machine.memory_base, len(held), np.uint32)[:] = held
    first = 4 * thread  # in words
    there = np.minimum(thread % (pieces + 1), np.where(thread < 16, pieces, pieces - 1))
    got = np.stack(text.run(machine, machine.memory_base + 4 * first, there))
    for q in range(pieces):
        for i in range(4):
            at = np.where(q < there, first + q * (step // 2) + i, 0)
            np.testing.assert_array_equal(got[4 * q + i], np.where(q < there, held[at], 0))


@pytest.mark.parametrize("pieces", [1, 3, 4])
def test_pieces_that_are_not_there_are_zeros(pieces):
    check_pieces(pieces)


@pytest.mark.parametrize("arrays", [1, 2, 3, 4])
def test_pieces_come_of_the_last_array_whose_condition_holds(arrays):
    threads, step, pieces, size = 32, 256, 2, 1024
    thread = np.arange(threads)

    def body(*refs: Any) -> None:
        each = jnp.arange(threads, dtype=jnp.int32)
        # Every combination of conditions is that of some threads.
        beyond = [each & (1 << i) != 0 for i in range(arrays - 1)]
        words = ptx.load_pieces(refs, beyond, 8 * each, [q * step for q in range(pieces)], each & 8)
        ptx.write_row(each, [words[0]] * 8, each == 0)

    arguments = [shape(size, jnp.bfloat16)] * arrays
    text = inlines(body, *arguments)[0]
    machine = Machine(threads, 16, 4 * 2 * size)
    held = np.random.default_rng(arrays).integers(1, 1 << 32, (4, size // 2), np.uint32)
    machine.view(machine.memory_base, held.size, np.uint32)[:] = held.ravel()
    # Some arrays lie before the first one.
    places = [2, 0, 3, 1][:arrays]
    pointers = [machine.memory_base + 2 * size * place for place in places]
    got = np.stack(text.run(machine, *bound(body, pointers, *arguments)))
    which = np.zeros(threads, int)
    for i in range(arrays - 1):
        which[thread & (1 << i) != 0] = i + 1
    for q in range(pieces):
        for i in range(4):
            wanted = held[np.array(places)[which], 4 * thread + q * step // 2 + i]
            np.testing.assert_array_equal(got[4 * q + i], np.where(thread & 8, wanted, 0))


def check_row(edit: Edit = None) -> None:
    """A row is read by all threads, and its neighbours are not."""
    text = inline(lambda: ptx.read_row(jnp.int32(0))).edited(edit)
    machine = Machine(64, 128, 16)
    machine.view(machine.shared_base, 32, np.uint32)[:] = 1000 + np.arange(32)
    got = np.stack(text.run(machine, machine.shared_base + 48))
    np.testing.assert_array_equal(got, np.broadcast_to(1012 + np.arange(8)[:, None], (8, 64)))


def test_a_row_is_read():
    check_row()


def check_halves(edit: Edit = None) -> None:
    """Numbers of two bytes are written to their places, and nothing beside them."""

    def body() -> None:
        each = jnp.zeros((32,), jnp.int32)
        ptx.write_halves(each, each.astype(jnp.bfloat16), each == 0)

    text, lane = inline(body).edited(edit), np.arange(32)
    machine = Machine(32, 128, 16)
    # Every other one is negative, and its sign extended to a word.
    values, mask = np.where(lane % 2, -32768 + lane, 0x3F80 + lane), lane % 3 != 0
    text.run(machine, machine.shared_base + 2 * (5 * lane % 32), values, mask.astype(int))
    wanted = np.full(64, 0xFFFF, np.uint16)
    wanted[(5 * lane % 32)[mask]] = values[mask] & 0xFFFF
    np.testing.assert_array_equal(machine.view(machine.shared_base, 64, np.uint16), wanted)


def test_halves_are_written():
    check_halves()


def test_the_ring_lies_at_the_end_of_shared_memory():
    machine = Machine(32, 5000, 16)
    [base] = inline(lambda: ptx.ring_base(1000 + 128, 128)).run(machine, 0)
    assert (base % 128 == 0).all()
    assert 0 <= machine.shared_base + 5000 - (int(base[0]) + 1000) < 128


# Edits of texts that must not go unnoticed

REPLACE = "tensormap.replace.tile"
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"

EDITS: dict[str, tuple[Callable[[Edit], Any], Sequence[tuple[str, str]]]] = {
    "chunked product": (
        lambda edit: check_product(Tile(8, 2, True, 4, 8), edit),
        [
            ("and.b32 next_row, group, 1", "and.b32 next_row, group, 2"),
            ("@is_idle bra idle", ""),
            ("ld.shared.v4.b32 *, [next_row+512]", "ld.shared.v4.b32 *, [row+512]"),
            (f"{MMA} *, {{x_15, y_15, x_16, *}}", f"{MMA} *, {{x_15, y_16, x_16, *}}"),
            ("st.shared.v4.f32 [$3+16]", "st.shared.v4.f32 [$3]"),
            ("mov.b32 $0, 0", ""),
        ],
    ),
    "product": (
        lambda edit: check_product(Tile(4, 3, False), edit),
        [
            ("@mine ld.shared.v4.b32", "ld.shared.v4.b32"),
            ("@mine st.shared.v2.f32", "st.shared.v2.f32"),
            ("mul.lo.u32 row, group, $2", "mul.lo.u32 row, thread, $2"),
            ("add.f32 sum_2, sum_2, sum_14", ""),
            (f"{MMA} *, *, {{$8, $9}}", f"{MMA} *, *, {{$9, $8}}"),
        ],
    ),
    "sum": (
        lambda edit: check_product(Tile(4, 2, True), None, edit),
        [
            ("ld.shared.f32 *, [$1+48]", "ld.shared.f32 *, [$1+32]"),
            ("add.f32 number_9, number_9, number_13", ""),
            ("mov.b32 $0, number_1", "mov.b32 $0, number_2"),
        ],
    ),
    "feed": (
        lambda edit: check_feed(TWO, 0, edit),
        [
            ("add.u32 limit, limit, $4", "add.u32 limit, limit, 5"),
            ("setp.lt.u32 go, asked, limit", "setp.le.u32 go, asked, limit"),
            ("and.pred go, go, earlier_has_come", ""),
            ("xor.b32 phase, phase, 1", ""),
            ("xor.b32 parity, parity, phase", ""),
            ("selp.b32 parity, 1, 0, wraps", "selp.b32 parity, 0, 1, wraps"),
            ("mul.wide.u32 along, next_layer, stride", "mul.wide.u32 along, next_row_1, stride"),
            ("@ends mov.b32 next_row, first_row", ""),
            ("@ends add.u32 next_layer, next_layer, 1", ""),
            ("setp.gt.and.u32 ends, next_row, 4, go", "setp.gt.u32 ends, next_row, 4"),
            ("selp.b32 first_row, 1, 5", "selp.b32 first_row, 1, 6"),
            ("setp.ge.u32 is_last, next_layer, 5", "setp.ge.u32 is_last, next_layer, 4"),
            ("mul.lo.u32 bytes, size, copies", "mov.b32 bytes, size"),
            ("add.u64 source, source, by", "sub.u64 source, source, by"),
            ("mov.b64 source, {low, high}", "mov.b64 source, {low, low}"),
            ("setp.gt.and.u32 is_there, copies, 1, asks", "setp.gt.u32 is_there, copies, 1"),
            ("and.pred asks, go, lead", "and.pred asks, go, go"),
        ],
    ),
    "feed of many": (
        lambda edit: check_feed(MANY, 0, edit),
        [
            ("@!asks mov.b32 copies, 0", ""),
            ("add.u32 place, place, apart", "add.u32 place, place, size"),
            ("sub.u32 copies, copies, 1", ""),
        ],
    ),
    "feed of many by a warp": (
        lambda edit: check_feed(MANY, 0, edit),
        [
            ("setp.lt.and.u32 own_copy, lane, copies, go", "setp.lt.u32 own_copy, lane, copies"),
            ("setp.lt.and.u32 own_copy, lane, copies", "setp.le.and.u32 own_copy, lane, copies"),
            ("mad.lo.u32 place, lane, apart, place", "mad.lo.u32 place, lane, size, place"),
            ("mul.lo.u32 units, step, lane", "mov.b32 units, step"),
            ("and.pred asks, go, lead", "and.pred asks, go, go"),
            ("shr.u32 warp, thread, 5", "shr.u32 warp, thread, 6"),
        ],
    ),
    "feed of boxes": (
        lambda edit: check_feed(BOXES, 0, edit),
        [
            ("and.b32 piece, piece, 32767", ""),
            ("and.b32 box_row, box, 65535", "mov.b32 box_row, box"),
            ("mad.lo.u32 box_row, next_layer, 20, box_row", ""),
            ("setp.lt.and.s32 is_box, box, 0, asks", "setp.lt.s32 is_box, box, 0"),
            ("@is_box mov.b32 copies, 0", ""),
            (
                "cp.async.bulk.tensor.3d.shared::cluster.global.tile"
                ".mbarrier::complete_tx::bytes.L2::cache_hint *, [map, {element, piece, box_row}]",
                "cp.async.bulk.tensor.3d.shared::cluster.global.tile"
                ".mbarrier::complete_tx::bytes.L2::cache_hint *, [map, {element, box_row, piece}]",
            ),
        ],
    ),
    "map": (
        lambda edit: check_feed(BOXES, 0, map_edit=edit),
        [
            ("st.shared.b32 [word], 0", ""),
            ("@is_later bra made", ""),
            ("sub.u32 thread, thread, 32", ""),
            (
                f"{REPLACE}.box_dim.shared::cta.b1024.b32 *, 2, 5",
                f"{REPLACE}.box_dim.shared::cta.b1024.b32 *, 2, 4",
            ),
            (
                f"{REPLACE}.global_dim.shared::cta.b1024.b32 *, 2, 60",
                f"{REPLACE}.global_dim.shared::cta.b1024.b32 *, 2, 59",
            ),
            (
                f"{REPLACE}.global_stride.shared::cta.b1024.b64 *, 1, 96",
                f"{REPLACE}.global_stride.shared::cta.b1024.b64 *, 1, 80",
            ),
            (
                f"{REPLACE}.rank.shared::cta.b1024.b32 *, 2",
                f"{REPLACE}.rank.shared::cta.b1024.b32 *, 3",
            ),
            ("st.shared.b64 [$4], $1", ""),
            ("fence.proxy.tensormap::generic.acquire.gpu [$1], 128", ""),
            ("fence.proxy.async.shared::cta", ""),
        ],
    ),
    "feed ahead": (
        lambda edit: check_feed(AHEAD, 0, edit),
        [
            ("@is_past mov.b32 ahead, asked", ""),
            ("min.u32 left, left, 48", "min.u32 left, left, 64"),
            ("sub.u32 left, size, begun", "mov.b32 left, size"),
            ("add.u32 begun, begun, 48", "add.u32 begun, begun, 64"),
            ("@is_whole mov.b32 begun, 0", ""),
            ("@is_whole add.u32 past, past, 1", ""),
            ("shl.b32 past, past, 16", "shl.b32 past, past, 15"),
            ("@done mov.b32 begun, 0", ""),
            ("mul.wide.u32 along, step, past", "mov.b64 along, 0"),
            ("cvt.u64.u32 along, begun", "mov.b64 along, 0"),
            ("add.u32 ahead_limit, asked, 3", "add.u32 ahead_limit, asked, 4"),
            ("min.u32 ahead_limit, ahead_limit, 12", ""),
            ("mul.wide.u32 along, ahead_layer, stride", "mul.wide.u32 along, next_layer_1, stride"),
            ("@ends mov.b32 ahead_row, first_row", ""),
            ("@ends add.u32 ahead_layer, ahead_layer, 1", ""),
            ("setp.lt.u32 is_layer, ahead_layer, 3", "setp.lt.u32 is_layer, ahead_layer, 4"),
        ],
    ),
    "feed ahead of empty ones": (
        lambda edit: check_feed(AHEAD_OF_NONE, 0, edit),
        [("@asks cp.async.bulk.prefetch.L2.global", "cp.async.bulk.prefetch.L2.global")],
    ),
    "skipping ahead": (
        check_skipped,
        [
            ("@is_past mov.b32 ahead_row, next_row", ""),
            ("@is_past mov.b32 ahead_layer, next_layer", ""),
            ("@is_past mov.b32 been, 0", ""),
            ("setp.lt.u32 is_past, ahead, asked", "setp.gt.u32 is_past, ahead, asked"),
        ],
    ),
    "feed by 16 bytes a thread": (
        lambda edit: check_feed(RINGS["many scales, 16 bytes a thread"], 0, edit),
        [
            ("setp.lt.u32 go, asked, limit", "setp.le.u32 go, asked, limit"),
            ("and.pred go, go, earlier_has_come", ""),
            ("vote.sync.all.pred go, go, 0xffffffff", "and.pred go, go, lead_1"),
            ("mad.lo.u32 own, warp, 64", "mad.lo.u32 own, warp, 0"),
            ("xor.b32 parity, parity, phase", ""),
            ("@ends mov.b32 next_row, first_row", ""),
            ("mov.b32 layer, next_layer", "mov.b32 layer, next_row_1"),
            ("@around xor.b32 phase, phase, 1", ""),
            ("sub.s32 rest, size, own", "mov.b32 rest, size"),
            ("add.u32 row, row, apart", "add.u32 row, row, size_1"),
            ("add.u64 begin, begin, by", ""),
            ("sub.u32 parts_left, parts_left, 1", "sub.u32 parts_left, parts_left, 2"),
            ("add.u32 place, slot_place, place", "mov.b32 place, slot_place"),
            ("cp.async.mbarrier.arrive.noinc.shared::cta.b64", ""),
        ],
    ),
    "feed of long rows": (
        lambda edit: check_feed(LONG, 0, edit),
        [
            ("add.u32 to, to, 4096", ""),
            ("add.u64 at, at, 4096", "add.u64 at, at, 1024"),
            ("@is_some bra some", ""),
            ("setp.gt.s32 is_some, rest, 1024", "setp.ge.s32 is_some, rest, 0"),
        ],
    ),
    "feed ahead by 16 bytes a thread": (
        lambda edit: check_feed(RINGS["l2, 16 bytes a thread"], 0, edit),
        [("sub.s32 rest, left, offset", "mov.b32 rest, left")],
    ),
    "feed ahead of empty ones by 16 bytes a thread": (
        lambda edit: check_feed(RINGS["l2 and empty ones, 16 bytes a thread"], 0, edit),
        [("setp.gt.and.s32 is_there, rest, 0, asks", "setp.gt.s32 is_there, rest, 0")],
    ),
    "collect by whole warps": (
        lambda edit: check_collect(4, "one last", edit, ring=BY_WARPS),
        [("vote.sync.all.pred found, found, 0xffffffff", "")],
    ),
    "wait": (
        lambda edit: check_feed(ONE, 0, None, edit),
        [
            ("@has_come bra come", "bra come"),
            (
                "mbarrier.try_wait.parity.shared::cta.b64 has_come, [$1], $2",
                "mbarrier.try_wait.parity.shared::cta.b64 has_come, [$1], 0",
            ),
            ("bra look", ""),
        ],
    ),
    "collect": (
        lambda edit: check_collect(4, "one last", edit),
        [
            ("and.b32 test, test, 255", "and.b32 test, test, 254"),
            ("lop3.b32 test, *, *, test, 0xbe", "lop3.b32 test, *, *, test, 0x3c"),
            ("sub.u32 left, left, 1", ""),
            ("@found and.b32 left, left", "and.b32 left, left"),
            ("@found bra done", "bra done"),
        ],
    ),
    "collect odd half2": (
        lambda edit: check_collect(4, "one last", edit, kind=ODD_HALF2),
        [("and.b32 test, test, 65537", "and.b32 test, test, 1")],
    ),
    "collect even half2": (
        lambda edit: check_collect(4, "one last", edit, kind=EVEN_HALF2),
        [
            ("and.b32 test, test, 65537", "and.b32 test, test, 65536"),
            ("lop3.b32 test, $7, $17, test, 0xbe", ""),
            (
                "ld.relaxed.gpu.global.v4.b32 {$4, $5, $6, $7}",
                "ld.relaxed.gpu.global.v4.b32 {$5, $4, $6, $7}",
            ),
        ],
    ),
    "words of arrays, one last": (
        lambda edit: check_each(3, 2, False, edit, late=3),
        [
            ("and.b32 left, left, 255", "and.b32 left, left, 254"),
            ("xor.b32 wrong, $3, $12", "xor.b32 wrong, $2, $12"),
        ],
    ),
    "words of arrays": (
        lambda edit: check_each(3, 2, False, edit),
        [
            ("setp.ge.s32 wanted, $7, 0", ""),
            ("mov.b32 $5, $12", ""),
            ("mad.wide.s32 place, $9, 4", "mad.wide.s32 place, $8, 4"),
            ("mad.wide.s32 place, $9, 4", "mad.wide.s32 place, $9, 8"),
            ("@found bra done", "bra done"),
        ],
    ),
    "pairs of arrays, one last": (
        lambda edit: check_each(3, 2, True, edit, late=4),
        [("xor.b32 wrong, tag_5, $12", "mov.b32 wrong, 0")],
    ),
    "pairs of arrays": (
        lambda edit: check_each(3, 2, True, edit),
        [
            ("mov.b64 {$2, tag_3}, pair", "mov.b64 {tag_3, $2}, pair"),
            ("mov.b32 tag_2, $12", ""),
            ("mov.b32 $5, 0", ""),
            ("ld.relaxed.gpu.global.b64 pair", ""),
        ],
    ),
    "combined KV splits": (
        lambda edit: check_combine(16, 8, edit),
        [
            ("selp.f32 top_2, top_2", ""),
            ("shfl.sync.bfly.b32 other, largest, 8", "shfl.sync.bfly.b32 other, largest, 0"),
            ("shfl.sync.bfly.b32 other, value_1, 4", "shfl.sync.bfly.b32 other, value_1, 1"),
            ("mul.f32 total_2, total_2, top_2", ""),
            ("add.f32 value_1, value_1, value_2", ""),
            ("mov.b64 top_pair_2, {0, $4}", ""),
            ("mov.b64 {number, tagged}, value_pair_1", "mov.b64 {number, tagged}, total_pair_1"),
            ("max.f32 largest, largest, other", ""),
        ],
    ),
    "pieces": (
        lambda edit: check_pieces(3, edit),
        [
            ("mov.b32 $5, 0", ""),
            ("setp.gt.s32 is_there, $13, 1", "setp.ge.s32 is_there, $13, 1"),
            ("setp.gt.s32 is_there, $13, 2", ""),
            ("ld.global.nc.v4.b32 *, [$12+1024]", "ld.global.nc.v4.b32 *, [$12+512]"),
            ("ld.global.nc.v4.b32 {$4, $5, *, *}", "ld.global.nc.v4.b32 {$5, $4, *, *}"),
        ],
    ),
    "row": (
        check_row,
        [
            ("ld.shared.v4.b32 *, [$8+16]", "ld.shared.v4.b32 *, [$8]"),
            ("ld.shared.v4.b32 {$0, $1, *, *}", "ld.shared.v4.b32 {$1, $0, *, *}"),
        ],
    ),
    "halves": (
        check_halves,
        [
            ("@wanted st.shared.b16", "st.shared.b16"),
            ("mov.b32 {low, high}", "mov.b32 {high, low}"),
            ("st.shared.b16", "st.shared.b32"),
        ],
    ),
    "collect many": (
        lambda edit: check_collect(6, "in any order", edit),
        [
            ("@found bra again", ""),
            (
                "ld.relaxed.gpu.global.v4.b32 {$40, $41, *, *}",
                "ld.relaxed.gpu.global.v4.b32 {$41, $40, *, *}",
            ),
        ],
    ),
}


@pytest.mark.parametrize(
    ("case", "edit"),
    [(case, edit) for case, (_, edits) in EDITS.items() for edit in edits],
    ids=lambda x: x if isinstance(x, str) else x[0].strip(";"),
)
def test_an_edit_is_noticed(case, edit):
    with pytest.raises((PtxError, AssertionError)):
        EDITS[case][0](edit)


# The machine itself


def lane_values(text: str, constraints: str, *operands: Any) -> list[np.ndarray]:
    """Results of a warp's threads."""
    return Machine(32, 64, 64).run(text, constraints, operands)


def f32(*values: float) -> list[int]:
    return np.array(values, np.float32).view(np.uint32).tolist()


ONES = 0xFFFFFFFF
HAND = [
    # What, operands, result
    ("add.u32", [ONES, 3], 2),
    ("sub.s32", [1, 3], -2 & ONES),
    ("mul.lo.u32", [0x10001, 0x10001], 0x20001),
    ("mul.hi.u32", [0x10001, 0x10001], 1),
    ("mad.lo.u32", [3, 32, 5], 101),
    ("min.u32", [-1 & ONES, 2], 2),
    ("min.s32", [-1 & ONES, 2], ONES),
    ("max.s32", [-1 & ONES, 2], 2),
    ("div.u32", [17, 5], 3),
    ("div.s32", [-17 & ONES, 5], -3 & ONES),
    ("rem.u32", [17, 5], 2),
    ("rem.s32", [-17 & ONES, 5], -2 & ONES),
    ("neg.s32", [5], -5 & ONES),
    ("not.b32", [0xF0F0], 0xFFFF0F0F),
    ("shl.b32", [0x80000001, 4], 0x10),
    ("shl.b32", [1, 32], 0),
    ("shr.u32", [0x80000000, 4], 0x08000000),
    ("shr.s32", [0x80000000, 4], 0xF8000000),
    ("shr.s32", [0x80000000, 40], ONES),
    ("prmt.b32", [0x33221100, 0x77665544, 0x5410], 0x55441100),
    ("prmt.b32", [0x33221100, 0x77665544, 0x7632], 0x77663322),
    ("prmt.b32", [0x332211F0, 0x77665544, 0x0008], 0xF0F0F0FF),
    ("add.f32", f32(1.5, -0.25), f32(1.25)[0]),
    ("fma.rn.f32", f32(1 + 2**-23, 1 + 2**-23, -1), f32(2**-22 + 2**-46)[0]),
    ("mul.rn.f32", f32(3, -0.5), f32(-1.5)[0]),
    ("mad.lo.s32", [-3 & ONES, 32, 5], -91 & ONES),
    ("and.b32", [0xF0F0, 0x3C3C], 0x3030),
    ("or.b32", [0xF0F0, 0x0F00], 0xFFF0),
    ("xor.b32", [0xF0F0, 0x3C3C], 0xCCCC),
    ("max.f32", f32(np.nan, 2), f32(2)[0]),
    ("max.NaN.f32", f32(np.nan, 2), 0x7FFFFFFF),
    ("max.NaN.f32", f32(2, np.nan), 0x7FFFFFFF),
    ("max.NaN.f32", f32(-3, 2), f32(2)[0]),
    ("min.NaN.f32", f32(-3, 2), f32(-3)[0]),
    # 1 and -2, 0.5 and 65504; a NaN of one half says nothing of the other.
    ("max.NaN.f16x2", [0xC0003C00, 0x7BFF3800], 0x7BFF3C00),
    ("max.NaN.f16x2", [0x7E013C00, 0x38004000], 0x7FFF4000),
    ("max.NaN.f16x2", [0x3C000001, 0x7C010002], 0x7FFF0002),
    ("max.f16x2", [0x7E013C00, 0x38004000], 0x38004000),
    ("abs.f32", f32(-1.5), f32(1.5)[0]),
    ("abs.ftz.f32", [0x80000001], 0),
    ("div.rn.f32", f32(1, 3), 0x3EAAAAAB),
    ("div.rn.f32", f32(-1, 0), 0xFF800000),
    ("rcp.rn.f32", f32(3), 0x3EAAAAAB),
    ("rcp.rn.f32", f32(0), 0x7F800000),
    ("neg.f32", f32(0), 0x80000000),
    ("add.ftz.f32", [1, 0], 0),
    ("add.f32", [1, 0], 1),
    ("ex2.approx.ftz.f32", f32(-3), f32(0.125)[0]),
    ("rcp.approx.ftz.f32", f32(-8), f32(-0.125)[0]),
    # The first operand is the upper half; a tie goes to the even neighbour.
    ("cvt.rn.bf16x2.f32", f32(1 + 2**-8, -2), 0x3F80C000),
    ("cvt.rn.bf16x2.f32", f32(1 + 3 * 2**-8, np.nan), 0x3F827FFF),
    ("cvt.rn.f32.s32", [-3 & ONES], f32(-3)[0]),
    ("cvt.rn.f32.u32", [ONES], f32(2.0**32)[0]),
    ("cvt.rzi.s32.f32", f32(-2.75), -2 & ONES),
    ("cvt.rni.u32.f32", f32(2.5), 2),
    ("cvt.rni.s32.f32", f32(-3.5), -4 & ONES),
    ("cvt.rni.s32.f32", f32(np.nan), 0),
    ("cvt.rzi.u32.f32", f32(-5), 0),
]


@pytest.mark.parametrize(("name", "operands", "wanted"), HAND, ids=str)
def test_an_instruction_does_what_the_manual_says(name, operands, wanted):
    inputs = ", ".join(f"${1 + i}" for i in range(len(operands)))
    constraints = "=r" + ",r" * len(operands)
    [got] = lane_values(f"{name} $0, {inputs};", constraints, *operands)
    assert hex(got[0]) == hex(wanted)
    assert (got == got[0]).all()


def test_lop3_takes_its_table_by_bits():
    values = np.arange(32)
    a, b, c = 7 * values, values**3, values**2
    text = "lop3.b32 $0, $2, $3, $4, 0xbe; lop3.b32 $1, $2, $3, $4, 0xca;"
    joined, chosen = lane_values(text, "=&r,=&r,r,r,r", a, b, c)
    np.testing.assert_array_equal(joined, (a ^ b) | c)
    np.testing.assert_array_equal(chosen, (a & b) | (~a & c))


COMPARISONS = [
    ("lt.u32", 1, ONES, True),
    ("lt.s32", 1, ONES, False),
    ("ls.u32", 2, 2, True),
    ("hi.u32", 2, 2, False),
    ("eq.b32", 2, 2, True),
    ("ne.f32", *f32(np.nan, 1), False),
    ("neu.f32", *f32(np.nan, 1), True),
    ("ge.f32", *f32(2, 1), True),
    ("num.f32", *f32(2, np.nan), False),
]


@pytest.mark.parametrize(("name", "a", "b", "wanted"), COMPARISONS, ids=str)
def test_comparisons(name, a, b, wanted):
    relation, kind = name.split(".")
    text = (
        "{ .reg .pred %p, %q, %r, %s; setp.ne.u32 %s, $6, 0;"
        f"setp.{name} %p|%q, $4, $5; selp.u32 $0, 1, 0, %p; selp.u32 $1, 1, 0, %q;"
        f"setp.{relation}.and.{kind} %r, $4, $5, %s; selp.u32 $2, 1, 0, %r;"
        f"setp.{relation}.or.{kind} %r, $4, $5, !%s; selp.u32 $3, 1, 0, %r; }}"
    )
    third = np.arange(32) % 2
    held, other, both, either = lane_values(text, ",".join(["=&r"] * 4 + ["r"] * 3), a, b, third)
    assert (held == wanted).all()
    assert (other == (not wanted)).all()
    np.testing.assert_array_equal(both, wanted & third)
    np.testing.assert_array_equal(either, wanted | (1 - third))


def test_words_are_packed_and_unpacked():
    text = (
        "{ .reg .b16 %x, %y; .reg .b64 %w; mov.b32 {%x, %y}, $3; mov.b32 $0, {%y, %x};"
        "mov.b64 %w, {$3, $4}; mov.b64 {$1, _}, %w; shr.u64 %w, %w, 32; mov.b64 {$2, _}, %w; }"
    )
    swapped, low, high = lane_values(text, "=&r,=&r,=&r,r,r", 0x11112222, 0x33334444)
    assert [hex(x[0]) for x in (swapped, low, high)] == ["0x22221111", "0x11112222", "0x33334444"]
    [wide] = lane_values("mul.wide.s32 $0, $1, $2;", "=l,r,r", -3, 1 << 30)
    assert wide.view(np.int64)[0] == -3 << 30
    [number] = lane_values("{ .reg .b16 %x; mov.b16 %x, 0xC040; cvt.f32.bf16 $0, %x; }", "=f", *())
    assert number[0] == -3


@pytest.mark.parametrize("depth", [8, 16])
def test_a_matrix_product_has_the_fragments_of_the_manual(depth):
    rng = np.random.default_rng(depth)
    a = as_bfloat16(rng.standard_normal((2, 16, depth), np.float32))
    b = as_bfloat16(rng.standard_normal((2, depth, 8), np.float32))
    c = rng.standard_normal((2, 16, 8)).astype(np.float32)
    halves = depth // 8
    a_words, b_words = np.zeros((2 * halves, 64), np.uint32), np.zeros((halves, 64), np.uint32)
    c_words, places = np.zeros((4, 64), np.float32), []
    for thread in range(64):
        w, group, t = thread // 32, thread % 32 // 4, thread % 4
        for k in range(halves):
            for down in range(2):
                low, high = a[w, group + 8 * down, 8 * k + 2 * t : 8 * k + 2 * t + 2]
                a_words[2 * k + down, thread] = int(low) | int(high) << 16
            low, high = b[w, 8 * k + 2 * t : 8 * k + 2 * t + 2, group]
            b_words[k, thread] = int(low) | int(high) << 16
        at = [(w, group + 8 * (i // 2), 2 * t + i % 2) for i in range(4)]
        c_words[:, thread] = [c[x] for x in at]
        places.append(at)
    names = [f"${4 + i}" for i in range(3 * halves + 4)]
    vectors = [names[: 2 * halves], names[2 * halves : 3 * halves], names[3 * halves :]]
    operands = ", ".join(f"{{{', '.join(v)}}}" for v in vectors)
    text = (
        f"mma.sync.aligned.m16n8k{depth}.row.col.f32.bf16.bf16.f32 {{$0, $1, $2, $3}}, {operands};"
    )
    constraints = ",".join(["=f"] * 4 + ["r"] * (3 * halves) + ["f"] * 4)
    machine = Machine(64, 16, 16)
    got = np.stack(machine.run(text, constraints, [*a_words, *b_words, *c_words]))
    product = as_float(a).astype(np.float64) @ as_float(b) + c
    wanted = np.array([[product[at] for at in places[thread]] for thread in range(64)]).T
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def as_signed(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of 8 bits, of which some are the smallest and the largest there are."""
    limits = np.iinfo({"s8": np.int8, "u8": np.uint8}[kind])
    made = rng.integers(limits.min, limits.max, shape, limits.dtype, endpoint=True)
    extreme = rng.random(shape)
    made[extreme < 0.1], made[extreme > 0.9] = limits.min, limits.max
    return made


@pytest.mark.parametrize("kinds", [("s8", "s8"), ("u8", "s8"), ("s8", "u8")], ids="-".join)
def test_a_matrix_product_of_bytes_has_the_fragments_of_the_manual(kinds):
    """Every element, of a lane at a time, as the manual's two columns of formulas place it."""
    rng = np.random.default_rng(1)
    a, b = as_signed(rng, kinds[0], (2, 16, 32)), as_signed(rng, kinds[1], (2, 32, 8))
    c = rng.integers(-1000, 1000, (2, 16, 8)).astype(np.int32)
    c[1] = rng.choice([-(1 << 31), (1 << 31) - 1], (16, 8))  # of which sums wrap around
    a_bytes, b_bytes = np.zeros((4, 64, 4), a.dtype), np.zeros((2, 64, 4), b.dtype)
    c_words, places = np.zeros((4, 64), np.int32), []
    for thread in range(64):
        w, group, t = thread // 32, thread % 32 // 4, thread % 4
        for i in range(16):
            row = group if i // 4 in (0, 2) else group + 8
            a_bytes[i // 4, thread, i % 4] = a[w, row, 4 * t + i % 4 + (16 if i >= 8 else 0)]
        for i in range(8):
            b_bytes[i // 4, thread, i % 4] = b[w, 4 * t + i % 4 + (16 if i >= 4 else 0), group]
        at = [(w, group + 8 * (i // 2), 2 * t + i % 2) for i in range(4)]
        c_words[:, thread] = [c[x] for x in at]
        places.append(at)
    words = [*a_bytes.view(np.uint32)[..., 0], *b_bytes.view(np.uint32)[..., 0], *c_words]
    text = (
        f"mma.sync.aligned.m16n8k32.row.col.s32.{kinds[0]}.{kinds[1]}.s32 {{$0, $1, $2, $3}}, "
        "{$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    got = np.stack(Machine(64, 16, 16).run(text, ",".join(["=r"] * 4 + ["r"] * 10), words))
    product = a.astype(np.int64) @ b.astype(np.int64) + c
    wanted = np.array([[product[at] for at in places[thread]] for thread in range(64)]).T
    assert (np.abs(wanted) >= 1 << 31).any()
    np.testing.assert_array_equal(got.view(np.int32), wanted.astype(np.int32))


def test_vectors_of_shared_memory_are_loaded_and_stored():
    machine = Machine(32, 1024, 16)
    values = np.random.default_rng(0).standard_normal(256).astype(np.float32)
    machine.view(machine.shared_base, 256, np.float32)[:] = values
    lane = np.arange(32)
    at = machine.shared_base + 16 * lane
    text = "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4]; st.shared.v2.f32 [$4+512], {$3, $0};"
    four = machine.run(text, "=&f,=&f,=&f,=&f,r", [at])
    np.testing.assert_array_equal(np.stack(four, axis=1).ravel(), values[:128])
    stored = machine.view(machine.shared_base + 512, 128, np.float32).reshape(32, 4)
    np.testing.assert_array_equal(stored[:, :2], values[:128].reshape(32, 4)[:, [3, 0]])
    text = "ld.shared.v2.f32 {$0, $1}, [$3]; ld.shared.u16 $2, [$3+6];"
    x, y, half = machine.run(text, "=&f,=&f,=&r,r", [at])
    np.testing.assert_array_equal(np.stack([x, y], axis=1), values[:128].reshape(32, 4)[:, :2])
    np.testing.assert_array_equal(half, values[1:128:4].view(np.uint32) >> 16)


def test_a_choice_is_of_bits_or_of_numbers():
    lane = np.arange(32)
    text = (
        "{ .reg .pred %p; setp.lt.s32 %p, $3, 5; selp.f32 $0, 0f3F800000, 0f00000000, %p;"
        "selp.b32 $1, $3, 9, %p; selp.s32 $2, -1, $3, !%p; }"
    )
    number, bits, signed = lane_values(text, "=&f,=&r,=&r,r", lane)
    np.testing.assert_array_equal(number, lane < 5)
    np.testing.assert_array_equal(bits, np.where(lane < 5, lane, 9))
    np.testing.assert_array_equal(signed.view(np.int32), np.where(lane < 5, lane, -1))


SHUFFLES = [
    ("bfly", 5, 31, lambda lane: lane ^ 5),
    ("idx", 7, 31, lambda lane: 7),
    ("idx", 2, 0x181F, lambda lane: lane // 8 * 8 + 2),  # in groups of 8
    ("up", 3, 0, lambda lane: lane - 3 if lane >= 3 else lane),
    ("down", 3, 31, lambda lane: lane + 3 if lane <= 28 else lane),
]


@pytest.mark.parametrize(("mode", "by", "bounds", "source"), SHUFFLES)
def test_shuffles(mode, by, bounds, source):
    text = (
        "{ .reg .pred %p; "
        f"shfl.sync.{mode}.b32 $0|%p, $2, {by}, {bounds}, 0xffffffff; selp.u32 $1, 1, 0, %p; }}"
    )
    got, there = lane_values(text, "=&r,=&r,r", 100 + np.arange(32))
    wanted = [100 + source(lane) for lane in range(32)]
    assert got.tolist() == wanted
    if mode in ("up", "down"):
        np.testing.assert_array_equal(there, got != 100 + np.arange(32))
    else:
        assert there.all()


LOOK = (
    "{ .reg .pred %p; mbarrier.test_wait.parity.shared::cta.b64 %p, [$1], $2;"
    "selp.u32 $0, 1, 0, %p; }"
)


def by_one(instruction: str) -> str:
    """An instruction that one thread executes."""
    return (
        "{ .reg .pred %p; .reg .b32 %t; mov.u32 %t, %tid.x; setp.eq.u32 %p, %t, 0;"
        f"@%p {instruction}; }}"
    )


def test_a_barrier_counts_arrivals_and_bytes():
    machine = Machine(32, 64, 256, delay=100)
    at, to, source = machine.shared_base, machine.shared_base + 16, machine.memory_base
    machine.view(source, 32, np.uint8)[:] = np.arange(32)

    def passed(parity: int) -> bool:
        return bool(machine.run(LOOK, "=r,r,r", [at, parity])[0][0])

    machine.run(by_one("mbarrier.init.shared::cta.b64 [$0], 2"), "r", [at])
    # The phase before the first one has parity 1, and has passed.
    assert not passed(0)
    assert passed(1)
    arrive = by_one("mbarrier.arrive.shared::cta.b64 _, [$0]")
    machine.run(arrive, "r", [at])
    machine.run(by_one("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], 32"), "r", [at])
    assert not passed(0)
    name = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    machine.run(by_one(name + " [$1], [$2], 32, [$0]"), "r,r,l", [at, to, source])
    assert not passed(0)
    with pytest.raises(PtxError, match="while a copy is on its way there"):
        machine.run("ld.shared.b32 $0, [$1];", "=r,r", [to])
    machine.pass_time(100)
    assert passed(0)
    assert not passed(1)
    assert machine.run("ld.shared.u8 $0, [$1];", "=r,r", [to + 31])[0][0] == 31
    machine.run(arrive, "r", [at])
    machine.run(arrive, "r", [at])
    assert passed(1)
    assert not passed(0)


HAND_OVER = (
    "{ .reg .b32 %t, %a; mov.u32 %t, %tid.x; shl.b32 %a, %t, 2; add.u32 %a, %a, $1;"
    "st.shared.b32 [%a], %t; bar.sync 0; xor.b32 %a, %a, 128; ld.shared.b32 $0, [%a]; }"
)


def test_threads_meet_at_a_barrier():
    for seed in range(4):
        machine = Machine(64, 256, 16, order=np.random.default_rng(seed))
        [got] = machine.run(HAND_OVER, "=r,r", [machine.shared_base + 0])
        np.testing.assert_array_equal(got, np.arange(64) ^ 32)


@pytest.mark.parametrize("order", [None, np.random.default_rng(0)], ids=["in step", "drawn"])
def test_a_missing_barrier_is_noticed(order):
    machine = Machine(64, 256, 16, order=order)
    with pytest.raises(PtxError, match="nothing has told it"):
        machine.run(HAND_OVER.replace("bar.sync 0;", ""), "=r,r", [machine.shared_base])


TELL = (
    "{ .reg .pred %p; .reg .b32 %w; mov.u32 %w, %warpid; setp.eq.u32 %p, %w, 0; @%p bra waits;"
    "st.shared.b32 [$1], 7; bar.arrive 1, 64; mov.u32 $0, 7; {after} bra over;"
    "waits: {before} bar.sync 1, 64; ld.shared.b32 $0, [$1]; over: }"
)


@pytest.mark.parametrize("order", [None, np.random.default_rng(0)], ids=["in step", "drawn"])
def test_who_arrives_at_a_barrier_tells_and_is_told_nothing(order):
    def told(before: str, after: str) -> np.ndarray:
        machine = Machine(64, 64, 16, order=order)
        text = TELL.replace("{before}", before).replace("{after}", after)
        return machine.run(text, "=&r,r", [machine.shared_base])[0]

    assert (told("", "") == 7).all()
    with pytest.raises(PtxError, match="nothing has told it"):
        told("st.shared.b32 [$1+4], 5;", "ld.shared.b32 $0, [$1+4];")


COPY = (
    "{ .reg .pred %p; .reg .b32 %t; mov.u32 %t, %tid.x; setp.ne.u32 %p, %t, 32; "
    "st.shared.b32 [$1+32], %t; ld.shared.b32 $0, [$1+16]; {between} @%p bra over;"
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], 32;"
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$1+16], [$2], 32, [$1];"
    "over: }"
).replace("st.shared", "@!%p st.shared")
WAIT = (
    "{ .reg .pred %p; again: mbarrier.try_wait.parity.shared::cta.b64 %p, [$1], 0;"
    "@!%p bra again; ld.shared.b32 $0, [$1+32]; }"
)


@pytest.mark.parametrize("between", ["fence.proxy.async.shared::cta;", "bar.sync 0;"])
def test_a_copy_waits_for_those_who_use_its_place(between):
    """It must know that reads are over, and that stores are seen by the other proxy."""
    machine = Machine(64, 64, 64, delay=5)
    machine.start_barrier(machine.shared_base, 1)
    message = "nothing has told it" if between.startswith("fence") else "No fence.proxy.async"
    text, operands = COPY.replace("{between}", between), [machine.shared_base, machine.memory_base]
    with pytest.raises(PtxError, match=message):
        machine.run(text, "=&r,r,l", operands)


@pytest.mark.parametrize("order", [None, np.random.default_rng(0)], ids=["in step", "drawn"])
def test_two_warps_do_not_write_a_word(order):
    machine = Machine(64, 64, 16, order=order)
    text = "{ .reg .b32 %w; mov.u32 %w, %warpid; st.shared.b32 [$0], %w; }"
    with pytest.raises(PtxError):
        machine.run(text, "r", [machine.shared_base])


def test_the_clock_counts_instructions_in_32_bits():
    machine = Machine(32, 16, 16)
    machine.clock = (1 << 32) - 1
    first, last = machine.run("mov.u32 $0, %clock; mov.u32 $1, %clock;", "=r,=r", [])
    assert (first[0], last[0]) == (0xFFFFFFFF, 0)


def test_whoever_uses_a_copy_has_waited_for_it():
    machine = Machine(64, 64, 64, delay=5)
    machine.start_barrier(machine.shared_base, 1)
    machine.view(machine.memory_base, 64, np.uint8)[:] = 1
    text = COPY.replace("{between}", "fence.proxy.async.shared::cta; bar.sync 0;")
    machine.run(text, "=&r,r,l", [machine.shared_base, machine.memory_base])
    machine.pass_time(10)
    with pytest.raises(PtxError, match="nothing has told it"):
        machine.run("ld.shared.b32 $0, [$1+32];", "=r,r", [machine.shared_base])
    assert (machine.run(WAIT, "=&r,r", [machine.shared_base])[0] == 0x01010101).all()


def test_threads_of_a_warp_meet_again_at_a_collective_instruction():
    text = (
        "{ .reg .pred %p; .reg .b32 %t, %n; mov.u32 %t, %laneid; mov.u32 %n, 0;"
        "again: setp.ge.u32 %p, %n, %t; @%p bra done; add.u32 %n, %n, 1; bra.uni again;"
        "done: shfl.sync.idx.b32 $0, %n, 31, 31, 0xffffffff; }"
    )
    assert (lane_values(text, "=r")[0] == 31).all()


def test_programs_share_memory():
    first = Machine(32, 16, 256)
    second = Machine(32, 16, first.memory, blocks=(1, 2))
    machine_of = "{ .reg .b32 %c; mov.u32 %c, %ctaid.x; st.relaxed.gpu.global.b32 [$0], %c; }"
    at = first.memory_base + 4 * np.arange(32)
    first.later(50, lambda: second.run(machine_of, "l", [at]))
    text = (
        "{ .reg .pred %p; again: ld.relaxed.gpu.global.b32 $0, [$1];"
        "setp.ne.u32 %p, $0, 1; @%p bra again; }"
    )
    assert (first.run(text, "=&r,l", [at])[0] == 1).all()
    assert first.clock > 50


SOME = ".reg .pred %p; .reg .b32 %t; mov.u32 %t, %laneid; setp.lt.u32 %p, %t, 3;"
ERRORS = [
    # Text, constraints, what is said
    ("{ .reg .b32 %x; add.u32 $0, %x, 1; }", "=r", "Thread 0 reads %x, which it has not written"),
    ("{ .reg .b32 %x; mov.u32 %y, 1; }", "", "%y is declared nowhere"),
    ("{ .reg .b32 %x; { .reg .b32 %y; } mov.u32 %y, 1; }", "", "%y is declared nowhere"),
    (".reg .b32 %x;", "", "stands outside of"),
    ("{ .reg .pred %p; setp.eq.u32 %p, $1, 1; @%p mov.u32 $0, 1; }", "=r,r", "reads \\$0"),
    ("mov.u32 $0, 0; add.u32 $0, $1, 1;", "=r,r", "a result may have taken"),
    ("ld.shared.v2.b32 {$0, $1}, [$2+4];", "=&r,=&r,r", "is no multiple of 8"),
    ("ld.shared.b32 $0, [$1+64];", "=r,r", "not all in the shared memory"),
    ("mov.u32 $0, %laneid; st.shared.b32 [$1], $0;", "=&r,r", "Two threads store different"),
    ("add.u32 $0, %laneid, 1;", "=r", "read by mov alone"),
    ("add.u32 $0, $1, 1;", "=l,r", "of .b64 is set as .u32"),
    ("{ .reg .f32 %x; mov.f32 %x, 0f00000000; add.u32 $0, %x, 1; }", "=r", "read as .u32"),
    ("add.u33 $0, $1, 1;", "=r,r", "does not know `.u33`"),
    ("frob.u32 $0, $1;", "=r,r", "does not know `frob`"),
    ("{ again: bra again; }", "", "does not end within"),
    ("{ bra there; }", "", "no label there"),
    ("{ { there: } bra there; }", "", "no label there"),
    ("trap;", "", "come to a trap"),
    ("div.u32 $0, $1, 0;", "=r,r", "divided by 0"),
    ("mov.u32 $0, 1", "=r", "lacks its end"),
    ("max.NaN.u32 $0, $1, 1;", "=r,r", "none of .NaN.u32"),
    (
        "mma.sync.aligned.m16n8k32.row.col.s32.s4.s4.s32 {$0, $0, $0, $0}, {$1, $1, $1, $1}, "
        "{$1, $1}, {$1, $1, $1, $1};",
        "=&r,r",
        "does not know `.s4`",
    ),
    (
        "mma.sync.aligned.m16n8k32.row.col.f32.s8.s8.f32 {$0, $0, $0, $0}, {$1, $1, $1, $1}, "
        "{$1, $1}, {$1, $1, $1, $1};",
        "=&r,r",
        "no such matrix product",
    ),
    (
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$0, $0, $0, $0}, {$1, $1}, {$1, $1}, "
        "{$1, $1, $1, $1};",
        "=&r,r",
        "2 registers are given for 4",
    ),
    (
        f"{{ {SOME} @%p shfl.sync.idx.b32 $0, $1, 0, 31, -1; }}",
        "=r,r",
        "Not all threads of a warp",
    ),
    (
        f"{{ {SOME} @%p bra end; shfl.sync.idx.b32 $0, $1, 0, 31, -1; end: }}",
        "=r,r",
        "Nobody can go on: 29 threads",
    ),
    (f"{{ {SOME} @%p bra end; bar.sync 0; end: }}", "", "Nobody can go on"),
]


@pytest.mark.parametrize(("text", "constraints", "message"), ERRORS, ids=[x[2] for x in ERRORS])
def test_what_a_gpu_would_not_do_is_refused(text, constraints, message):
    machine = Machine(32, 64, 64)
    inputs = sum(not x.startswith("=") for x in constraints.split(",") if x)
    with pytest.raises(PtxError, match=message):
        machine.run(text, constraints, [machine.shared_base] * inputs, 2000)
