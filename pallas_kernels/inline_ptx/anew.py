"""Numbers that the compiler takes for new ones.

What does not change within a loop, the compiler computes once before it and keeps. Of a whole model
those are more addresses than there are registers: it kept some in memory, 72 bytes a thread of
llama3.1-8b in int4 with 8 sequences. It is cheaper to compute them where they are used.
"""

from __future__ import annotations

from jax import Array

from pallas_kernels.asm import Block, Register
from pallas_kernels.inline_ptx.operation import Operation

__all__ = ["ANEW", "anew"]

# The operation's name.
ANEW = "ffjax_anew"


def _write_anew(b: Block, same: Register, number: Register) -> None:
    b.mov(same, number)


_anew = Operation(ANEW, _write_anew)


def anew(x: Array) -> Array:
    """The same numbers. What is computed from them is computed after this, each time anew.

    Args:
        x: int32, any shape.
    """
    return _anew(x, results=["int32"], early=False)[0]
