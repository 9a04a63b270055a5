"""What a kernel's body does to arrays and to its threads, whichever compiler takes it."""

from __future__ import annotations

from pallas_kernels.inline_ptx import lowered
from pallas_kernels.primitives import ORDERED, effectful, load, store

__all__ = ["load", "meet", "store"]

_meet_p = effectful("ffjax_meet", lambda: ([], {ORDERED}))


@lowered.rule(_meet_p)
def _(ctx):
    lowered.barrier()
    return []


def meet() -> None:
    """Waits for the program's other threads; what they wrote to shared memory is there then."""
    _meet_p.bind()
