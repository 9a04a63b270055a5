"""What asking for a ring's next tile needs to know, and which tile is the next one."""

from __future__ import annotations

import dataclasses

__all__ = ["Feed", "next_row_lines"]


@dataclasses.dataclass(frozen=True)
class Feed:
    """What asking for the next tile needs to know besides the ring's address.

    Attributes:
        slots: of the ring.
        slot_bytes: bytes of a slot.
        route: where the route lies, bytes behind the ring's address.
        barriers: likewise the slots' barriers, 8 bytes each.
        control: likewise the feed's own 16 words: tiles asked for, row of the route, layer,
            slot and phase of the next, tiles used, and the address of a tensor map; from the 9th
            on, tiles asked for into the L2 cache, row and layer of the next, and what of it has
            been: 65536 for each copy, and bytes of the copy after those.
        layer_tiles: tiles of a layer.
        layers: how many.
        head_tiles: tiles of the head. All but the last one share a row of the route, behind those
            of a layer, as if they were a tile of so many more layers; then comes the last one's.
        total: tiles of the step.
        in_flight: tiles that are asked for and have not come, at most.
        thread: the thread that asks.
        copies: of a tile's weights, at most.
        has_scales: whether tiles may have scales, in one or two copies. Rows of the route are then
            16 words, the second 8 of scales, and 8 otherwise.
        l2_tiles: tiles beyond the ring's that are asked for into the L2 cache while the program
            waits.
        l2_bytes: of a copy, so many at a time, a multiple of 16.
        sharing: threads that copy 16 bytes of a tile each, again and again: the program's first
            warps, each of which has control words of its own, 16 behind those of the warp before.
            0: one thread asks for bulk copies. See `async_copy`.
        scale_unit: bytes of whose multiples copies of scales are, and begin at; where one thread
            asks for bulk copies, 16.
        matrix_rows: of a layer of the matrix whose tiles come as boxes; 0 where none does. The last
            of a tile's 8 words then says where its box begins: see `descriptors`.
    """

    slots: int
    slot_bytes: int
    route: int
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

    @property
    def bulk(self) -> bool:
        """Whether bulk copies bring the tiles."""
        return self.sharing == 0

    @property
    def row_bytes(self) -> int:
        """Of the route."""
        return 64 if self.has_scales else 32


def next_row_lines(f: Feed, row: str, layer: str, go: str) -> list[str]:
    """Goes on to the next tile's row of the route, and its layer, where a predicate holds.

    Args:
        f: the feed.
        row: register with the row of this tile.
        layer: register with its layer.
        go: the predicate.
    """
    tiles, layers, last = f.layer_tiles, f.layers, f.layers + f.head_tiles - 1
    return [
        "{ .reg .pred %ends, %is; .reg .b32 %to;",
        f"@{go} add.u32 {row}, {row}, 1; setp.gt.and.u32 %ends, {row}, {tiles}, {go};",
        f"@%ends add.u32 {layer}, {layer}, 1; setp.lt.u32 %is, {layer}, {layers};",
        f"selp.b32 %to, 1, {tiles + 1}, %is; setp.ge.u32 %is, {layer}, {last};",
        f"selp.b32 %to, {tiles + 2}, %to, %is; @%ends mov.b32 {row}, %to; }}",
    ]
