"""Feeding the ring by copies of 16 bytes a thread: each warp asks for its own share of a tile."""

from __future__ import annotations

from pallas_kernels.stream.ptx import async_copy, lowered
from pallas_kernels.stream.ptx.ahead import ahead_lines
from pallas_kernels.stream.ptx.feed_state import Feed, next_row_lines

__all__ = ["async_feed_lines"]


def async_feed_lines(
    f: Feed, ring: str, pointer: str, used: str | None, ahead: str | None
) -> list[str]:
    """Asks for the next tile where a slot is free and few are on their way; see `feed_lines`.

    What is next is put down before anything is copied: little else need be kept meanwhile, and
    where this stands other words fill the registers.
    """
    tell = "" if used is None else f"mov.b32 %u, {used};"
    last = f.sharing // async_copy.WARP - 1
    lines = [
        "{ .reg .pred %p, %go, %lead; .reg .b32 %n, %e, %l, %s, %h, %u, %t, %b, %r, %row, %layer;",
        ".reg .b32 %own; .reg .b64 %from, %far; mov.u32 %t, %laneid; setp.eq.u32 %lead, %t, 0;",
        f"mov.u32 %t, %tid.x; shr.u32 %t, %t, 5; setp.gt.u32 %p, %t, {last}; @%p bra fed;",
        f"mad.lo.u32 %own, %t, 64, {ring};",
        f"ld.shared.v4.b32 {{%n, %e, %l, %s}}, [%own+{f.control}];",
        f"ld.shared.v2.b32 {{%h, %u}}, [%own+{f.control + 16}]; {tell}",
        f"add.u32 %u, %u, {ahead or f.slots}; min.u32 %u, %u, {f.total};",
    ]
    if f.l2_tiles and used is None:
        lines.append(f"setp.lt.u32 %p, %n, %u; setp.ne.or.u32 %p, %t, {last}, %p; @%p bra room;")
        lines += [*ahead_lines(f, ring, "%own", pointer), "room:"]
    lines += [
        "more: setp.lt.u32 %go, %n, %u;",
        # Has the tile come that was asked for some before?
        f"sub.s32 %b, %s, {f.in_flight}; setp.lt.s32 %p, %b, 0; selp.u32 %r, 1, 0, %p;",
        f"@%p add.s32 %b, %b, {f.slots}; xor.b32 %r, %r, %h; mad.lo.u32 %b, %b, 8, {ring};",
        f"mbarrier.test_wait.parity.shared::cta.b64 %p, [%b+{f.barriers}], %r;",
        "and.pred %go, %go, %p; vote.sync.all.pred %go, %go, 0xffffffff; @!%go bra kept;",
        f"mad.lo.u32 %row, %e, {f.row_bytes}, {ring}; mov.b32 %layer, %l;",
        f"mad.lo.u32 %b, %s, 8, {ring}; add.u32 %b, %b, {f.barriers};",
        f"mad.lo.u32 %t, %s, {f.slot_bytes}, {ring};",
        "add.u32 %n, %n, 1; add.u32 %s, %s, 1;",
        *next_row_lines(f, "%e", "%l", "%go"),
        f"setp.eq.u32 %p, %s, {f.slots}; @%p mov.u32 %s, 0; @%p xor.b32 %h, %h, 1;",
        f"@%lead st.shared.v4.b32 [%own+{f.control}], {{%n, %e, %l, %s}};",
        f"@%lead st.shared.b32 [%own+{f.control + 16}], %h;",
        # Size, number and pitch of the copies stand at other places of the scales' words.
        *_part(f, f.route, pointer, ("%size", "%count", "%apart", "%first"), ""),
        *(
            _part(f, f.route + 32, pointer, ("%size", "%count", "%first", "%apart"), "%first")
            if f.has_scales
            else []
        ),
        async_copy.arrive_line("%b"),
        # A warp that has waited for less than others lags behind.
        *(["setp.lt.u32 %p, %n, %u; @%p bra more;"] if used is not None else []),
        "kept:",
    ]
    if used is not None:
        lines.append(f"@%lead st.shared.b32 [%own+{f.control + 20}], {used};")
    # What one thread has put down all of its warp read next time.
    return [*lines, f"{lowered.REJOIN} fed: }}"]


def _part(f: Feed, row: int, pointer: str, last: tuple[str, ...], first: str) -> list[str]:
    """Copies a thread's share of a tile's weights, or scales, to its slot at %t.

    Args:
        f: the feed.
        row: where its words of the route lie, bytes behind %row.
        pointer: the first array's address.
        last: names of the second four of them.
        first: which of these says where in the slot they go, of scales; "" of weights, which go to
            its beginning.
    """
    unit = f.scale_unit if first else 16
    return [
        "{ .reg .b32 %low, %high, %stride, %step, %size, %count, %apart, %first;",
        ".reg .b64 %from, %by, %policy; createpolicy.fractional.L2::evict_first.b64 %policy, 1.0;",
        f"ld.shared.v4.b32 {{%low, %high, %stride, %step}}, [%row+{row}];",
        f"ld.shared.v4.b32 {{{', '.join(last)}}}, [%row+{row + 16}];",
        "mov.b64 %from, {%low, %high};",
        "mul.wide.u32 %by, %layer, %stride; add.u64 %from, %from, %by;",
        f"shl.b64 %from, %from, {unit.bit_length() - 1}; add.u64 %from, %from, {pointer};",
        f"mul.wide.u32 %by, %step, {unit};",
        f"add.u32 %first, %t, {first or 0};",
        *async_copy.copy_lines(
            f.sharing,
            unit,
            source="%from",
            place="%first",
            size="%size",
            policy="%policy",
            count="%count",
            step="%by",
            apart="%apart",
        ),
        "}",
    ]
