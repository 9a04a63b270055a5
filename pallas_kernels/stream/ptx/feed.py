"""The ring's feed: the text that asks for a program's next tile, here by bulk copies.

`async_feed` has the same for devices without them, `feed_state` what both keep from one tile to the
next, `ahead` what is asked for into the L2 cache. `arrival` waits for a tile.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import Array

from pallas_kernels.asm import LANE, TID, Block, Register
from pallas_kernels.inline_ptx import lowered
from pallas_kernels.inline_ptx.operation import Operation, Pointer
from pallas_kernels.stream.ptx.ahead import write_ahead
from pallas_kernels.stream.ptx.async_feed import write_async_feed
from pallas_kernels.stream.ptx.feed_state import (
    Feed,
    write_may_ask,
    write_next,
    write_next_row,
    write_next_slot,
)
from pallas_kernels.stream.ptx.one_thread import set_whether_another, set_whether_lead

__all__ = ["MAP_IN_CONTROL", "Feed", "feed_ring", "start_barriers", "write_feed"]

# Bytes from the feed's own words to the address of a tensor map.
MAP_IN_CONTROL = 24


def _write_barriers(b: Block, barriers: Register, *, count: int, sharing: int, alone: bool) -> None:
    thread, first = b.u32("thread"), b.pred("first")
    b.mov(thread, TID)
    b.setp("eq", first, thread, 0)
    with b.when(first):
        for i in range(count):
            b.mbarrier_init(barriers + 8 * i, sharing or 1)
    if sharing == 0:
        b.comment("Bulk copies come by the async proxy: a barrier of the program does not tell it.")
        b.fence_mbarrier_init()
        b.fence_proxy_async()


def _tell_ptxas(alone: bool, **_: Any) -> None:
    """What no text can say: the backend sees to it."""
    if alone:
        lowered.one_program_a_multiprocessor()


_start_barriers = Operation("ffjax_start_barriers", _write_barriers, _tell_ptxas)


def start_barriers(address: Array, count: int, sharing: int, alone: bool) -> None:
    """Makes barriers in shared memory, 8 bytes each, that a tile's arrival completes.

    Args:
        address: int32 scalar, a multiple of 8.
        count: how many.
        sharing: as of `Feed`.
        alone: whether ptxas is to know that a multiprocessor has no second program.
    """
    _start_barriers(address, count=count, sharing=sharing, alone=alone)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Registers that say what is asked for, if anything is.

    Attributes:
        source: address of the first copy's bytes, then of the next one's.
        place: where it comes to, in shared memory.
        size: bytes of a copy.
        copies: how many.
        apart: bytes between their places.
        step: from a source to the next, in units of 16 bytes.
        by: likewise bytes, 64 bits; of a thread that has one copy alone, from the first to its own.
        barrier: the slot's.
        policy: of the L2 cache.
        go: whether the tile is asked for.
        asks: whether this thread asks for it.
    """

    source: Register
    place: Register
    size: Register
    copies: Register
    apart: Register
    step: Register
    by: Register
    barrier: Register
    policy: Register
    go: Register
    asks: Register


def write_feed(
    b: Block,
    feed: Feed,
    ring: Register,
    pointer: Register,
    used: Register | None = None,
    ahead: Register | None = None,
    together: bool = False,
) -> None:
    """Asks for the next tile where a slot is free and few are on their way.

    One thread does, or its whole warp. It loads the next tile's copy descriptor before it knows
    whether the tile may be asked for: so the loads do not wait for the checks. Without bulk copies
    all warps that share the copies come here, each whole.

    Args:
        b: the text.
        feed: where everything lies.
        ring: the ring's address.
        pointer: the first array's.
        used: tiles that all threads have done with; None: as many as last time, since a program
            that waits for words uses no tile meanwhile.
        ahead: tiles beyond those that may have been asked for; None: as many as there are slots.
        together: whether the thread's whole warp is here, so that its threads share many copies.
            No thread of a warp leaves another then.
    """
    f = feed
    if not f.bulk:
        write_async_feed(b, f, ring, pointer, used, ahead)
        return
    shared = together and f.copies > 2
    thread, lead, other, fed = b.u32("thread"), b.pred("lead"), b.pred("other"), b.label("fed")
    b.comment("One thread asks, or with its warp.")
    b.mov(thread, TID)
    if together:
        warp = b.u32("warp")
        b.shr(warp, thread, 5)
        b.setp("ne", other, warp, f.thread // 32)
    else:
        set_whether_another(b, other, thread, f.thread, f.by_lane)
    b.bra_if(other, fed)
    set_whether_lead(b, lead, thread, f.thread, f.by_lane)

    b.comment("Where the feed has got to, and the next tile's copy descriptor.")
    words = write_next(b, f, ring)
    row, low, high, stride, step = b.u32s("row", "low", "high", "stride", "step")
    b.mad_lo(row, words.row, f.row_bytes, ring)
    b.ld_shared([low, high, stride, step], row + f.descriptors)
    scales = b.u32s(*(f"scale_{name}" for name in _SCALES))
    layer, slot, box_map = b.u32("layer"), b.u32("slot_place"), b.u64("map")
    if f.has_scales:
        b.ld_shared(scales[:4], row + (f.descriptors + 32))
        b.ld_shared(scales[4:], row + (f.descriptors + 48))
        b.mov(layer, words.layer)
    if f.matrix_rows:
        b.ld_shared(box_map, ring + (f.control + MAP_IN_CONTROL))
    size, copies, apart, box = b.u32s("size", "copies", "apart", "box")
    b.ld_shared([size, copies, apart, box], row + (f.descriptors + 16))

    b.comment("May it be asked for?")
    if used is not None:
        b.mov(words.limit, used)
    b.add(words.limit, words.limit, f.slots if ahead is None else ahead)
    b.min(words.limit, words.limit, f.total)
    if f.l2_tiles and used is None:
        has_room, room = b.pred("has_room"), b.label("room")
        b.setp("lt", has_room, words.asked, words.limit)
        b.bra_if(has_room, room)
        write_ahead(b, f, words, ring, ring, pointer, fed)
        b.mark(room)
    go, asks = b.pred("go"), b.pred("asks")
    write_may_ask(b, f, words, ring, go)
    if together:
        b.comment("Each thread has asked by itself: they must not disagree.")
        b.vote_all(go, go)

    b.comment("Where it comes from, and goes to.")
    source, along, by, policy = b.u64("source"), b.u64("along"), b.u64("by"), b.u64("policy")
    barrier, place, total = b.u32s("barrier", "place", "bytes")
    b.pack(source, low, high)
    b.mul_wide(along, words.layer, stride)
    b.add(source, source, along)
    b.shl(source, source, 4)
    b.add(source, source, pointer)
    b.mul_wide(by, step, 16)
    b.mad_lo(barrier, words.slot, 8, ring)
    b.add(barrier, barrier, f.barriers)
    b.mad_lo(place, words.slot, f.slot_bytes, ring)
    b.mul_lo(total, size, copies)
    b.createpolicy_evict_first(policy)
    if f.has_scales:
        b.mad_lo(total, scales[4], scales[5], total)
        b.mov(slot, place)

    b.comment("Its barrier learns how many bytes to wait for; then the copies.")
    b.and_(asks, go, lead)
    with b.when(asks):
        b.mbarrier_expect(barrier, total)
    tile = _Tile(source, place, size, copies, apart, step, by, barrier, policy, go, asks)
    if f.matrix_rows:
        _write_box(b, f, tile, words.layer, box, box_map)
    _write_copies(b, tile, f.copies, shared)
    if f.has_scales:
        _write_scales(b, tile, scales, layer, slot, pointer, shared)

    b.comment("What is next.")
    with b.when(go):
        b.add(words.asked, words.asked, 1)
        b.add(words.slot, words.slot, 1)
    write_next_row(b, f, words.row, words.layer, go)
    write_next_slot(b, f, words)
    with b.when(lead):
        b.st_shared(ring + f.control, [words.asked, words.row, words.layer, words.slot])
        phase = words.phase if used is None else [words.phase, used]
        b.st_shared(ring + (f.control + 16), phase)
    b.mark(fed)


# The second 8 words of a copy descriptor.
_SCALES = ("low", "high", "stride", "step", "size", "copies", "first", "apart")


def _write_box(
    b: Block, f: Feed, tile: _Tile, layer: Register, box: Register, box_map: Register
) -> None:
    """If the tile is a box, copies it; then there are no other copies of weights."""
    element, piece, row, is_box = *b.u32s("element", "piece", "box_row"), b.pred("is_box")
    b.comment("A box: its lowest 16 bits are its first row, 15 more its piece, and the last is 1.")
    b.mov(element, 0)
    b.shr(piece, box, 16)
    b.and_(piece, piece, 32767)
    b.and_(row, box, 65535)
    b.mad_lo(row, layer, f.matrix_rows, row)
    b.setp("lt", is_box, box.as_("s32"), 0, also=tile.asks)
    with b.when(is_box):
        b.cp_bulk_box(tile.place, box_map, [element, piece, row], tile.barrier, tile.policy)
        b.mov(tile.copies, 0)


def _write_copies(b: Block, tile: _Tile, most: int, shared: bool) -> None:
    """Copies a tile's weights. Shared, each copy falls to a thread of the warp; else all to one.

    Weights are read once a step: they are the first to leave the L2 cache.
    """
    t = tile

    def copy() -> None:
        b.cp_bulk(t.place, t.source, t.size, t.barrier, t.policy)

    def next_copy() -> None:
        b.add(t.source, t.source, t.by)
        b.add(t.place, t.place, t.apart)

    if shared:
        b.comment("Lane i has the i-th copy.")
        lane, own, units = b.u32("lane"), b.pred("own_copy"), b.u32("units")
        b.mov(lane, LANE)
        b.setp("lt", own, lane, t.copies, also=t.go)
        b.mad_lo(t.place, lane, t.apart, t.place)
        b.mul_lo(units, t.step, lane)
        b.mul_wide(t.by, units, 16)
        b.add(t.source, t.source, t.by)
        b.bar_warp()
        with b.when(own):
            copy()
        return
    if most > 2:
        is_last, copied = b.pred("is_last"), b.label("copied")
        with b.unless(t.asks):
            b.mov(t.copies, 0)
        again = b.marked("copy")
        b.setp("eq", is_last, t.copies, 0)
        b.bra_if(is_last, copied)
        copy()
        next_copy()
        b.sub(t.copies, t.copies, 1)
        b.bra(again)
        b.mark(copied)
        return
    _write_two(b, t.asks, t.copies, copy, next_copy)


def _write_two(b: Block, asks: Register, copies: Register, copy: Any, next_copy: Any) -> None:
    """None, one or two copies, with no branch."""
    for i in range(2):
        is_there = b.pred("is_there")
        if i:
            next_copy()
        b.setp("gt", is_there, copies, i, also=asks)
        with b.when(is_there):
            copy()


def _write_scales(
    b: Block,
    tile: _Tile,
    words: list[Register],
    layer: Register,
    slot: Register,
    pointer: Register,
    shared: bool,
) -> None:
    """Copies the scales of the tile to its slot.

    Shared, each copy falls to one of the threads of the warp that no copy of weights falls to; else
    all to the leading thread.

    Args:
        b: the text.
        tile: its weights.
        words: its copy descriptor's, of its scales: see `_SCALES`.
        layer: the tile's.
        slot: where its slot begins.
        pointer: the first array's address.
        shared: see above.
    """
    low, high, stride, step, given_size, given_copies, first, apart = words
    source, along, by = b.u64("scale_source"), b.u64("scale_along"), b.u64("scale_by")
    place, size, copies = b.u32s("scale_place", "scale_bytes", "scale_count")
    b.pack(source, low, high)
    b.mul_wide(along, layer, stride)
    b.add(source, source, along)
    b.shl(source, source, 4)
    b.add(source, source, pointer)
    b.add(place, slot, first)
    b.mov(size, given_size)
    b.mov(copies, given_copies)

    def copy() -> None:
        b.cp_bulk(place, source, size, tile.barrier)

    def next_copy() -> None:
        b.add(source, source, by)
        b.add(place, place, apart)

    if shared:
        b.comment("Lane 31 - i has the i-th copy.")
        lane, own, units = b.s32("lane"), b.pred("own_scales"), b.u32("units")
        b.mov(lane, LANE)
        b.sub(lane, 31, lane)
        b.setp("lt", own, lane.as_("u32"), copies, also=tile.go)
        b.mad_lo(place, lane, apart, place)
        b.mul_lo(units, step, lane)
        b.mul_wide(by, units, 16)
        b.add(source, source, by)
        with b.when(own):
            copy()
        return
    b.mul_wide(by, step, 16)
    _write_two(b, tile.asks, copies, copy, next_copy)


def _write_ring(
    b: Block,
    weights: Register,
    ring: Register,
    used: Register,
    ahead: Register,
    *,
    feed: Feed,
    store: bool,
) -> None:
    # Only after a tile is the whole warp known to be together. Where tiles come as boxes, copies
    # are few, and take fewer instructions of one thread.
    together = store and not feed.matrix_rows and feed.bulk
    given = (used, ahead) if store else (None, None)
    write_feed(b, feed, ring, weights, *given, together=together)
    b.warps_jump_whole = together


_feed = Operation("ffjax_feed", _write_ring)


def feed_ring(
    ref: Any, ring: Array, feed: Feed, used: Array | None = None, ahead: Array | None = None
) -> None:
    """Asks for the next tile if a slot is free and few tiles are on their way.

    It comes to shared memory while the program goes on.

    Args:
        ref: the first of the arrays that `begin_words` was given.
        ring: int32 scalar, the ring's address.
        feed: the rest.
        used: int32 scalar, tiles that all threads have done with; None: as many as last time.
        ahead: int32 scalar, tiles beyond `used` that may have been asked for; None: as many as
            there are slots. Without `used` it is of no matter.
    """
    numbers = [0 if used is None else used, feed.slots if ahead is None else ahead]
    store = used is not None
    _feed(Pointer(ref), ring, *numbers, feed=feed, store=store)
