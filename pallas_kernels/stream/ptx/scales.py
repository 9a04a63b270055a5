"""Scales of groups as numbers, and int4 weights as bytes: what all products of groups share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pallas_kernels.stream.ptx.integers import IntegerTile

__all__ = ["SIXTEENTH", "scale_lines", "scale_registers", "widened"]

# int4 weights are multiplied as 16 times what they stand for.
SIXTEENTH = "0f3D800000"
_EIGHT = "0f41000000"


def scale_registers(tile: IntegerTile) -> str:
    """Declares what `scale_lines` needs besides %s, %v and %w."""
    made = ""
    if tile.scales == "float16":
        made += ".reg .b16 %h, %h2; "
    if tile.offset is not None:
        made += ".reg .f32 %o; "
    return made


def scale_lines(tile: IntegerTile, word: str, high: bool = False) -> list[str]:
    """Puts a group's scale into %s, and its offset into %o, if there is one.

    The offset is what is added to s * (n - 8): s * (8 - z), or m + 8 * s.

    Args:
        tile: the tile.
        word: the register that holds the scale, in its low half, or where high in its high one; and
            where there is an offset what that is made of in its high half.
        high: see above.
    """
    if tile.offset is None:
        if tile.scales == "float16":
            halves = "{%h2, %h}" if high else "{%h, %h2}"
            return [f"mov.b32 {halves}, {word}; cvt.f32.f16 %s, %h;"]
        made = f"and.b32 %v, {word}, 0xFFFF0000;" if high else f"shl.b32 %v, {word}, 16;"
        return [f"{made} mov.b32 %s, %v;"]
    if tile.scales == "float16":
        lines = [f"mov.b32 {{%h, %h2}}, {word}; cvt.f32.f16 %s, %h; cvt.f32.f16 %o, %h2;"]
    else:
        lines = [
            f"shl.b32 %v, {word}, 16; mov.b32 %s, %v;",
            f"and.b32 %v, {word}, 0xFFFF0000; mov.b32 %o, %v;",
        ]
    if tile.offset == "zero":
        return [*lines, f"sub.rn.f32 %o, {_EIGHT}, %o; mul.rn.f32 %o, %o, %s;"]
    return [*lines, f"fma.rn.f32 %o, %s, {_EIGHT}, %o;"]


def widened(names: Sequence[str], raw: Sequence[str]) -> list[str]:
    """Of int4 weights n, words of bytes 16 * (n - 8): two for each raw one."""
    lines = []
    for i, word in enumerate(raw):
        low, high = names[2 * i : 2 * i + 2]
        # (x ^ 0x88888888) & 0xF0F0F0F0 is one instruction.
        lines.append(f"shl.b32 {low}, {word}, 4;")
        for to, x in ((low, low), (high, word)):
            lines.append(f"lop3.b32 {to}, {x}, 0x88888888, 0xF0F0F0F0, 0x28;")
    return lines
