"""Waiting for what copies bring."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax._src import core

from pallas_kernels.stream.ptx import lowered

__all__ = ["arrival_lines", "wait_copies"]


def arrival_lines(barrier: str, phase: str, most: int, bulk: bool) -> list[str]:
    """Waits until a barrier's copies have arrived; %p and %looks are the text's to use.

    Whole warps come here, look, and go on together: each thread has looked by itself, so they
    vote. The first look stands before the loop: compilers give other warps precedence at the
    head of a loop that may be waiting, which costs each tile 25 ns, though the first look
    nearly always sees it come.

    Args:
        barrier: its address.
        phase: 0 the first time, then 1, 0 and so on.
        most: how often to look before the launch ends in an error.
        bulk: whether bulk copies bring it. Where they are, a look may last some microseconds.
    """
    wait = "try_wait" if bulk else "test_wait"
    look = (
        f"mbarrier.{wait}.parity.shared::cta.b64 %p, [{barrier}], {phase}; "
        "vote.sync.all.pred %p, %p, 0xffffffff; @%p bra come;"
    )
    return [
        f"{look} mov.u32 %looks, 0;",
        f"look: add.u32 %looks, %looks, 1; setp.ge.u32 %p, %looks, {most}; @%p bra lost;",
        f"{look} bra look; lost: trap; come:",
    ]


_wait_copies_p = core.Primitive("ffjax_wait_copies")


@_wait_copies_p.def_effectful_abstract_eval
def _(barrier, phase, *, most, bulk):
    return core.ShapedArray((1,), jnp.int32), {lowered.ORDERED}


@lowered.rule(_wait_copies_p)
def _(ctx, barrier, phase, *, most, bulk):
    lines = arrival_lines("$1", "$2", most, bulk)
    text = " ".join(["{ .reg .pred %p; .reg .b32 %looks;", *lines, "mov.u32 $0, 0; }"])
    result, arguments = lowered.like((1,), lowered.i32()), lowered.values(ctx, [barrier, phase])
    return lowered.assembly([result], text, "=r,r,r", arguments, by_warps=True)[0]


def wait_copies(barrier: Array, phase: Array, most: int, bulk: bool) -> None:
    """Waits until a barrier's copies have arrived; ends the launch in an error if they do not.

    Args:
        barrier: int32 scalar, its address.
        phase: int32 scalar, 0 the first time, then 1, 0 and so on.
        most: how often to look.
        bulk: whether bulk copies bring it.
    """
    options = {"most": most, "bulk": bulk}
    _wait_copies_p.bind(jnp.full((1,), barrier), jnp.full((1,), phase), **options)
