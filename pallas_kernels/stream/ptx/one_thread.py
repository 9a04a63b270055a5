"""One thread of a program, so that ptxas knows that it is one.

A bulk copy takes operands that a warp has together. Where ptxas does not know that a single thread
of a warp asks, it writes a loop over those that might, with an election in each round, around every
copy: 63 loops in a step of Llama 3.1 8B in int4.
"""

from __future__ import annotations

from pallas_kernels.asm import LANE, Block, Register

__all__ = ["set_whether_another", "set_whether_lead"]


def set_whether_another(b: Block, to: Register, thread: Register, number: int) -> None:
    """Whether a thread is another than that of a number.

    Args:
        b: the text.
        to: the predicate.
        thread: `%tid.x`.
        number: the thread's.
    """
    b.setp("ne", to, thread, number)
    if not b.one_axis:
        is_other_lane = b.pred("is_other_lane")
        b.setp("ne", is_other_lane, _lane(b), number % 32)
        # `setp.ne.or` says the same, and ptxas does not see through it.
        b.or_(to, to, is_other_lane)


def set_whether_lead(b: Block, to: Register, thread: Register, number: int) -> None:
    """Whether a thread is that of a number, where its warp is that thread's; arguments as above."""
    if b.one_axis:
        b.setp("eq", to, thread, number)
    else:
        b.setp("eq", to, _lane(b), number % 32)


def _lane(b: Block) -> Register:
    lane = b.u32("lane_of_warp")
    b.comment("ptxas does not know how many axes there are: that lanes differ it does.")
    b.mov(lane, LANE)
    return lane
