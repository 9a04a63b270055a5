"""Warps that dawdle at random, so that whoever does not wait for the right thing is found out."""

from __future__ import annotations

from typing import Any, Literal
from unittest import mock

from pallas_kernels.inline_ptx import lowered

__all__ = ["KINDS", "Kind", "dawdling"]

Kind = Literal["often", "long"]
KINDS: tuple[Kind, ...] = ("often", "long")

# A warp's clock, its number and its program's say whether it sleeps, and for how long. All threads
# of a warp that is whole agree.
_DRAW = (
    "{ .reg .b32 %zs, %zx; .reg .pred %zp; mov.u32 %zs, %clock; mov.u32 %zx, %tid.x; "
    "shr.u32 %zx, %zx, 5; mul.lo.u32 %zx, %zx, 0x9E3779B1; xor.b32 %zs, %zs, %zx; "
    "mov.u32 %zx, %ctaid.x; mul.lo.u32 %zx, %zx, 0x27D4EB2F; xor.b32 %zs, %zs, %zx; "
    "mul.lo.u32 %zs, %zs, 0x85EBCA6B; shr.u32 %zs, %zs, 8; "
)
_SLEEP: dict[Kind, str] = {
    # One time in 8, up to 2 us: the time of some hand-overs.
    "often": (
        "and.b32 %zx, %zs, 7; setp.eq.u32 %zp, %zx, 0; shr.u32 %zs, %zs, 8; "
        "and.b32 %zs, %zs, 0x7ff; @%zp nanosleep.u32 %zs; } "
    ),
    # One time in 512, 20 to 53 us: the time of a layer or two.
    "long": (
        "and.b32 %zx, %zs, 511; setp.eq.u32 %zp, %zx, 0; shr.u32 %zs, %zs, 9; "
        "and.b32 %zs, %zs, 0x7fff; add.u32 %zs, %zs, 20000; @%zp nanosleep.u32 %zs; } "
    ),
}
# Where a wait looks anew.
_LOOKS = ("again:", "early:", "look:")


def dawdling(kind: Kind = "often") -> Any:
    """Patches the lowering: steps traced meanwhile dawdle before every inline PTX, and every look.

    Args:
        kind: how often and how long.
    """
    original, sleep = lowered.assembly, _DRAW + _SLEEP[kind]

    def slower(results: Any, text: str, *rest: Any, **more: Any) -> Any:
        for label in _LOOKS:
            text = text.replace(label, f"{label} {sleep}")
        return original(results, sleep + text, *rest, **more)

    return mock.patch.object(lowered, "assembly", slower)
