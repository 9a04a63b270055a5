"""Keys and values on their way to shared memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax._src import core, state
from jax._src.pallas.triton import lowering
from jax._src.pallas.triton.lowering import tt_dialect

from pallas_kernels.stream.ptx import lowered
from pallas_kernels.stream.ptx.address import UNIT

__all__ = [
    "CacheFeed",
    "ask_tile_lines",
    "cache_feed_lines",
    "feed_cache",
    "next_tile_lines",
    "pointers",
]


@dataclasses.dataclass(frozen=True)
class CacheFeed:
    """Where a program's tiles of keys and values lie, and what is made of them.

    A tile holds the keys of `block` positions, and behind them the values. Its *part* is a row of
    8 words in shared memory: where the part begins in a layer, in units of 16 bytes; how many
    cached positions it has; its tiles; whether it has the new position besides. Before the
    first part's row stands one whose first word is the number of parts.

    Attributes:
        head_dim: H.
        block: positions of a tile.
        warps: that attend, `block / warps` positions each.
        stages: tiles that shared memory holds.
        layer_units: from a layer of the cache to the next, in units of 16 bytes.
        tile_bytes: of the keys and values of a tile.
        query_pitch: from a query to the next, bytes.
        out_pitch: from a row of `out` to the next, bytes.
        softcap: c, which makes scores c * tanh(score / c), or None. Queries come scaled for it.
        tiles: where the tiles lie, bytes behind the ring's address.
        barriers: likewise their barriers, 8 bytes each.
        control: likewise 8 words: free tiles, the next one's part, number in the part, layer and
            stage; from the 7th on, stage and phase of the next one to be used.
        queries: likewise 8 queries, two bfloat16 for each number: see `query_place`.
        new: likewise the new position's key, and its value.
        out: likewise what each warp makes of its positions: 8 rows.
        sums: likewise the maximum and the sum of the weights of each of those rows.
        thread: the thread that asks.
    """

    head_dim: int
    block: int
    warps: int
    stages: int
    layer_units: int
    tile_bytes: int
    query_pitch: int
    out_pitch: int
    softcap: float | None
    tiles: int
    barriers: int
    control: int
    queries: int
    new: int
    out: int
    sums: int
    thread: int

    @property
    def row_bytes(self) -> int:
        """Of a key or a value."""
        return 2 * self.head_dim


def _state_lines(f: CacheFeed, ring: str, parts: str) -> list[str]:
    """Loads the control's words, and the number of parts."""
    return [
        f"ld.shared.v4.b32 {{%n, %j, %i, %l}}, [{ring}+{f.control}];",
        f"ld.shared.b32 %s, [{ring}+{f.control + 16}]; ld.shared.b32 %m, [{parts}];",
    ]


def _source_lines(f: CacheFeed, parts: str) -> list[str]:
    """Where the next tile lies: %size bytes of keys, %from bytes behind the first ones."""
    return [
        f"mad.lo.u32 %x, %j, 32, {parts}; ld.shared.v4.b32 {{%o, %c, %k, %x}}, [%x+32];",
        f"mul.lo.u32 %x, %i, {f.block}; sub.s32 %size, %c, %x; min.s32 %size, %size, {f.block};",
        f"max.s32 %size, %size, 0; mul.lo.u32 %size, %size, {f.row_bytes};",
        f"mad.lo.u32 %o, %x, {f.row_bytes // UNIT}, %o; mul.wide.u32 %from, %l, {f.layer_units};",
        "cvt.u64.u32 %e, %o; add.u64 %from, %from, %e; shl.b64 %from, %from, 4;",
    ]


def _step_lines(f: CacheFeed) -> list[str]:
    """The control's words go on to the tile behind."""
    return [
        "add.u32 %i, %i, 1; setp.eq.u32 %p, %i, %k; selp.u32 %i, 0, %i, %p;",
        "@%p add.u32 %j, %j, 1; setp.eq.u32 %p, %j, %m; selp.u32 %j, 0, %j, %p;",
        "@%p add.u32 %l, %l, 1;",
        f"add.u32 %s, %s, 1; setp.eq.u32 %p, %s, {f.stages}; selp.u32 %s, 0, %s, %p;",
    ]


def _store_lines(f: CacheFeed, ring: str) -> list[str]:
    return [
        f"st.shared.v4.b32 [{ring}+{f.control}], {{%n, %j, %i, %l}};",
        f"st.shared.b32 [{ring}+{f.control + 16}], %s;",
    ]


def _copy_lines(f: CacheFeed, ring: str, stage: str, keys: str, values: str) -> list[str]:
    """Asks for what `_source_lines` has found."""
    # Like weights, keys and values are read once a step: they are the first to leave the L2 cache,
    # where weights may wait that have been asked for ahead.
    copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
    return [
        "{ .reg .b64 %policy; createpolicy.fractional.L2::evict_first.b64 %policy, 1.0;",
        f"mad.lo.u32 %b, {stage}, 8, {ring}; add.u32 %b, %b, {f.barriers}; shl.b32 %x, %size, 1;",
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], %x; setp.gt.u32 %q, %size, 0;",
        f"mad.lo.u32 %v, {stage}, {f.tile_bytes}, {ring}; add.u32 %v, %v, {f.tiles};",
        f"add.u64 %e, %from, {keys}; @%q {copy} [%v], [%e], %size, [%b], %policy;",
        f"add.u64 %e, %from, {values}; add.u32 %v, %v, {f.tile_bytes // 2};",
        f"@%q {copy} [%v], [%e], %size, [%b], %policy; }}",
    ]


def cache_feed_lines(
    f: CacheFeed, ring: str, keys: str, values: str, parts: str, layer: str
) -> list[str]:
    """Asks for tiles of a layer while there are free ones.

    Args:
        f: where everything lies.
        ring: the ring's address.
        keys: address of the cache's keys.
        values: address of its values.
        parts: address of the rows of the layer's parts.
        layer: the last one that may be asked for.
    """
    return [
        "{ .reg .pred %p, %q; .reg .b32 %t, %n, %j, %i, %l, %s, %m, %o, %c, %k, %x, %b, %v;",
        ".reg .b32 %size; .reg .b64 %from, %e; mov.u32 %t, %tid.x;",
        f"setp.ne.u32 %p, %t, {f.thread}; @%p bra asked;",
        *_state_lines(f, ring, parts),
        # Of layers between, the program has no part.
        f"setp.lt.u32 %p, %l, {layer}; selp.u32 %j, 0, %j, %p; selp.u32 %i, 0, %i, %p;",
        f"max.u32 %l, %l, {layer};",
        f"more: setp.eq.u32 %p, %n, 0; setp.gt.or.u32 %p, %l, {layer}, %p;",
        "setp.ge.or.u32 %p, %j, %m, %p; @%p bra stored;",
        *_source_lines(f, parts),
        *_copy_lines(f, ring, "%s", keys, values),
        *_step_lines(f),
        "sub.u32 %n, %n, 1; bra more; stored:",
        *_store_lines(f, ring),
        "asked: }",
    ]


def next_tile_lines(f: CacheFeed, ring: str, parts: str, layer: str) -> list[str]:
    """Works out, in the feeding thread, what to ask for once the tile in use is free, if %asks.

    When a part begins, as many tiles of the layer have been asked for as there was room for. So
    either there is nothing left to ask for, or no tile is free, and the next one comes to where the
    tile in use lies.
    """
    return [
        "{ .reg .b32 %n, %j, %i, %l, %s, %m, %o, %c, %k, %x; .reg .b64 %e;",
        *_state_lines(f, ring, parts),
        f"setp.eq.u32 %asks, %l, {layer};",
        "@!%asks add.u32 %n, %n, 1; @!%asks bra kept;",
        *_source_lines(f, parts),
        *_step_lines(f),
        "kept:",
        *_store_lines(f, ring),
        "}",
    ]


def ask_tile_lines(f: CacheFeed, ring: str, stage: str, keys: str, values: str) -> list[str]:
    """Asks for what `next_tile_lines` has found, in the same thread."""
    return [
        "@!%asks bra asked; { .reg .pred %q; .reg .b32 %b, %v, %x; .reg .b64 %e;",
        *_copy_lines(f, ring, stage, keys, values),
        "} asked:",
    ]


_feed_cache_p = core.Primitive("ffjax_feed_cache")


@_feed_cache_p.def_effectful_abstract_eval
def _(keys, values, ring, parts, layer, *, feed):
    effects = {lowered.ORDERED, state.ReadEffect(0), state.ReadEffect(1)}
    return core.ShapedArray((1,), jnp.int32), effects


def pointers(refs: list[Any]) -> list[Any]:
    """Arrays' addresses."""
    return [lowering._bcast_to(tt_dialect.ptr_to_int(lowered.i64(), x), [1]) for x in refs]


@lowering.register_lowering(_feed_cache_p)
def _(ctx, keys, values, *args, feed):
    lines = cache_feed_lines(feed, "$3", "$1", "$2", "$4", "$5")
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
