"""Keys and values on their way to shared memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax._src import core, state

from pallas_kernels.stream.plan import BOX_UNIT
from pallas_kernels.stream.ptx import async_copy, lowered
from pallas_kernels.stream.ptx.address import UNIT
from pallas_kernels.stream.ptx.boxes import TensorMap
from pallas_kernels.stream.ptx.swizzle import Lines

__all__ = ["CacheFeed", "cache_feed_lines", "feed_cache", "pointers"]

# Bytes of a warp's control words.
_CONTROL = 32


@dataclasses.dataclass(frozen=True)
class CacheFeed:
    """Where a program's tiles of keys and values lie, and what is made of them.

    A tile holds the keys of `block` positions, and behind them the values, as `Lines` says. Its
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
        tiles: where the tiles lie, bytes behind the ring's address.
        barriers: likewise their barriers, 8 bytes each.
        maps: likewise the addresses of the tensor maps of keys and of values, 8 bytes each: where
            bulk copies bring them.
        control: likewise 8 words: free tiles, the next one's part, number in the part, layer and
            stage; from the 7th on, stage and phase of the next one to be used.
        queries: likewise 16 rows for 8 queries: what is left of their bfloat16, behind them.
        new: likewise the new positions' keys, and their values.
        out: likewise what each warp makes of its positions: 8 rows.
        sums: likewise the maximum and the sum of the weights of each of those rows.
        thread: the thread that asks.
        sharing: as of `Feed`: each warp has 8 control words of its own, but for the last two.
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

    @property
    def bulk(self) -> bool:
        """Whether bulk copies bring the tiles."""
        return self.sharing == 0

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


def cache_feed_lines(
    f: CacheFeed, ring: str, keys: str, values: str, parts: str, layer: str, freed: int
) -> list[str]:
    """Asks for tiles of a layer while there are free ones.

    Args:
        f: where everything lies.
        ring: the ring's address.
        keys: address of the cache's keys.
        values: address of its values.
        parts: address of the rows of the layer's parts.
        layer: the last one that may be asked for.
        freed: tiles that have been used since last time.
    """
    own, lead, rejoin = ring, "", ""
    if not f.bulk:
        own, lead, rejoin = "%own", "@%lead ", f"{lowered.REJOIN} "
    return [
        "{ .reg .pred %p, %q; .reg .b32 %t, %n, %j, %i, %l, %s, %m, %o, %c, %k, %x, %y, %b, %v;",
        # Like weights, keys and values are read once a step: they are the first to leave the L2
        # cache, where weights may wait that have been asked for ahead.
        ".reg .b64 %policy, %d, %e; createpolicy.fractional.L2::evict_first.b64 %policy, 1.0;",
        "mov.u32 %t, %tid.x;",
        *(
            [f"setp.ne.u32 %p, %t, {f.thread}; @%p bra asked;"]
            if f.bulk
            else [
                ".reg .pred %lead; .reg .b32 %own; and.b32 %own, %t, 31;",
                f"setp.eq.u32 %lead, %own, 0; setp.ge.u32 %p, %t, {f.sharing}; @%p bra asked;",
                "shr.u32 %t, %t, 5;",
                f"mad.lo.u32 %own, %t, {_CONTROL}, {ring};",
            ]
        ),
        f"ld.shared.v4.b32 {{%n, %j, %i, %l}}, [{own}+{f.control}];",
        f"ld.shared.b32 %s, [{own}+{f.control + 16}]; ld.shared.b32 %m, [{parts}];",
        f"add.u32 %n, %n, {freed};",
        # Of layers between, the program has no part.
        f"setp.lt.u32 %p, %l, {layer}; selp.u32 %j, 0, %j, %p; selp.u32 %i, 0, %i, %p;",
        f"max.u32 %l, %l, {layer};",
        f"more: setp.eq.u32 %p, %n, 0; setp.gt.or.u32 %p, %l, {layer}, %p;",
        "setp.ge.or.u32 %p, %j, %m, %p; @%p bra stored;",
        f"mad.lo.u32 %x, %j, 32, {parts}; ld.shared.v4.b32 {{%o, %c, %k, %x}}, [%x+32];",
        # %y positions, of the layers' keys from row %o on
        f"mul.lo.u32 %x, %i, {f.block}; sub.s32 %y, %c, %x; min.s32 %y, %y, {f.block};",
        f"max.s32 %y, %y, 0; shr.u32 %o, %o, {(f.row_bytes // UNIT).bit_length() - 1};",
        f"add.u32 %o, %o, %x; mad.lo.u32 %o, %l, {f.layer_rows}, %o;",
        f"mad.lo.u32 %b, %s, 8, {ring}; add.u32 %b, %b, {f.barriers};",
        *_copy_lines(f, ring, keys, values),
        "add.u32 %i, %i, 1; setp.eq.u32 %p, %i, %k; selp.u32 %i, 0, %i, %p;",
        "@%p add.u32 %j, %j, 1; setp.eq.u32 %p, %j, %m; selp.u32 %j, 0, %j, %p;",
        "@%p add.u32 %l, %l, 1;",
        f"add.u32 %s, %s, 1; setp.eq.u32 %p, %s, {f.stages}; selp.u32 %s, 0, %s, %p;",
        "sub.u32 %n, %n, 1; bra more;",
        # Where warps ask, all of one has read these words before a thread stores them anew.
        f"stored: {rejoin}{lead}st.shared.v4.b32 [{own}+{f.control}], {{%n, %j, %i, %l}};",
        f"{lead}st.shared.b32 [{own}+{f.control + 16}], %s; {rejoin}asked: }}",
    ]


def _copy_lines(f: CacheFeed, ring: str, keys: str, values: str) -> list[str]:
    """Copies %y keys, and as many values, from row %o on, to tile %s."""
    place = f"mad.lo.u32 %v, %s, {f.tile_bytes}, {ring}; add.u32 %v, %v, {f.tiles};"
    if f.bulk:
        return [place, *_box_lines(f, ring)]
    copies = [
        f"{place} mul.wide.u32 %d, %o, {f.row_bytes}; mul.lo.u32 %y, %y, {f.row_bytes};",
    ]
    for array, behind in ((keys, 0), (values, f.values)):
        copies.append(f"add.u64 %e, %d, {array}; add.u32 %v, %v, {behind};")
        copies += async_copy.copy_lines(
            f.sharing, source="%e", place="%v", size="%y", policy="%policy", lines=f.lines
        )
    return [*copies, async_copy.arrive_line("%b")]


def _box_lines(f: CacheFeed, ring: str) -> list[str]:
    """The same by boxes, of whole tiles: what lies behind a sequence's positions is not used."""
    lines = f.lines
    copies = [
        f"setp.gt.u32 %q, %y, 0; selp.b32 %x, {f.tile_bytes}, 0, %q;",
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], %x; mov.b32 %x, 0;",
        f"ld.shared.v2.b64 {{%d, %e}}, [{ring}+{f.maps}];",
    ]
    for box in ("%d", "%e"):
        for line in range(lines.count):
            copies.append(
                f"mov.b32 %y, {line}; @%q cp.async.bulk.tensor.3d.shared::cluster.global.tile"
                ".mbarrier::complete_tx::bytes.L2::cache_hint "
                f"[%v], [{box}, {{%x, %y, %o}}], [%b], %policy;"
            )
            copies.append(f"add.u32 %v, %v, {f.block * lines.width};")
    return copies


_feed_cache_p = core.Primitive("ffjax_feed_cache")


@_feed_cache_p.def_effectful_abstract_eval
def _(keys, values, ring, parts, layer, *, feed):
    effects = {lowered.ORDERED, state.ReadEffect(0), state.ReadEffect(1)}
    return core.ShapedArray((1,), jnp.int32), effects


def pointers(refs: list[Any]) -> list[Any]:
    """Arrays' addresses."""
    return [lowered.spread(lowered.pointer(x), [1]) for x in refs]


@lowered.rule(_feed_cache_p)
def _(ctx, keys, values, *args, feed):
    lines = cache_feed_lines(feed, "$3", "$1", "$2", "$4", "$5", 0)
    text = " ".join(["{", *lines, "mov.u32 $0, 0; }"])
    arguments = [*pointers([keys, values]), *lowered.values(ctx, args)]
    result = lowered.like((1,), lowered.i32())
    return lowered.assembly([result], text, "=r,l,l,r,r,r", arguments)[0]


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
    scalars = [jnp.full((1,), x) for x in (ring, parts, layer)]
    _feed_cache_p.bind(keys, values, *scalars, feed=feed)
