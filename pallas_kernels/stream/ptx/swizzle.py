"""Where the rows of a tile of keys, or of values, lie in shared memory.

Rows are cut into *lines* of 128 bytes, or shorter rows are such lines. The lines of all rows lie
one after the other, first the rows' first ones, then their second ones, and so on. All would
begin in the same bank of shared memory. So the 16-byte chunks of a line change places: chunk `x` of
a line lies at place `x ^ turn`, where the turn counts the 128 bytes of shared memory in which the
line begins. Chunks of neighbouring rows then lie in different banks. It is what a copy of a box
does that is told to (PTX: the swizzle modes of a tensor map).
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.asm import Block, Register

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
        tiles: where the first tile begins, bytes after the ring's address: whole banks.
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

    def write_turn(self, b: Block, turn: Register, ring: Register) -> None:
        """The turn of every tile's first line, counted on.

        All tiles begin alike, since their lines are some times 1024 bytes, or 512 of 64 each.

        Args:
            b: the text.
            turn: the result.
            ring: the ring's address.
        """
        b.add(turn, ring, self.tiles)
        b.shr(turn, turn, 7)

    def write_turned(self, b: Block, turn: Register, position: Register, first: Register) -> None:
        """The turn of a position's lines.

        Args:
            b: the text.
            turn: the result.
            position: in the tile, or its lowest 3 bits.
            first: what `write_turn` made.
        """
        rows = _BANKS // self.width  # side by side in all banks
        b.shr(turn, position, rows.bit_length() - 1)
        b.add(turn, turn, first)
        b.and_(turn, turn, self.width // CHUNK - 1)

    def write_place(
        self,
        b: Block,
        place: Register,
        position: Register,
        chunk: Register,
        first: Register,
        turned: Register,
    ) -> None:
        """Where a chunk of a position's row lies in a tile, bytes.

        Args:
            b: the text.
            place: the result; all registers differ.
            position: in the tile.
            chunk: of the row.
            first: what `write_turn` made.
            turned: what it is reckoned with.
        """
        chunks = self.width // CHUNK
        self.write_turned(b, turned, position, first)
        b.xor(turned, turned, chunk)
        b.and_(turned, turned, chunks - 1)
        b.shr(place, chunk, chunks.bit_length() - 1)
        b.mad_lo(place, place, self.block, position)
        b.mul_lo(place, place, self.width)
        b.mad_lo(place, turned, CHUNK, place)
