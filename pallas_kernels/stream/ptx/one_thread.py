"""One thread of a program, so that ptxas knows that it is one.

A bulk copy takes operands that a warp has together. Where ptxas does not know that a single thread
of a warp asks, it writes a loop over those that might around every copy, with an election in each
round. That a number of `%tid.x` is one thread's it does not always find: unless it is told, there
may be other axes. That lanes differ it knows.

Which text is faster was measured: docs/lab/backends.md.
"""

from __future__ import annotations

from pallas_kernels.asm import LANE, Block, Register

__all__ = ["set_whether_another", "set_whether_lead"]


def set_whether_another(
    b: Block, to: Register, thread: Register, number: int, by_lane: bool
) -> None:
    """Whether a thread is another than that of a number.

    Args:
        b: the text.
        to: the predicate.
        thread: `%tid.x`.
        number: the thread's.
        by_lane: whether to say the same by lanes.
    """
    b.setp("ne", to, thread, number)
    if by_lane:
        lane, is_other_lane = b.u32("own_lane"), b.pred("is_other_lane")
        b.comment("Lanes say the same once more, for ptxas: one thread is left.")
        b.mov(lane, LANE)
        b.setp("ne", is_other_lane, lane, number % 32)
        # `setp.ne.or` says the same, and ptxas does not see through it.
        b.or_(to, to, is_other_lane)


def set_whether_lead(b: Block, to: Register, thread: Register, number: int, by_lane: bool) -> None:
    """Whether a thread of the warp of a number is that number's; the arguments are the same."""
    if by_lane:
        lane = b.u32("own_lane")
        b.mov(lane, LANE)
        b.setp("eq", to, lane, number % 32)
    else:
        b.setp("eq", to, thread, number)
