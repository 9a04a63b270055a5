"""Tiles beyond a full ring, asked for into the L2 cache."""

from __future__ import annotations

from pallas_kernels.asm import Block, Label, Register
from pallas_kernels.stream.ptx import async_copy
from pallas_kernels.stream.ptx.feed_state import Feed, Next, write_next_row

__all__ = ["write_ahead"]


def write_ahead(
    b: Block,
    f: Feed,
    words: Next,
    ring: Register,
    own: Register,
    pointer: Register,
    fed: Label,
    lead: Register | None = None,
) -> None:
    """Asks for what comes next beyond a full ring into the L2 cache, up to `Feed.l2_tiles` tiles.

    Each time some bytes of one copy, `Feed.l2_bytes`: words that the program looks for next queue
    after them.

    Args:
        b: the text.
        f: the feed.
        words: where the ring has got to.
        ring: the ring's address.
        own: the same, and bytes to the asking warp's control words.
        pointer: the first array's address.
        fed: where to go on.
        lead: where a whole warp asks, its first thread.
    """
    control = own + (f.control + 32)
    asked, row, layer, been = b.u32s("ahead", "ahead_row", "ahead_layer", "been")
    b.ld_shared([asked, row, layer, been], control)
    b.comment("Tiles that have been asked for in earnest meanwhile are past.")
    is_past, limit, enough = b.pred("is_past"), b.u32("ahead_limit"), b.pred("enough")
    b.setp("lt", is_past, asked, words.asked)
    with b.when(is_past):
        b.mov(asked, words.asked)
        b.mov(row, words.row)
        b.mov(layer, words.layer)
        b.mov(been, 0)
    b.add(limit, words.asked, f.l2_tiles)
    b.min(limit, limit, f.total)
    b.setp("ge", enough, asked, limit)
    b.bra_if(enough, fed)

    b.comment("Where the tile's copies begin: two words of its distance, in units of 16 bytes.")
    place, low, high, stride, step = b.u32s("descriptor", "low", "high", "stride", "step")
    source, along = b.u64("source"), b.u64("along")
    b.mad_lo(place, row, f.row_bytes, ring)
    b.ld_shared([low, high, stride, step], place + f.descriptors)
    b.pack(source, low, high)
    b.mul_wide(along, layer, stride)
    b.add(source, source, along)
    b.shl(source, source, 4)
    b.add(source, source, pointer)

    b.comment("Some copies are past, and some bytes of the next one.")
    size, copies, past, begun, left = b.u32s("size", "copies", "past", "begun", "left")
    asks = b.pred("asks")
    b.ld_shared([size, copies], place + (f.descriptors + 16))
    b.shr(past, been, 16)
    b.and_(begun, been, 65535)
    b.shl(step, step, 4)
    b.mul_wide(along, step, past)
    b.add(source, source, along)
    b.widen(along, begun)
    b.add(source, source, along)
    b.sub(left, size, begun)
    b.min(left, left, f.l2_bytes)
    b.setp("lt", asks, past, copies)
    if f.bulk:
        with b.when(asks):
            b.prefetch_bulk(source, left)
    else:
        async_copy.write_prefetch(b, source, left, f.l2_bytes, asks)

    b.comment("After a copy's last bytes comes the next copy, after the last one the next tile.")
    is_whole, done = b.pred("is_whole"), b.pred("done")
    b.add(begun, begun, f.l2_bytes)
    b.setp("ge", is_whole, begun, size)
    with b.when(is_whole):
        b.mov(begun, 0)
        b.add(past, past, 1)
    b.setp("ge", done, past, copies)
    b.shl(past, past, 16)
    b.or_(begun, begun, past)
    with b.when(done):
        b.mov(begun, 0)
        b.add(asked, asked, 1)
    write_next_row(b, f, row, layer, done)
    if lead is not None:
        b.comment("All of the warp has read these words before one thread stores them anew.")
        b.bar_warp()
    with b.when(lead):
        b.st_shared(control, [asked, row, layer, begun])
    if lead is not None:
        b.bar_warp()
    b.bra(fed)
