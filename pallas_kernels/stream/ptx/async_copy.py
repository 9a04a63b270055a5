"""Copies of 16 bytes a thread (`cp.async`), or of 8, which compute capability 8.0 and newer have.

Where bulk copies are (9.0 and newer), one thread asks for a whole tile by one instruction. Here
the threads that multiply share each tile: a warp asks for its own share of it when it finds that it
may, whatever the other warps do, and keeps its own words of how far it has come. Each thread tells
the tile's barrier when its own copies will have come, so that a barrier counts these threads
instead of bytes.
"""

from __future__ import annotations

from pallas_kernels.stream.ptx.swizzle import Lines

__all__ = ["WARP", "arrive_line", "copy_lines", "prefetch_lines"]

WARP = 32
# Copies of a thread between two looks whether any are left.
_UNROLLED = 4
# How a copy of so many bytes is made: what passes through the L1 cache may be smaller.
_KINDS = {16: "cg", 8: "ca"}
# Bytes that a thread asks for into the L2 cache at once.
_LINE = 128


def arrive_line(barrier: str) -> str:
    """Tells a barrier when all that the thread has asked for so far has come.

    Args:
        barrier: register with its address.
    """
    return f"cp.async.mbarrier.arrive.noinc.shared::cta.b64 [{barrier}];"


def copy_lines(
    threads: int,
    unit: int = 16,
    *,
    source: str,
    place: str,
    size: str,
    policy: str,
    count: str = "1",
    step: str = "0",
    apart: str = "0",
    lines: Lines | None = None,
) -> list[str]:
    """Copies a thread's share of `count` parts of `size` bytes each; whole warps come here.

    Args:
        threads: that share the parts: the program's first ones.
        unit: bytes of a copy, 16 or 8.
        source: register with the address of the first part, a multiple of `unit`.
        place: register with its address in shared memory, likewise.
        size: register with the bytes of a part, a multiple of `unit`.
        policy: register with the policy of the L2 cache.
        count: register with the number of parts.
        step: register with the bytes from a part to the next one, 64 bits.
        apart: register with the bytes between their places.
        lines: how the rows of a part, which is the only one then, lie at its place.
    """
    by, whole = unit * threads, unit * threads * _UNROLLED
    text = [
        "{ .reg .pred %is; .reg .b32 %own, %parts, %rest, %row, %to; .reg .b64 %begin, %at;",
        f"mov.u32 %own, %tid.x; mul.lo.u32 %own, %own, {unit}; cvt.u64.u32 %begin, %own;",
        f"add.u64 %begin, %begin, {source}; add.u32 %row, {place}, %own; mov.b32 %parts, {count};",
        "part: setp.eq.u32 %is, %parts, 0; @%is bra copied;",
        f"mov.b64 %at, %begin; mov.b32 %to, %row; sub.s32 %rest, {size}, %own;",
    ]
    placed = by  # bytes from a copy's place to the thread's next one
    if lines is not None:
        text += [".reg .b32 %x, %position, %chunk, %turn, %turned; mov.b32 %x, %own;"]
        text += [f"shr.u32 %turn, {place}, 7;"]
        if by % (8 * lines.row_bytes) == 0:  # all of a thread's rows are turned alike
            placed = by // lines.row_bytes * lines.width
            text += _place_lines(lines, place)
    text.append("some:")
    for i in range(_UNROLLED):
        if lines is not None and by % (8 * lines.row_bytes):
            placed = 0
            text += [*_place_lines(lines, place), f"add.u32 %x, %x, {by};"]
        text.append(
            f"setp.gt.s32 %is, %rest, {by * i}; @%is cp.async.{_KINDS[unit]}.shared.global."
            f"L2::cache_hint [%to+{placed * i}], [%at+{by * i}], {unit}, {policy};"
        )
    return [
        *text,
        f"add.u32 %to, %to, {placed * _UNROLLED}; add.u64 %at, %at, {whole};",
        f"sub.s32 %rest, %rest, {whole};",
        # The loop ends for all threads at the same time: when the program's first one has no more.
        "add.s32 %own, %own, %rest; setp.gt.s32 %is, %own, 0; sub.s32 %own, %own, %rest;",
        "@%is bra some;",
        f"add.u64 %begin, %begin, {step}; add.u32 %row, %row, {apart};",
        "sub.u32 %parts, %parts, 1; bra part; copied: }",
    ]


def _place_lines(lines: Lines, place: str) -> list[str]:
    """Where byte %x of a part's rows lies, %to."""
    bits = lines.row_bytes.bit_length() - 1
    return [
        f"shr.u32 %position, %x, {bits};",
        f"and.b32 %chunk, %x, {lines.row_bytes - 1}; shr.u32 %chunk, %chunk, 4;",
        *lines.place("%to", "%position", "%chunk", "%turn", "%turned"),
        f"add.u32 %to, %to, {place};",
    ]


def prefetch_lines(source: str, size: str, most: int, asks: str) -> list[str]:
    """Asks for some bytes into the L2 cache; all threads of one warp come here.

    Args:
        source: register with their address.
        size: register with how many there are.
        most: of them, at most.
        asks: predicate: whether any are asked for.
    """
    lines = [
        "{ .reg .pred %is; .reg .b32 %lane, %rest; .reg .b64 %at;",
        f"mov.u32 %lane, %laneid; mul.lo.u32 %lane, %lane, {_LINE}; cvt.u64.u32 %at, %lane;",
        f"add.u64 %at, %at, {source}; sub.s32 %rest, {size}, %lane;",
    ]
    for by in range(0, most, _LINE * WARP):
        lines.append(
            f"setp.gt.and.s32 %is, %rest, {by}, {asks}; @%is prefetch.global.L2 [%at+{by}];"
        )
    return [*lines, "}"]
