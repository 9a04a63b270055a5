"""Waiting for what copies bring."""

from __future__ import annotations

from jax import Array

from pallas_kernels.asm import Block, Register
from pallas_kernels.inline_ptx.operation import Operation

__all__ = ["wait_copies", "write_arrival"]


def write_arrival(b: Block, barrier: Register, phase: Register, most: int, bulk: bool) -> None:
    """Waits until a barrier's copies have arrived. Whole warps come here, and go on together.

    Args:
        b: the text.
        barrier: its address.
        phase: 0 the first time, then 1, 0 and so on.
        most: how often to look before the launch ends in an error.
        bulk: whether bulk copies bring it. Where they are, a look may last some microseconds.
    """
    come, lost = b.label("come"), b.label("lost")
    has_come, looks, too_many = b.pred("has_come"), b.u32("looks"), b.pred("too_many")

    def look() -> None:
        (b.mbarrier_try if bulk else b.mbarrier_test)(has_come, barrier, phase)
        b.vote_all(has_come, has_come)
        b.bra_if(has_come, come)

    b.comment("Compilers give other warps precedence at the head of a loop that may be waiting,")
    b.comment("25 ns a tile. So the first look, which nearly always succeeds, is not in the loop.")
    b.comment("Each thread has looked by itself: a warp votes, and goes on as one.")
    look()
    b.mov(looks, 0)
    again = b.marked("look")
    b.add(looks, looks, 1)
    b.setp("ge", too_many, looks, most)
    b.bra_if(too_many, lost)
    look()
    b.bra(again)
    b.mark(lost)
    b.trap()
    b.mark(come)


def _write_wait(b: Block, barrier: Register, phase: Register, *, most: int, bulk: bool) -> None:
    write_arrival(b, barrier, phase, most, bulk)
    b.warps_jump_whole = True


_wait_copies = Operation("ffjax_wait_copies", _write_wait)


def wait_copies(barrier: Array, phase: Array, most: int, bulk: bool) -> None:
    """Waits until a barrier's copies have arrived; ends the launch in an error if they do not.

    Args:
        barrier: int32 scalar, its address.
        phase: int32 scalar, 0 the first time, then 1, 0 and so on.
        most: how often to look.
        bulk: whether bulk copies bring it.
    """
    _wait_copies(barrier, phase, most=most, bulk=bulk)
