"""Tiles beyond a full ring, asked for into the L2 cache."""

from __future__ import annotations

from pallas_kernels.stream.ptx import async_copy, lowered
from pallas_kernels.stream.ptx.feed_state import Feed, next_row_lines

__all__ = ["ahead_lines"]


def ahead_lines(f: Feed, ring: str, own: str, pointer: str) -> list[str]:
    """Asks for what comes next beyond a full ring into the L2 cache, if there is little such.

    Some bytes of one copy: words that the program looks for next queue behind them.

    Args:
        f: the feed.
        ring: the ring's address.
        own: the same, and bytes to the asking warp's control words.
        pointer: the first array's address.
    """
    lead, rejoin = ("", "") if f.bulk else ("@%lead ", f"{lowered.REJOIN} ")
    return [
        "{ .reg .pred %done; .reg .b32 %i, %o, %u, %t, %v, %w, %x, %y, %z;",
        f"ld.shared.v4.b32 {{%x, %y, %z, %o}}, [{own}+{f.control + 32}];",
        # Tiles that have been asked for in earnest meanwhile are past.
        "setp.lt.u32 %p, %x, %n; @%p mov.b32 %x, %n; @%p mov.b32 %y, %e; @%p mov.b32 %z, %l;",
        f"@%p mov.b32 %o, 0; add.u32 %u, %n, {f.l2_tiles}; min.u32 %u, %u, {f.total};",
        "setp.ge.u32 %p, %x, %u; @%p bra fed;",
        f"mad.lo.u32 %b, %y, {f.row_bytes}, {ring};",
        f"ld.shared.v4.b32 {{%t, %u, %v, %w}}, [%b+{f.route}];",
        "mov.b64 %from, {%t, %u}; mul.wide.u32 %far, %z, %v; add.u64 %from, %from, %far;",
        f"shl.b64 %from, %from, 4; add.u64 %from, %from, {pointer};",
        # %i copies are past, and %o bytes of the next, of %t bytes each
        f"ld.shared.v2.b32 {{%t, %u}}, [%b+{f.route + 16}]; shr.u32 %i, %o, 16;",
        "and.b32 %o, %o, 65535; shl.b32 %w, %w, 4; mul.wide.u32 %far, %w, %i;",
        "add.u64 %from, %from, %far; cvt.u64.u32 %far, %o; add.u64 %from, %from, %far;",
        f"sub.u32 %v, %t, %o; min.u32 %v, %v, {f.l2_bytes}; setp.lt.u32 %p, %i, %u;",
        *_ask_lines(f),
        f"add.u32 %o, %o, {f.l2_bytes};",
        "setp.ge.u32 %p, %o, %t; @%p mov.b32 %o, 0; @%p add.u32 %i, %i, 1;",
        "setp.ge.u32 %done, %i, %u; shl.b32 %i, %i, 16; or.b32 %o, %o, %i; @%done mov.b32 %o, 0;",
        "@%done add.u32 %x, %x, 1;",
        *next_row_lines(f, "%y", "%z", "%done"),
        # Where a warp asks, all of it has read these words before one thread stores them anew.
        f"{rejoin}{lead}st.shared.v4.b32 [{own}+{f.control + 32}], {{%x, %y, %z, %o}};",
        f"{rejoin}bra fed; }}",
    ]


def _ask_lines(f: Feed) -> list[str]:
    """If %p, asks for %v bytes from %from into the L2 cache."""
    if f.bulk:
        return ["@%p cp.async.bulk.prefetch.L2.global [%from], %v;"]
    return async_copy.prefetch_lines("%from", "%v", f.l2_bytes, "%p")
