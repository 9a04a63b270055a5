"""Copies of 16 bytes a thread (`cp.async`), or of 8, which compute capability 8.0 and newer have.

Where bulk copies are (9.0 and newer), one thread asks for a whole tile by one instruction. Here
the threads that multiply share each tile: a warp asks for its own share of it when it finds that it
may, whatever the other warps do, and keeps its own words of how far it has come. Each thread tells
the tile's barrier when its own copies will have come, so that a barrier counts these threads
instead of bytes.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.asm import LANE, TID, Block, Register
from pallas_kernels.stream.ptx.swizzle import Lines

__all__ = ["WARP", "Parts", "write_copies", "write_prefetch"]

WARP = 32
# Copies of a thread between two looks whether any are left.
_UNROLLED = 4
# Bytes that a thread asks for into the L2 cache at once.
_LINE = 128


@dataclasses.dataclass(frozen=True)
class Parts:
    """Registers that say what is copied: parts of some bytes each.

    Attributes:
        source: address of the first part, a multiple of a copy's bytes.
        place: its address in shared memory, likewise.
        size: bytes of a part, likewise.
        policy: of the L2 cache.
        count: how many parts.
        step: bytes from a part to the next one, 64 bits.
        apart: bytes between their places.
    """

    source: Register
    place: Register
    size: Register
    policy: Register
    count: Register | int = 1
    step: Register | int = 0
    apart: Register | int = 0


def write_copies(
    b: Block, parts: Parts, threads: int, unit: int = 16, lines: Lines | None = None
) -> None:
    """Copies a thread's share of some parts; whole warps come here.

    Args:
        b: the text.
        parts: what is copied.
        threads: that share the parts: the program's first ones.
        unit: bytes of a copy, 16 or 8.
        lines: how the rows of a part, which is the only one then, lie at its place.
    """
    by, whole = unit * threads, unit * threads * _UNROLLED
    row, to, left = b.u32s("row", "to", "parts_left")
    own, rest, begin, at = b.s32("own"), b.s32("rest"), b.u64("begin"), b.u64("at")
    is_done, is_some = b.pred("is_done"), b.pred("is_some")
    copied = b.label("copied")

    b.comment("Thread t has the bytes from unit * t on, and every `threads`-th unit after them.")
    b.mov(own, TID)
    b.mul_lo(own, own, unit)
    b.widen(begin, own.as_("u32"))
    b.add(begin, begin, parts.source)
    b.add(row, parts.place, own)
    b.mov(left, parts.count)
    part = b.marked("part")
    b.setp("eq", is_done, left, 0)
    b.bra_if(is_done, copied)
    b.mov(at, begin)
    b.mov(to, row)
    b.sub(rest, parts.size, own)

    placed = by  # bytes from a copy's place to the thread's next one
    turned = lines is not None and by % (8 * lines.row_bytes) == 0
    byte, turn = b.u32("byte"), b.u32("turn")
    if lines is not None:
        b.mov(byte, own)
        b.shr(turn, parts.place, 7)
        if turned:
            b.comment("All of a thread's rows are turned alike.")
            placed = by // lines.row_bytes * lines.width
            _write_place(b, lines, to, byte, turn, parts.place)
    some = b.marked("some")
    for i in range(_UNROLLED):
        if lines is not None and not turned:
            placed = 0
            _write_place(b, lines, to, byte, turn, parts.place)
            b.add(byte, byte, by)
        b.setp("gt", is_some, rest, by * i)
        with b.when(is_some):
            b.cp_async(to + placed * i, at + by * i, unit, parts.policy)
    b.add(to, to, placed * _UNROLLED)
    b.add(at, at, whole)
    b.sub(rest, rest, whole)
    b.comment("The loop ends for all threads together: when the program's first one has no more.")
    b.add(own, own, rest)
    b.setp("gt", is_some, own, 0)
    b.sub(own, own, rest)
    b.bra_if(is_some, some)
    b.add(begin, begin, parts.step)
    b.add(row, row, parts.apart)
    b.sub(left, left, 1)
    b.bra(part)
    b.mark(copied)


def _write_place(
    b: Block, lines: Lines, to: Register, byte: Register, turn: Register, place: Register
) -> None:
    """Where a byte of a part's rows lies."""
    position, chunk, turned = b.u32s("position", "chunk", "turned")
    b.shr(position, byte, lines.row_bytes.bit_length() - 1)
    b.and_(chunk, byte, lines.row_bytes - 1)
    b.shr(chunk, chunk, 4)
    lines.write_place(b, to, position, chunk, turn, turned)
    b.add(to, to, place)


def write_prefetch(b: Block, source: Register, size: Register, most: int, asks: Register) -> None:
    """Asks for some bytes into the L2 cache; all threads of one warp come here.

    Args:
        b: the text.
        source: their address.
        size: how many there are.
        most: of them, at most.
        asks: predicate: whether any are asked for.
    """
    offset, rest, at, is_there = b.u32("offset"), b.s32("rest"), b.u64("at"), b.pred("is_there")
    b.mov(offset, LANE)
    b.mul_lo(offset, offset, _LINE)
    b.widen(at, offset)
    b.add(at, at, source)
    b.sub(rest, size, offset)
    for by in range(0, most, _LINE * WARP):
        b.setp("gt", is_there, rest, by, also=asks)
        with b.when(is_there):
            b.prefetch_l2(at + by)
