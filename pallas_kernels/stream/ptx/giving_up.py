"""What becomes of a wait that runs out: who waited says what is missing, and all leave.

A trap would take every array of the process with it. Instead a program that has looked in vain for
seconds leaves a record where every other sees it, takes NaN for what is missing, and goes on to the
end of its step; so does whoever else waits. Every number that depends on the missing one is NaN
then, the logits among them, and the record says why: see `pallas_kernels.stream.faults`.

A record is 64 bits, 0 where nothing is wrong. One hand-over that is missing keeps others waiting
for what depends on it; so everybody who leaves says what it missed, and the largest record stays,
which is that of the earliest place in the step: 20 bits of what is left of the stream, 32 bits of
how far before the end of the exchange the missing word lies, since buffers lie in the order in
which they are awaited, and 12 bits of the program's number.
"""

from __future__ import annotations

from typing import Any

from jax import Array

from pallas_kernels.asm import TID, Block, Label, Register
from pallas_kernels.inline_ptx.operation import Operation, Pointer
from pallas_kernels.stream.ptx.feed_state import Feed

__all__ = ["LOST", "Wait", "record_of", "said_by", "say_where"]

# Bits of the tiles that a program has used, and of its number.
_TILE_BITS, _PROGRAM_BITS = 20, 12
# Looks between two at the record: a wait lasts some looks, and a look some hundreds of ns.
_OFTEN = 1024
# What is taken for a missing word: NaN however it is read, and no token.
LOST = 0xFFFFFFFF
# Bytes from a feed's control words to the record's address, to the program's number, and to the
# tiles used. Where %ctaid was read instead, ptxas kept it in a register for the whole step, and
# spilled others: 5% of a step of 8B in int4.
_RECORD, _PROGRAM, _USED = 48, 56, 20


class Wait:
    """A wait for words, in a text: its looks, and what is done when there were too many."""

    def __init__(self, b: Block, ring: Register, feed: Feed, most: int):
        """Begins to count looks.

        Args:
            b: the text.
            ring: the ring's address.
            feed: where everything lies.
            most: how often to look, a power of two.
        """
        assert most & (most - 1) == 0, "Looks are counted by powers of two."
        self._b, self._ring, self._feed, self._most = b, ring, feed, most
        self._looks, self._record, self._said = b.u32("looks"), b.u64("record"), b.u64("said")
        self.missing, self.done = b.label("missing"), b.label("done")
        b.mov(self._looks, 0)

    def leave(self, found: Register, to: Label) -> None:
        """Leaves a look where a predicate says that the thread has what it looked for.

        The threads of a warp leave together, when the last one has. Threads that come out one by
        one are put together again at the next instruction of a warp, by code that stands far away,
        and run what lies between once for each of them: half a microsecond in front of every
        product.
        """
        self._b.vote_all(found, found)
        self._b.bra_if(found, to)

    def look_again(self, again: Label) -> None:
        """After a look in vain: looks again, from a label on.

        Goes on to what follows when it has looked for too long; or to `missing`, where `give_up`
        is, if somebody else has.
        """
        b = self._b
        since, few, gone, left = b.u32("since"), b.pred("few"), b.pred("gone"), b.pred("has_looks")
        b.add(self._looks, self._looks, 1)
        b.and_(since, self._looks, min(self._most, _OFTEN) - 1)
        b.setp("ne", few, since, 0)
        b.bra_if(few, again)
        b.comment("Has anybody given up? A warp looks as long as any of its threads does.")
        b.ld_shared(self._record, self._ring + (self._feed.control + _RECORD))
        b.ld_relaxed(self._said, self._record)
        b.setp("ne", gone, self._said, 0)
        b.vote_any(gone, gone)
        b.bra_if(gone, self.missing)
        b.setp("lt", left, self._looks, self._most)
        b.bra_if(left, again)

    def give_up(self, word: Register, left: Register) -> None:
        """After `look_again`: says what is missing, and goes on; `missing` stands here.

        Args:
            word: address of a word that has not come.
            left: 0 where nothing is missing: then the thread goes on at `done`.
        """
        b, f = self._b, self._feed
        nothing, before = b.pred("nothing"), b.s64("distance")
        low, high, part, program = b.u32s("record_low", "record_high", "record_part", "program")
        b.comment("Threads that miss nothing have looked on with others of their warp.")
        b.setp("eq", nothing, left, 0)
        b.bra_if(nothing, self.done)
        b.comment(
            "20 bits of tiles left, 32 of words before the exchange's end, 12 of the program."
        )
        b.sub(before, word, self._record)
        b.shr(before, before, 2)
        b.narrow(low, before.as_("u64"))
        b.ld_shared(high, self._ring + (f.control + _USED))
        b.sub(high, (1 << _TILE_BITS) - 1, high)
        b.shl(high, high, _PROGRAM_BITS)
        b.not_(low, low)
        b.shr(part, low, 32 - _PROGRAM_BITS)
        b.or_(high, high, part)
        b.shl(low, low, _PROGRAM_BITS)
        b.ld_shared(program, self._ring + (f.control + _PROGRAM))
        b.or_(low, low, program)
        b.pack(self._said, low, high)
        b.atom_max(self._said, self._record, self._said)


def record_of(used: int, distance: int, program: int) -> int:
    """The record of a program that misses a word.

    Args:
        used: tiles of the stream that it has used.
        distance: words from the record to the missing one, above 0.
        program: its number.
    """
    left, before = (1 << _TILE_BITS) - 1 - used, 0xFFFFFFFF - distance
    return (left << (32 + _PROGRAM_BITS)) | (before << _PROGRAM_BITS) | program


def said_by(record: int) -> tuple[int, int, int]:
    """The inverse of `record_of`: tiles used, distance, program."""
    left, before = record >> (32 + _PROGRAM_BITS), (record >> _PROGRAM_BITS) & 0xFFFFFFFF
    program = record & ((1 << _PROGRAM_BITS) - 1)
    return (1 << _TILE_BITS) - 1 - left, 0xFFFFFFFF - before, program


def _write_where(b: Block, record: Register, control: Register, program: Register) -> None:
    thread, first = b.u32("thread"), b.pred("first")
    b.mov(thread, TID)
    b.setp("eq", first, thread, 0)
    with b.when(first):
        b.st_shared(control + _RECORD, record)
        b.st_shared(control + _PROGRAM, program)


_say_where = Operation("ffjax_say_where", _write_where)


def say_where(words: Any, offset: Array | int, control: Array, program: Array) -> None:
    """Puts the record's address, and the program's number, where waits look for them.

    Args:
        words: int32 array that holds the record.
        offset: int32 scalar, where in the array, an even number.
        control: int32 scalar, address of a feed's control words in shared memory.
        program: int32 scalar.
    """
    _say_where(Pointer(words, offset), control, program)
