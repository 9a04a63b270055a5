"""Keys and values on their way to shared memory."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import Array

from pallas_kernels.asm import TID, Block, Register
from pallas_kernels.inline_ptx.operation import Operation, Pointer
from pallas_kernels.stream.plan import BOX_UNIT, LOT
from pallas_kernels.stream.ptx import async_copy
from pallas_kernels.stream.ptx.address import UNIT
from pallas_kernels.stream.ptx.boxes import TensorMap
from pallas_kernels.stream.ptx.one_thread import set_whether_another
from pallas_kernels.stream.ptx.swizzle import Lines

__all__ = ["CacheFeed", "feed_cache", "write_cache_feed"]

# Bytes of a warp's control words.
_CONTROL = 32


@dataclasses.dataclass(frozen=True)
class CacheFeed:
    """Where a program's tiles of keys and values lie, and what is made of them.

    A tile holds the keys of `block` positions, and after them the values, as `Lines` says. Its
    *part* is a row of 8 words in shared memory: where the part begins in a layer, in units of 16
    bytes; how many cached positions it has; its tiles; how many new positions it has besides; a
    word of no interest here; its first query, and in the upper half how much longer the first
    window lasts; the rest is of no interest. Before the first part's row stands one whose first
    word is the number of parts.

    Attributes:
        head_dim: H.
        block: positions of a tile.
        warps: that attend; those with the same queries have `block / warps` positions each.
        stages: tiles that shared memory holds.
        layer_rows: keys of a layer of the cache, of all sequences and heads.
        query_pitch: from a query to the next, bytes.
        out_pitch: from a row of `out` to the next, bytes.
        abreast: how many times 8 queries a part has, each for other warps.
        tokens: T, new positions of the part that has them.
        q_per_kv: G, queries of each.
        windowed: whether each of several tokens has a window of its own.
        paired: whether queries are 4 at most, and their 4 rows are there twice.
        softcap: c, which makes scores c * tanh(score / c), or None. Queries come scaled for it.
        tiles: where the tiles lie, bytes after the ring's address.
        barriers: likewise their barriers, 8 bytes each.
        maps: likewise the addresses of the tensor maps of keys and of values, 8 bytes each: where
            bulk copies bring them.
        control: likewise 8 words: free tiles, the next one's part, number in the part, layer and
            stage; from the 7th on, stage and phase of the next one to be used.
        queries: likewise 16 rows for 8 queries: what is left of their bfloat16, after them.
        new: likewise the new positions' keys, and their values.
        out: likewise what each warp makes of its positions: `rows`.
        sums: likewise the maximum and the sum of the weights of each of those rows.
        thread: the thread that asks.
        sharing: as of `Feed`: each warp has 8 control words of its own, but for the last two.
        by_lane: as of `Feed`.
    """

    head_dim: int
    block: int
    warps: int
    stages: int
    layer_rows: int
    query_pitch: int
    out_pitch: int
    abreast: int
    tokens: int
    q_per_kv: int
    windowed: bool
    paired: bool
    softcap: float | None
    tiles: int
    barriers: int
    maps: int
    control: int
    queries: int
    new: int
    out: int
    sums: int
    thread: int
    sharing: int
    by_lane: bool = False

    @property
    def bulk(self) -> bool:
        """Whether bulk copies bring the tiles."""
        return self.sharing == 0

    @property
    def rows(self) -> int:
        """Queries that a warp attends for."""
        return LOT // 2 if self.paired else LOT

    @property
    def row_bytes(self) -> int:
        """Of a key or a value."""
        return 2 * self.head_dim

    @property
    def lines(self) -> Lines:
        """Where the rows of a tile's keys lie, or of its values."""
        return Lines(self.row_bytes, self.block, self.tiles)

    @property
    def values(self) -> int:
        """Where a tile's values begin, bytes."""
        return self.block * self.row_bytes

    @property
    def tile_bytes(self) -> int:
        """Of a tile."""
        return 2 * self.values

    def tensor_map(self, layers: int) -> TensorMap:
        """What copies know of the keys of all layers, or of the values: rows, cut into lines."""
        lines = self.lines
        return TensorMap(
            pieces=lines.count,
            rows=layers * self.layer_rows,
            box=(lines.width // BOX_UNIT, 1, self.block),
            thread=self.thread,
            swizzle=lines.mode,
        )


def write_cache_feed(
    b: Block,
    f: CacheFeed,
    ring: Register,
    keys: Register,
    values: Register,
    parts: Register,
    layer: Register,
    freed: int,
) -> None:
    """Asks for tiles of a layer while there are free ones.

    Args:
        b: the text.
        f: where everything lies.
        ring: the ring's address.
        keys: address of the cache's keys.
        values: address of its values.
        parts: address of the rows of the layer's parts.
        layer: the last one that may be asked for.
        freed: tiles that have been used since last time.
    """
    thread, policy, asked = b.u32("thread"), b.u64("policy"), b.label("asked")
    b.comment("Like weights, keys and values are read once a step: they are the first to leave the")
    b.comment("L2 cache, where weights may wait that have been asked for ahead.")
    b.createpolicy_evict_first(policy)
    b.mov(thread, TID)
    own, lead, idle = ring, None, b.pred("idle")
    if f.bulk:
        set_whether_another(b, idle, thread, f.thread, f.by_lane)
        b.bra_if(idle, asked)
    else:
        b.comment("Each warp that copies has control words of its own.")
        lead, lane, warp, own = b.pred("lead"), b.u32("lane"), b.u32("warp"), b.u32("own")
        b.and_(lane, thread, 31)
        b.setp("eq", lead, lane, 0)
        b.setp("ge", idle, thread, f.sharing)
        b.bra_if(idle, asked)
        b.shr(warp, thread, 5)
        b.mad_lo(own, warp, _CONTROL, ring)

    free, part, tile, at_layer, stage, count = b.u32s(
        *("free", "part", "tile", "next_layer", "stage", "part_count")
    )
    b.ld_shared([free, part, tile, at_layer], own + f.control)
    b.ld_shared(stage, own + (f.control + 16))
    b.ld_shared(count, parts + 0)
    b.add(free, free, freed)
    b.comment("Of layers between, the program has no part.")
    is_new = b.pred("is_new")
    b.setp("lt", is_new, at_layer, layer)
    b.selp(part, 0, part, is_new)
    b.selp(tile, 0, tile, is_new)
    b.max(at_layer, at_layer, layer)

    more, stored, stop = b.marked("more"), b.label("stored"), b.pred("stop")
    b.setp("eq", stop, free, 0)
    b.setp("gt", stop, at_layer, layer, either=stop)
    b.setp("ge", stop, part, count, either=stop)
    b.bra_if(stop, stored)

    b.comment("The tile's cached positions, none of the first tile at least, and its first row.")
    place, begin, cached, tiles, unused = b.u32s("place", "begin", "cached", "tiles", "unused")
    first, positions, barrier = b.u32("first"), b.s32("positions"), b.u32("barrier")
    b.mad_lo(place, part, 32, parts)
    b.ld_shared([begin, cached, tiles, unused], place + 32)
    b.mul_lo(first, tile, f.block)
    b.sub(positions, cached, first)
    b.min(positions, positions, f.block)
    b.max(positions, positions, 0)
    b.shr(begin, begin, (f.row_bytes // UNIT).bit_length() - 1)
    b.add(begin, begin, first)
    b.mad_lo(begin, at_layer, f.layer_rows, begin)
    b.mad_lo(barrier, stage, 8, ring)
    b.add(barrier, barrier, f.barriers)
    _write_tile(b, f, ring, keys, values, policy, begin, positions, stage, barrier)

    b.comment("The next tile: of the part, of the next part, or of the next layer.")
    ends, last, around = b.pred("ends"), b.pred("last"), b.pred("around")
    b.add(tile, tile, 1)
    b.setp("eq", ends, tile, tiles)
    b.selp(tile, 0, tile, ends)
    with b.when(ends):
        b.add(part, part, 1)
    b.setp("eq", last, part, count)
    b.selp(part, 0, part, last)
    with b.when(last):
        b.add(at_layer, at_layer, 1)
    b.add(stage, stage, 1)
    b.setp("eq", around, stage, f.stages)
    b.selp(stage, 0, stage, around)
    b.sub(free, free, 1)
    b.bra(more)

    b.mark(stored)
    if lead is not None:
        b.comment("All of a warp has read these words before a thread stores them anew.")
        b.bar_warp()
    with b.when(lead):
        b.st_shared(own + f.control, [free, part, tile, at_layer])
        b.st_shared(own + (f.control + 16), stage)
    if lead is not None:
        b.bar_warp()
    b.mark(asked)


def _write_tile(
    b: Block,
    f: CacheFeed,
    ring: Register,
    keys: Register,
    values: Register,
    policy: Register,
    begin: Register,
    positions: Register,
    stage: Register,
    barrier: Register,
) -> None:
    """Copies some keys, and as many values, from a row on, to a stage's tile."""
    to = b.u32("to")
    b.mad_lo(to, stage, f.tile_bytes, ring)
    b.add(to, to, f.tiles)
    if f.bulk:
        _write_boxes(b, f, ring, policy, begin, positions, to, barrier)
        return
    offset, source, size = b.u64("offset"), b.u64("source"), b.u32("size")
    b.mul_wide(offset, begin, f.row_bytes)
    b.mul_lo(size, positions, f.row_bytes)
    for array, behind in ((keys, 0), (values, f.values)):
        b.add(source, offset, array)
        b.add(to, to, behind)
        parts = async_copy.Parts(source, to, size, policy)
        async_copy.write_copies(b, parts, f.sharing, lines=f.lines)
    b.cp_async_arrive(barrier)


def _write_boxes(
    b: Block,
    f: CacheFeed,
    ring: Register,
    policy: Register,
    begin: Register,
    positions: Register,
    to: Register,
    barrier: Register,
) -> None:
    """The same by boxes, of whole tiles: what lies after a sequence's positions is not used."""
    lines, maps = f.lines, (b.u64("key_map"), b.u64("value_map"))
    some, size, element, line = b.pred("some"), b.u32("bytes"), b.u32("element"), b.u32("line")
    b.setp("gt", some, positions.as_("u32"), 0)
    b.selp(size, f.tile_bytes, 0, some)
    b.mbarrier_expect(barrier, size)
    b.mov(element, 0)
    b.ld_shared(maps, ring + f.maps)
    for box in maps:
        for number in range(lines.count):
            b.mov(line, number)
            with b.when(some):
                b.cp_bulk_box(to, box, [element, line, begin], barrier, policy)
            b.add(to, to, f.block * lines.width)


def _write_first(
    b: Block,
    keys: Register,
    values: Register,
    ring: Register,
    parts: Register,
    layer: Register,
    *,
    feed: CacheFeed,
) -> None:
    write_cache_feed(b, feed, ring, keys, values, parts, layer, 0)


_feed_cache = Operation("ffjax_feed_cache", _write_first)


def feed_cache(
    keys: Any, values: Any, ring: Array, parts: Array, layer: Array, feed: CacheFeed
) -> None:
    """Asks for a layer's first tiles of keys and values, as many as are free.

    Args:
        keys: ref of the cache's keys.
        values: ref of its values.
        ring: int32 scalar, the ring's address.
        parts: int32 scalar, address of the rows of the layer's parts.
        layer: int32 scalar.
        feed: the rest.
    """
    _feed_cache(Pointer(keys), Pointer(values), ring, parts, layer, feed=feed)
