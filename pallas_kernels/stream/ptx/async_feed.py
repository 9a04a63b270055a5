"""Feeding the ring by copies of 16 bytes a thread: each warp asks for its own share of a tile."""

from __future__ import annotations

from pallas_kernels.asm import LANE, TID, Block, Register
from pallas_kernels.stream.ptx import async_copy
from pallas_kernels.stream.ptx.ahead import write_ahead
from pallas_kernels.stream.ptx.feed_state import (
    Feed,
    write_may_ask,
    write_next,
    write_next_row,
    write_next_slot,
)

__all__ = ["write_async_feed"]

# Bytes from a warp's control words to those of the next one.
_CONTROL = 64


def write_async_feed(
    b: Block,
    f: Feed,
    ring: Register,
    pointer: Register,
    used: Register | None,
    ahead: Register | None,
) -> None:
    """Asks for the next tile where a slot is free and few are on their way; see `write_feed`.

    What is next is put down before anything is copied: little else need be kept meanwhile, and
    where this stands other words fill the registers.
    """
    lane, warp, own, lead = b.u32("lane"), b.u32("warp"), b.u32("own"), b.pred("lead")
    fed, kept, idle = b.label("fed"), b.label("kept"), b.pred("idle")
    last = f.sharing // async_copy.WARP - 1
    b.comment("Each warp that copies has control words of its own, which its first thread stores.")
    b.mov(lane, LANE)
    b.setp("eq", lead, lane, 0)
    b.mov(warp, TID)
    b.shr(warp, warp, 5)
    b.setp("gt", idle, warp, last)
    b.bra_if(idle, fed)
    b.mad_lo(own, warp, _CONTROL, ring)
    words = write_next(b, f, own)
    if used is not None:
        b.mov(words.limit, used)
    b.add(words.limit, words.limit, f.slots if ahead is None else ahead)
    b.min(words.limit, words.limit, f.total)
    if f.l2_tiles and used is None:
        b.comment("If the ring is full, the last warp asks for what comes next into the L2 cache.")
        has_room, room = b.pred("has_room"), b.label("room")
        b.setp("lt", has_room, words.asked, words.limit)
        b.setp("ne", has_room, warp, last, either=has_room)
        b.bra_if(has_room, room)
        write_ahead(b, f, words, ring, own, pointer, fed, lead)
        b.mark(room)

    more, go = b.marked("more"), b.pred("go")
    write_may_ask(b, f, words, ring, go)
    b.vote_all(go, go)
    b.bra_unless(go, kept)

    b.comment("The tile's copy descriptor, layer, barrier and slot; then what is next.")
    row, layer, barrier, slot = b.u32s("row", "layer", "barrier", "slot_place")
    b.mad_lo(row, words.row, f.row_bytes, ring)
    b.mov(layer, words.layer)
    b.mad_lo(barrier, words.slot, 8, ring)
    b.add(barrier, barrier, f.barriers)
    b.mad_lo(slot, words.slot, f.slot_bytes, ring)
    b.add(words.asked, words.asked, 1)
    b.add(words.slot, words.slot, 1)
    write_next_row(b, f, words.row, words.layer, go)
    write_next_slot(b, f, words)
    with b.when(lead):
        b.st_shared(own + f.control, [words.asked, words.row, words.layer, words.slot])
        b.st_shared(own + (f.control + 16), words.phase)

    _write_share(b, f, row, layer, slot, pointer, scales=False)
    if f.has_scales:
        _write_share(b, f, row, layer, slot, pointer, scales=True)
    b.cp_async_arrive(barrier)
    if used is not None:
        b.comment("A warp that has waited for less than others lags behind.")
        lags = b.pred("lags")
        b.setp("lt", lags, words.asked, words.limit)
        b.bra_if(lags, more)
    b.mark(kept)
    if used is not None:
        with b.when(lead):
            b.st_shared(own + (f.control + 20), used)
    b.comment("What one thread has put down all of its warp read next time.")
    b.bar_warp()
    b.mark(fed)


def _write_share(
    b: Block,
    f: Feed,
    row: Register,
    layer: Register,
    slot: Register,
    pointer: Register,
    *,
    scales: bool,
) -> None:
    """Copies a thread's share of a tile's weights, or of its scales, to the tile's slot.

    Args:
        b: the text.
        f: the feed.
        row: the tile's copy descriptor.
        layer: its layer.
        slot: where its slot begins.
        pointer: the first array's address.
        scales: whether its scales are copied, which the second 8 words are about.
    """
    unit, words = (f.scale_unit, f.descriptors + 32) if scales else (16, f.descriptors)
    low, high, stride, step = b.u32s("low", "high", "stride", "step")
    size, count, apart, place = b.u32s("size", "count", "apart", "place")
    source, by, policy = b.u64("source"), b.u64("by"), b.u64("policy")
    b.createpolicy_evict_first(policy)
    b.ld_shared([low, high, stride, step], row + words)
    # Size, number and pitch of the copies stand at other places of the scales' words.
    last = [size, count, place, apart] if scales else [size, count, apart, place]
    b.ld_shared(last, row + (words + 16))
    b.pack(source, low, high)
    b.mul_wide(by, layer, stride)
    b.add(source, source, by)
    b.shl(source, source, unit.bit_length() - 1)
    b.add(source, source, pointer)
    b.mul_wide(by, step, unit)
    b.add(place, slot, place if scales else 0)
    parts = async_copy.Parts(source, place, size, policy, count, by, apart)
    async_copy.write_copies(b, parts, f.sharing, unit)
