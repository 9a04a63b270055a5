"""Where the rows of a tile of keys, or of values, lie in shared memory.

Rows are cut into *lines* of 128 bytes, or shorter rows are such lines. The lines of all rows lie
one behind the other, first the rows' first ones, then their second ones, and so on. All would
begin in the same bank of shared memory. So the 16-byte chunks of a line change places: chunk `x` of
a line lies at place `x ^ turn`, where the turn counts the 128 bytes of shared memory in which the
line begins. Chunks of neighbouring rows then lie in different banks. It is what a copy of a box
does that is told to (PTX: the swizzle modes of a tensor map).
"""

from __future__ import annotations

import dataclasses

__all__ = ["CHUNK", "Lines", "swizzled"]

# Bytes that keep together, and after which banks repeat.
CHUNK, _BANKS = 16, 128


def swizzled(address: int, width: int) -> int:
    """Where a byte lies that would lie at an address of shared memory.

    Args:
        address: in shared memory.
        width: of a line, bytes: 128 or 64.
    """
    return address ^ (address // _BANKS % (width // CHUNK)) * CHUNK


@dataclasses.dataclass(frozen=True)
class Lines:
    """The lines of a tile's keys, or of its values.

    Attributes:
        row_bytes: of a key, a power of two from 64 on.
        block: positions of a tile, a multiple of 8.
        tiles: where the first tile begins, bytes behind the ring's address: whole banks.
    """

    row_bytes: int
    block: int
    tiles: int

    @property
    def width(self) -> int:
        """Bytes of a line."""
        return min(self.row_bytes, _BANKS)

    @property
    def count(self) -> int:
        """Lines of a row."""
        return self.row_bytes // self.width

    @property
    def mode(self) -> int:
        """The swizzle mode of a tensor map, as PTX's `tensormap.replace` numbers them."""
        return {64: 2, 128: 3}[self.width]

    def turn(self, turn: str, ring: str) -> list[str]:
        """The turn of every tile's first line, counted on: registers' names.

        All tiles begin alike, since their lines are some times 1024 bytes, or 512 of 64 each.

        Args:
            turn: the result.
            ring: the ring's address.
        """
        return [f"add.u32 {turn}, {ring}, {self.tiles}; shr.u32 {turn}, {turn}, 7;"]

    def turned(self, turn: str, position: str, first: str) -> list[str]:
        """The turn of a position's lines: registers' names.

        Args:
            turn: the result.
            position: in the tile, or its lowest 3 bits.
            first: what `turn` made.
        """
        rows = _BANKS // self.width  # side by side in all banks
        return [
            f"shr.u32 {turn}, {position}, {rows.bit_length() - 1};",
            f"add.u32 {turn}, {turn}, {first};",
            f"and.b32 {turn}, {turn}, {self.width // CHUNK - 1};",
        ]

    def place(self, place: str, position: str, chunk: str, first: str, spare: str) -> list[str]:
        """Where a chunk of a position's row lies in a tile, bytes: registers' names, all different.

        Args:
            place: the result.
            position: in the tile.
            chunk: of the row.
            first: what `turn` made.
            spare: what it is reckoned with.
        """
        chunks = self.width // CHUNK
        return [
            *self.turned(spare, position, first),
            f"xor.b32 {spare}, {spare}, {chunk}; and.b32 {spare}, {spare}, {chunks - 1};",
            f"shr.u32 {place}, {chunk}, {chunks.bit_length() - 1};",
            f"mad.lo.u32 {place}, {place}, {self.block}, {position};",
            f"mul.lo.u32 {place}, {place}, {self.width};",
            f"mad.lo.u32 {place}, {spare}, {CHUNK}, {place};",
        ]
