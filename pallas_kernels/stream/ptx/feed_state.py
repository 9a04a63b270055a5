"""What asking for a ring's next tile needs to know, and which tile is the next one."""

from __future__ import annotations

import dataclasses

from pallas_kernels.asm import Block, Register

__all__ = ["Feed", "Next", "write_may_ask", "write_next", "write_next_row", "write_next_slot"]


@dataclasses.dataclass(frozen=True)
class Feed:
    """What asking for the next tile needs to know besides the ring's address.

    Attributes:
        slots: of the ring.
        slot_bytes: bytes of a slot.
        descriptors: where the copy descriptors lie, bytes after the ring's address.
        barriers: likewise the slots' barriers, 8 bytes each.
        control: likewise the feed's own 16 words. Words 0 to 5: tiles asked for; copy descriptor,
            layer, slot and phase of the next one; tiles used. 6 and 7: the address of a tensor map.
            8 to 11, for the L2 cache: tiles asked for; copy descriptor and layer of the next one;
            what of that one was asked for, 65536 for each whole copy, and bytes of the copy after
            those. 12 to 14, for waits that run out: the record's address and the program's number,
            see `giving_up`.
        layer_tiles: tiles of a layer.
        layers: how many.
        head_tiles: tiles of the head. All but the last one share a copy descriptor, after those
            of a layer, as if they were a tile of so many more layers; then comes the last one's.
        total: tiles of the step.
        in_flight: tiles that are asked for and have not come, at most.
        thread: the thread that asks.
        copies: of a tile's weights, at most.
        has_scales: whether tiles may have scales, in one or two copies. Copy descriptors are then
            16 words, the second 8 of scales, and 8 otherwise.
        l2_tiles: tiles beyond the ring's that are asked for into the L2 cache while the program
            waits.
        l2_bytes: of a copy, so many at a time, a multiple of 16.
        sharing: threads that copy 16 bytes of a tile each, again and again: the program's first
            warps, each of which has control words of its own, 16 after those of the warp before.
            0: one thread asks for bulk copies. See `async_copy`.
        scale_unit: bytes of whose multiples copies of scales are, and begin at; where one thread
            asks for bulk copies, 16.
        matrix_rows: of a layer of the matrix whose tiles come as boxes; 0 where none does. The last
            of a tile's 8 words then says where its box begins: see `descriptors`.
        by_lane: whether lanes tell ptxas which thread asks: see `one_thread`.
    """

    slots: int
    slot_bytes: int
    descriptors: int
    barriers: int
    control: int
    layer_tiles: int
    layers: int
    head_tiles: int
    total: int
    in_flight: int
    thread: int
    copies: int
    has_scales: bool
    l2_tiles: int
    l2_bytes: int
    sharing: int
    scale_unit: int
    matrix_rows: int
    by_lane: bool = False

    @property
    def bulk(self) -> bool:
        """Whether bulk copies bring the tiles."""
        return self.sharing == 0

    @property
    def row_bytes(self) -> int:
        """Of a copy descriptor."""
        return 64 if self.has_scales else 32


@dataclasses.dataclass(frozen=True)
class Next:
    """Registers that hold a feed's control words while a text asks for tiles.

    Attributes:
        asked: tiles asked for so far: the next one's number.
        row: the next one's copy descriptor, by its row in the table. Row 0 is the embedding's,
            which is empty; a layer's first tile has row 1.
        layer: its layer.
        slot: its slot.
        phase: what its slot's barrier counts round by: 0 in the first round, then 1, 0 and so on.
        limit: tiles that the program has used; then tiles that may have been asked for.
    """

    asked: Register
    row: Register
    layer: Register
    slot: Register
    phase: Register
    limit: Register


def write_next(b: Block, f: Feed, place: Register) -> Next:
    """Loads the control words.

    Args:
        b: the text.
        f: the feed.
        place: the ring's address, and bytes to the asking warp's words.
    """
    names = ("asked", "row", "layer", "slot", "phase", "limit")
    words = Next(*b.u32s(*(f"next_{name}" if name in ("row", "layer") else name for name in names)))
    b.ld_shared([words.asked, words.row, words.layer, words.slot], place + f.control)
    b.ld_shared([words.phase, words.limit], place + (f.control + 16))
    return words


def write_next_row(b: Block, f: Feed, row: Register, layer: Register, go: Register) -> None:
    """Goes on to the next tile's copy descriptor, and its layer, where a predicate holds.

    Args:
        b: the text.
        f: the feed.
        row: register with the row of this tile.
        layer: register with its layer.
        go: the predicate.
    """
    tiles, last = f.layer_tiles, f.layers + f.head_tiles - 1
    ends, is_layer, is_last = b.pred("ends"), b.pred("is_layer"), b.pred("is_last")
    to = b.u32("first_row")
    with b.when(go):
        b.add(row, row, 1)
    b.comment("After a layer's last row comes its first again, then the head's two: see `Feed`.")
    b.setp("gt", ends, row, tiles, also=go)
    with b.when(ends):
        b.add(layer, layer, 1)
    b.setp("lt", is_layer, layer, f.layers)
    b.selp(to, 1, tiles + 1, is_layer)
    b.setp("ge", is_last, layer, last)
    b.selp(to, tiles + 2, to, is_last)
    with b.when(ends):
        b.mov(row, to)


def write_next_slot(b: Block, f: Feed, words: Next) -> None:
    """Begins again with the first slot after the last one, in another round."""
    around = b.pred("around")
    b.setp("eq", around, words.slot, f.slots)
    with b.when(around):
        b.mov(words.slot, 0)
        b.xor(words.phase, words.phase, 1)


def write_may_ask(b: Block, f: Feed, words: Next, ring: Register, go: Register) -> None:
    """Whether a slot is free for the next tile, and the tile has come that lets it be asked for.

    Args:
        b: the text.
        f: the feed.
        words: where the feed has got to.
        ring: the ring's address.
        go: the predicate.
    """
    before, wraps, parity = b.s32("before"), b.pred("wraps"), b.u32("parity")
    barrier, has_come = b.u32("earlier_barrier"), b.pred("earlier_has_come")
    b.setp("lt", go, words.asked, words.limit)
    b.comment("Has the tile come that was asked for some before?")
    b.comment("In the first round they all have: it is the phase before a barrier's first.")
    b.sub(before, words.slot, f.in_flight)
    b.setp("lt", wraps, before, 0)
    b.selp(parity, 1, 0, wraps)
    with b.when(wraps):
        b.add(before, before, f.slots)
    b.xor(parity, parity, words.phase)
    b.mad_lo(barrier, before, 8, ring)
    b.mbarrier_test(has_come, barrier + f.barriers, parity)
    b.and_(go, go, has_come)
