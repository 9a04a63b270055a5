"""Tiles on their way to shared memory: asked for, and waited for."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax._src import core, state

from pallas_kernels.stream.ptx import lowered
from pallas_kernels.stream.ptx.ahead import ahead_lines
from pallas_kernels.stream.ptx.async_feed import async_feed_lines
from pallas_kernels.stream.ptx.feed_state import Feed, next_row_lines

__all__ = ["MAP_IN_CONTROL", "Feed", "feed_lines", "feed_ring", "start_barriers"]

# Bytes from the feed's own words to the address of a tensor map.
MAP_IN_CONTROL = 24

_start_barriers_p = core.Primitive("ffjax_start_barriers")


@_start_barriers_p.def_effectful_abstract_eval
def _(address, *, count, sharing, alone):
    return core.ShapedArray((1,), jnp.int32), {lowered.ORDERED}


@lowered.rule(_start_barriers_p)
def _(ctx, address, *, count, sharing, alone):
    [address] = lowered.values(ctx, [address])
    if alone:
        lowered.one_program_a_multiprocessor()
    init, arrivals = "@%p mbarrier.init.shared::cta.b64", sharing or 1
    starts = [f"{init} [$1+{8 * i}], {arrivals}; " for i in range(count)]
    # Bulk copies are made by others, whom a barrier of the program does not tell.
    fences = "fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta; "
    text = (
        "{ .reg .pred %p; .reg .b32 %t; mov.u32 %t, %tid.x; setp.eq.u32 %p, %t, 0; "
        + "".join(starts)
        + fences * (sharing == 0)
        + "mov.u32 $0, 0; }"
    )
    return lowered.assembly([lowered.like((1,), lowered.i32())], text, "=r,r", [address])[0]


def start_barriers(address: Array, count: int, sharing: int, alone: bool) -> None:
    """Makes barriers in shared memory, 8 bytes each, that a tile's arrival completes.

    Args:
        address: int32 scalar, a multiple of 8.
        count: how many.
        sharing: as of `Feed`.
        alone: whether ptxas is to know that a multiprocessor has no second program.
    """
    place = jnp.full((1,), address)
    _start_barriers_p.bind(place, count=count, sharing=sharing, alone=alone)


def _scale_lines(pointer: str, shared: bool) -> list[str]:
    """If %go, copies the scales of the tile to its slot, which begins at %slot.

    %q0 to %q7 are its words of the route, and %layer is its layer. Shared, each copy falls to one
    of the threads of the warp that no copy of weights falls to; else all to the leading thread.
    """
    copy = (
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%v], [%from], %x, [%b];"
    )
    lines = [
        "mov.b64 %from, {%q0, %q1}; mul.wide.u32 %far, %layer, %q2; add.u64 %from, %from, %far;",
        f"shl.b64 %from, %from, 4; add.u64 %from, %from, {pointer}; add.u32 %v, %slot, %q6;",
        "mov.b32 %x, %q4; mov.b32 %y, %q5;",
    ]
    if shared:
        return [
            *lines,
            "mov.u32 %t, %laneid; sub.s32 %t, 31, %t; setp.lt.and.u32 %p, %t, %y, %go;",
            "mad.lo.u32 %v, %t, %q7, %v; mul.lo.u32 %w, %q3, %t; mul.wide.u32 %by, %w, 16;",
            f"add.u64 %from, %from, %by; @%p {copy}",
        ]
    lines.append("mul.wide.u32 %by, %q3, 16;")
    ahead = "add.u64 %from, %from, %by; add.u32 %v, %v, %q7;"
    return [
        *lines,
        f"setp.gt.and.u32 %p, %y, 0, %q; @%p {copy}",
        f"{ahead} setp.gt.and.u32 %p, %y, 1, %q; @%p {copy}",
    ]


def _copy_lines(most: int, shared: bool) -> list[str]:
    """If %go, copies %y parts of %x bytes from %from to %v, %by and %z bytes apart.

    Shared, each part falls to a thread of the warp; else all to the leading thread: %q.
    """
    # Weights are read once a step: they are the first to leave the L2 cache.
    copy = (
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%v], [%from], %x, [%b], %policy;"
    )
    ahead = "add.u64 %from, %from, %by; add.u32 %v, %v, %z;"
    if shared:
        return [
            "mov.u32 %t, %laneid; setp.lt.and.u32 %p, %t, %y, %go; mad.lo.u32 %v, %t, %z, %v;",
            "mul.lo.u32 %w, %w, %t; mul.wide.u32 %by, %w, 16; add.u64 %from, %from, %by;",
            f"{lowered.REJOIN} @%p {copy}",
        ]
    if most > 2:
        return [
            "@!%q mov.b32 %y, 0; copy: setp.eq.u32 %p, %y, 0; @%p bra copied;",
            f"{copy} {ahead} sub.u32 %y, %y, 1; bra copy; copied:",
        ]
    return [
        f"setp.gt.and.u32 %p, %y, 0, %q; @%p {copy}",
        f"{ahead} setp.gt.and.u32 %p, %y, 1, %q; @%p {copy}",
    ]


def _box_lines(f: Feed) -> list[str]:
    """If %q and the tile is a box, copies it to %v; then there are no other copies of weights."""
    return [
        "mov.b32 %first, 0; shr.u32 %piece, %box, 16; and.b32 %piece, %piece, 32767;",
        f"and.b32 %row, %box, 65535; mad.lo.u32 %row, %l, {f.matrix_rows}, %row;",
        "setp.lt.and.s32 %p, %box, 0, %q;",
        "@%p cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%v], [%map, {%first, %piece, %row}], [%b], %policy; @%p mov.b32 %y, 0;",
    ]


def feed_lines(
    feed: Feed,
    ring: str,
    pointer: str,
    used: str | None = None,
    ahead: str | None = None,
    together: bool = False,
) -> list[str]:
    """Asks for the next tile where a slot is free and few are on their way.

    One thread does, or its whole warp: what is loaded is loaded before it is known whether it is
    wanted, and nothing but the end is jumped to. Without bulk copies all warps that share the
    copies come here, each whole.

    Args:
        feed: where everything lies.
        ring: the ring's address.
        pointer: the first array's.
        used: tiles that all threads have done with; None: as many as last time.
        ahead: tiles beyond those that may have been asked for; None: as many as there are slots.
        together: whether the thread's whole warp is here, so that its threads share many copies.
            No thread of a warp leaves another then.
    """
    f = feed
    if not f.bulk:
        return async_feed_lines(f, ring, pointer, used, ahead)
    shared = together and f.copies > 2
    others = (
        (f"shr.u32 %b, %t, 5; setp.ne.u32 %p, %b, {f.thread // 32};")
        if together
        else (f"setp.ne.u32 %p, %t, {f.thread};")
    )
    # %x bytes a copy, %y copies, %z bytes between their places, %w pieces between them
    lines = [
        "{ .reg .pred %p, %q, %go, %lead;",
        ".reg .b32 %n, %e, %l, %s, %h, %t, %u, %v, %w, %x, %y, %z;",
        ".reg .b32 %b, %c, %r; .reg .b64 %from, %far, %by, %policy; mov.u32 %t, %tid.x;",
        f"{others} @%p bra fed; setp.eq.u32 %lead, %t, {f.thread};",
        f"ld.shared.v4.b32 {{%n, %e, %l, %s}}, [{ring}+{f.control}];",
        f"ld.shared.v2.b32 {{%h, %u}}, [{ring}+{f.control + 16}];",
        f"mad.lo.u32 %b, %e, {f.row_bytes}, {ring};",
        f"ld.shared.v4.b32 {{%t, %c, %v, %w}}, [%b+{f.route}];",
    ]
    if f.has_scales:
        lines += [
            f".reg .b32 %slot, %layer, {', '.join(f'%q{i}' for i in range(8))};",
            f"ld.shared.v4.b32 {{%q0, %q1, %q2, %q3}}, [%b+{f.route + 32}];",
            f"ld.shared.v4.b32 {{%q4, %q5, %q6, %q7}}, [%b+{f.route + 48}]; mov.b32 %layer, %l;",
        ]
    if f.matrix_rows:
        lines.append(".reg .b32 %box, %first, %piece, %row; .reg .b64 %map;")
        lines.append(f"ld.shared.b64 %map, [{ring}+{f.control + MAP_IN_CONTROL}];")
    last = "%box" if f.matrix_rows else "%b"
    lines.append(f"ld.shared.v4.b32 {{%x, %y, %z, {last}}}, [%b+{f.route + 16}];")
    if used is not None:
        lines.append(f"mov.b32 %u, {used};")
    lines.append(f"add.u32 %u, %u, {ahead or f.slots}; min.u32 %u, %u, {f.total};")
    if f.l2_tiles and used is None:
        lines += [
            "setp.lt.u32 %p, %n, %u; @%p bra room;",
            *ahead_lines(f, ring, ring, pointer),
            "room:",
        ]
    lines += [
        "setp.lt.u32 %go, %n, %u;",
        # Has the tile come that was asked for some before?
        # In the first round they all have: it is the phase before a barrier's first.
        f"sub.s32 %b, %s, {f.in_flight}; setp.lt.s32 %q, %b, 0; selp.u32 %r, 1, 0, %q;",
        f"@%q add.s32 %b, %b, {f.slots}; xor.b32 %r, %r, %h; mad.lo.u32 %b, %b, 8, {ring};",
        f"mbarrier.test_wait.parity.shared::cta.b64 %p, [%b+{f.barriers}], %r;",
        "and.pred %go, %go, %p;",
        # Each thread has asked by itself: they must not disagree.
        *(["vote.sync.all.pred %go, %go, 0xffffffff;"] if together else []),
        "mov.b64 %from, {%t, %c}; mul.wide.u32 %far, %l, %v; add.u64 %from, %from, %far;",
        f"shl.b64 %from, %from, 4; add.u64 %from, %from, {pointer}; mul.wide.u32 %by, %w, 16;",
        f"mad.lo.u32 %b, %s, 8, {ring}; add.u32 %b, %b, {f.barriers};",
        f"mad.lo.u32 %v, %s, {f.slot_bytes}, {ring}; mul.lo.u32 %t, %x, %y;",
        "createpolicy.fractional.L2::evict_first.b64 %policy, 1.0;",
        *(["mad.lo.u32 %t, %q4, %q5, %t; mov.b32 %slot, %v;"] if f.has_scales else []),
        "and.pred %q, %go, %lead;",
        "@%q mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], %t;",
        *(_box_lines(f) if f.matrix_rows else []),
        *_copy_lines(f.copies, shared),
        *(_scale_lines(pointer, shared) if f.has_scales else []),
        "@%go add.u32 %n, %n, 1; @%go add.u32 %s, %s, 1;",
        *next_row_lines(f, "%e", "%l", "%go"),
        f"setp.eq.u32 %p, %s, {f.slots}; @%p mov.u32 %s, 0; @%p xor.b32 %h, %h, 1;",
        f"@%lead st.shared.v4.b32 [{ring}+{f.control}], {{%n, %e, %l, %s}};",
    ]
    if used is None:
        lines.append(f"@%lead st.shared.b32 [{ring}+{f.control + 16}], %h; fed: }}")
    else:
        lines.append(f"@%lead st.shared.v2.b32 [{ring}+{f.control + 16}], {{%h, {used}}}; fed: }}")
    return lines


_feed_p = core.Primitive("ffjax_feed")


@_feed_p.def_effectful_abstract_eval
def _(ref, ring, used, ahead, *, feed, store):
    return core.ShapedArray((1,), jnp.int32), {lowered.ORDERED, state.ReadEffect(0)}


@lowered.rule(_feed_p)
def _(ctx, ref, *args, feed, store):
    args = lowered.values(ctx, args)
    pointer = lowered.spread(lowered.pointer(ref), [1])
    # By one thread, instructions for few copies are fewer than for a whole warp.
    together = store and not feed.matrix_rows and feed.bulk
    options: dict[str, Any] = {"used": "$3", "ahead": "$4"} if store else {}
    options["together"] = together
    lines = feed_lines(feed, "$2", "$1", **options)
    text = " ".join(["{", *lines, "mov.u32 $0, 0; }"])
    result = lowered.like((1,), lowered.i32())
    arguments = [pointer, *args]
    return lowered.assembly([result], text, "=r,l,r,r,r", arguments, by_warps=together)[0]


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
    store = used is not None
    numbers = [ring, 0 if used is None else used, feed.slots if ahead is None else ahead]
    _feed_p.bind(ref, *(jnp.full((1,), x) for x in numbers), feed=feed, store=store)
