"""Warps that dawdle at random, so that whoever does not wait for the right thing is found out."""

from __future__ import annotations

from typing import Any
from unittest import mock

from pallas_kernels.stream.ptx import lowered

__all__ = ["dawdling"]

# A warp's clock, its number and its program's say whether it sleeps, one time in 8, and for how
# long: up to 2 us, the time of some hand-overs. All threads of a warp that is whole agree.
_DAWDLE = (
    "{ .reg .b32 %zs, %zx; .reg .pred %zp; mov.u32 %zs, %clock; mov.u32 %zx, %tid.x; "
    "shr.u32 %zx, %zx, 5; mul.lo.u32 %zx, %zx, 0x9E3779B1; xor.b32 %zs, %zs, %zx; "
    "mov.u32 %zx, %ctaid.x; mul.lo.u32 %zx, %zx, 0x27D4EB2F; xor.b32 %zs, %zs, %zx; "
    "mul.lo.u32 %zs, %zs, 0x85EBCA6B; shr.u32 %zs, %zs, 12; and.b32 %zx, %zs, 7; "
    "setp.eq.u32 %zp, %zx, 0; shr.u32 %zs, %zs, 4; and.b32 %zs, %zs, 0x7ff; "
    "@%zp nanosleep.u32 %zs; } "
)


def dawdling() -> Any:
    """Patches the lowering: steps traced meanwhile dawdle before every inline PTX they run."""
    original = lowered.assembly

    def slower(results: Any, text: str, *rest: Any, **more: Any) -> Any:
        return original(results, _DAWDLE + text, *rest, **more)

    return mock.patch.object(lowered, "assembly", slower)
