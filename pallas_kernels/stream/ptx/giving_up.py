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

import jax.numpy as jnp
from jax import Array
from jax._src import core, state

from pallas_kernels.stream.ptx import lowered
from pallas_kernels.stream.ptx.feed import Feed

__all__ = [
    "LOST",
    "REGISTERS",
    "give_up",
    "leave_line",
    "look_again",
    "record_of",
    "said_by",
    "say_where",
]

# Bits of the tiles that a program has used, and of its number.
_TILE_BITS, _PROGRAM_BITS = 20, 12
# Looks between two at the record: a wait lasts some looks, and a look some hundreds of ns.
_OFTEN = 1024
# What the texts below want declared, besides a predicate %p and a counter of looks %n.
REGISTERS = ".reg .b64 %record, %said; .reg .b32 %often, %used;"
# What is taken for a missing word: NaN however it is read, and no token.
LOST = "0xFFFFFFFF"
# Bytes from a feed's control words to the record's address, to the program's number, and to the
# tiles used. Where %ctaid was read instead, ptxas kept it in a register for the whole step, and
# spilled others: 5% of a step of 8B in int4.
_RECORD, _PROGRAM, _USED = 48, 56, 20


def leave_line(to: str) -> str:
    """Leaves a look where %p says that the thread has what it looked for.

    The threads of a warp leave together, when the last one has. Threads that come out one by one
    are put together again at the next instruction of a warp, by code that stands far away, and
    run what lies between once for each of them: half a microsecond in front of every product.
    """
    return f"vote.sync.all.pred %p, %p, 0xffffffff; @%p bra {to};"


def look_again(label: str, ring: str, feed: Feed, most: int) -> list[str]:
    """Behind a look in vain: looks again.

    Goes on to what follows when it has looked for too long; or to `missing`, where
    `give_up` is, if somebody else has.

    Args:
        label: where a look begins.
        ring: the ring's address.
        feed: where everything lies.
        most: how often to look, a power of two.
    """
    assert most & (most - 1) == 0, "Looks are counted by powers of two."
    return [
        f"add.u32 %n, %n, 1; and.b32 %often, %n, {min(most, _OFTEN) - 1};",
        f"setp.ne.u32 %p, %often, 0; @%p bra {label};",
        f"ld.shared.b64 %record, [{ring}+{feed.control + _RECORD}];",
        "ld.relaxed.gpu.global.b64 %said, [%record]; setp.ne.b64 %p, %said, 0;",
        # A warp looks as long as any of its threads does.
        "vote.sync.any.pred %p, %p, 0xffffffff; @%p bra missing;",
        f"setp.lt.u32 %p, %n, {most}; @%p bra {label};",
    ]


def give_up(missing: str, ring: str, feed: Feed) -> list[str]:
    """Behind `look_again`: says what is missing.

    Args:
        missing: register with the address of a word that has not come. Where nothing is missing,
            the text's %left is 0, and it goes on at `done`.
        ring: the ring's address.
        feed: where everything lies.
    """
    return [
        # Threads that miss nothing have looked on with others of their warp.
        "setp.eq.u32 %p, %left, 0; @%p bra done;",
        f"sub.s64 %said, {missing}, %record; shr.s64 %said, %said, 2;",
        f"cvt.u32.u64 %often, %said; ld.shared.b32 %used, [{ring}+{feed.control + _USED}];",
        f"sub.u32 %used, {(1 << _TILE_BITS) - 1}, %used; shl.b32 %used, %used, {_PROGRAM_BITS};",
        f"not.b32 %often, %often; shr.u32 %n, %often, {32 - _PROGRAM_BITS};",
        f"or.b32 %used, %used, %n; shl.b32 %often, %often, {_PROGRAM_BITS};",
        f"ld.shared.b32 %n, [{ring}+{feed.control + _PROGRAM}]; or.b32 %often, %often, %n;",
        "mov.b64 %said, {%often, %used};",
        "atom.relaxed.gpu.global.max.u64 %said, [%record], %said;",
    ]


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


_say_where_p = core.Primitive("ffjax_say_where")


@_say_where_p.def_effectful_abstract_eval
def _(words, offset, control, program):
    return core.ShapedArray((1,), jnp.int32), {lowered.ORDERED, state.ReadEffect(0)}


@lowered.rule(_say_where_p)
def _(ctx, words, *args):
    offset, control, program = lowered.values(ctx, args)
    text = (
        "{ .reg .pred %p; .reg .b32 %t; mov.u32 %t, %tid.x; setp.eq.u32 %p, %t, 0;"
        f" @%p st.shared.b64 [$2+{_RECORD}], $1; @%p st.shared.b32 [$2+{_PROGRAM}], $3;"
        " mov.u32 $0, 0; }"
    )
    arguments = [lowered.addresses(words, offset, (1,)), control, program]
    return lowered.assembly([lowered.like((1,), lowered.i32())], text, "=r,l,r,r", arguments)[0]


def say_where(words: Any, offset: Array | int, control: Array, program: Array) -> None:
    """Puts the record's address, and the program's number, where waits look for them.

    Args:
        words: int32 array that holds the record.
        offset: int32 scalar, where in the array, an even number.
        control: int32 scalar, address of a feed's control words in shared memory.
        program: int32 scalar.
    """
    numbers = (jnp.full((1,), x, jnp.int32) for x in (offset, control, program))
    _say_where_p.bind(words, *numbers)
