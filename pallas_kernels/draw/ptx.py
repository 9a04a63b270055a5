"""What the kernel that draws does in PTX: a meeting of the programs of a row.

The compiler's own sums over a program's threads take a round through shared memory and two barriers
each, and a meeting would need a dozen. Here it has two barriers in all.

A meeting has `SLOTS` slots. A slot holds 62 bits: how many tokens lie above a place and what they
sum up to (`COUNT_AT`), which are added up, or a token with its noise, of which the greatest stays.
The last slots hold tokens.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.asm import TID, Block, Register
from pallas_kernels.inline_ptx import lowered
from pallas_kernels.inline_ptx.operation import Operation, Pointer
from pallas_kernels.primitives import ORDERED, effectful, made

__all__ = ["COUNT_AT", "SLOTS", "TAG_BITS", "TOKEN_BITS", "look", "reserve", "tell", "told"]

# Slots of a meeting, a power of two: of 8 bytes each, a program's fill two sectors of memory.
SLOTS = 8
# A count lies above so many bits of a mass: V masses sum up to less (`pallas_kernels.draw.mass`).
COUNT_AT = 45
# A word's low bits say which meeting it belongs to; 62 bits are left.
TAG_BITS = 2
# Of these a token takes so many, turned round so that of equals the lowest is the greatest.
TOKEN_BITS = 30

_SLOT_BYTES = 8
_LAST_TOKEN = 2**TOKEN_BITS - 1
_LANES = 32
# Lanes of a warp that hold the same slot.
_ALIKE = range(_LANES // SLOTS)

_reserve_p = effectful(
    "ffjax_draw_reserve", lambda x, **_: (made(x.shape, jnp.int32), {ORDERED}), results=False
)


@lowered.rule(_reserve_p)
def _(ctx, x, *, size):
    text = f".shared .align 16 .b8 ffjax_draw_slots[{size}]; mov.u32 $0, ffjax_draw_slots;"
    result, arguments = (
        lowered.like(ctx.avals_out[0].shape, lowered.i32()),
        lowered.values(ctx, [x]),
    )
    return lowered.assembly([result], text, "=r,r", arguments)[0]


def reserve(warps: int) -> Array:
    """Shared memory for a program's meetings: its address, int32 `[1]`.

    To be called once in a kernel, and outside of what may run twice.

    Args:
        warps: of the program.
    """
    return _reserve_p.bind(jnp.zeros((1,), jnp.int32), size=2 * warps * SLOTS * _SLOT_BYTES)


_Each = list[Register]
"""Of an operand, or a result, a register for each of a thread's tokens."""


def _write_look(
    b: Block, nothing: _Each, *given: _Each, places: int, best: bool, winners: int
) -> None:
    """Operands: logits, masses, places, noisy logits, tokens, the address."""
    logits, masses, *rest = given
    levels, address = rest[:places], rest[-1][0]
    noisy, tokens = rest[places : places + 2] if best else ([], [])
    ahead = range(places - winners, places)
    b.warps_jump_whole = True  # whole warps do
    # Of each place: the sum of what lies above it, how many tokens that are, and of the last places
    # the greatest number with noise among them, and its token.
    sums, counts = ([b.u32(name) for _ in range(SLOTS)] for name in ("sum", "count"))
    greatest, its_token = ([b.s32(name) for _ in range(SLOTS)] for name in ("top", "top_token"))
    slots = [b.u64("slot") for _ in range(SLOTS)]
    low, high, place, word, count = b.u32s("low", "high", "place", "word", "count")
    ordered, token = b.s32("ordered"), b.u32("token")
    number, least = b.f32s("number", "least")
    one, other, found = b.u64("one"), b.u64("other"), b.u64("found")
    above, is_ahead = b.pred("above"), b.pred("is_ahead")
    for word_of in nothing:
        b.mov(word_of, 0)
    for i in range(places):
        b.mov(sums[i], 0)
        b.mov(counts[i], 0)
    for i in ahead:
        b.mov(greatest[i], 1 << 31)
        b.mov(its_token[i], 0)
    b.mov(found, 0)
    if places:
        b.mov(least, levels[0][0])
        for level in levels[1:]:
            b.min(least, least, level[0].as_("f32"))

    for i, logit in enumerate(logits):
        over = b.label("over")
        if places:
            b.comment("A warp of which no token lies above any place goes on to its next ones.")
            b.setp("gt", above, logit.as_("f32"), least)
            b.vote_any(above, above)
            b.bra_unless(above, over)
        if best:
            b.comment("As an integer that is ordered alike; -0 is 0.")
            b.mov(number, noisy[i])
            b.add(number, number, 0.0)
            b.mov(ordered, number)
            b.shr(token.as_("s32"), ordered, 31)
            b.and_(token, token, 0x7FFFFFFF)
            b.xor(ordered, ordered, token)
        for j, level in enumerate(levels):
            b.setp("gt", above, logit.as_("f32"), level[0].as_("f32"))
            with b.when(above):
                b.add(sums[j], sums[j], masses[i])
                b.add(counts[j], counts[j], 1)
            if j in ahead:
                b.comment("Of equals the first one stays: a thread's tokens come by their numbers.")
                b.setp("gt", is_ahead, ordered, greatest[j], also=above)
                with b.when(is_ahead):
                    b.mov(greatest[j], ordered)
                    b.mov(its_token[j], tokens[i])
        if best and not winners:
            b.xor(ordered, ordered, 0x80000000)
            b.sub(token, _LAST_TOKEN, tokens[i])
            b.pack(other, token, ordered)
            b.max(found, found, other)
        b.mark(over)

    def put(slot: Register) -> None:
        """Of a warp's numbers the greatest, and its token."""
        is_greatest = b.pred("is_greatest")
        b.redux_max(word, ordered)
        b.setp("eq", is_greatest, word, ordered)
        b.selp(token, token, 0, is_greatest)
        b.redux_max(token, token)
        b.widen(one, word)
        b.shl(one, one, TOKEN_BITS)
        b.widen(other, token)
        b.or_(slot, one, other)

    b.comment("A thread's sum has 32 bits; its halves are summed apart, the upper with the count.")
    for j in range(places):
        b.and_(low, sums[j], 65535)
        b.shr(high, sums[j], 16)
        b.shl(count, counts[j], 21)
        b.add(high, high, count)
        b.redux_add(low, low)
        b.redux_add(high, high)
        b.shr(count, high, 21)
        b.and_(high, high, 2097151)
        b.widen(one, low)
        b.mul_wide(other, high, 65536)
        b.add(one, one, other)
        b.widen(other, count)
        b.shl(other, other, COUNT_AT)
        b.add(slots[j], one, other)
    for slot in slots[places:]:
        b.mov(slot, 0)
    if best and not winners:
        b.unpack(token, ordered, found)
        put(slots[-1])
    for slot, j in zip(slots[SLOTS - winners :], ahead, strict=True):
        b.xor(ordered, greatest[j], 0x80000000)
        b.sub(token, _LAST_TOKEN, its_token[j])
        put(slot)
    lane, is_first = count, b.pred("is_first")
    b.mov(word, TID)
    b.and_(lane, word, 31)
    b.shr(word, word, 5)
    b.mad_lo(place, word, SLOTS * _SLOT_BYTES, address)
    b.setp("eq", is_first, lane, 0)
    with b.when(is_first):
        for i in range(0, SLOTS, 2):
            b.st_shared(place + i * _SLOT_BYTES, slots[i : i + 2])


_look = Operation("ffjax_draw_look", _write_look)


def _bits(x: Array) -> Array:
    return x if x.dtype == jnp.int32 else lax.bitcast_convert_type(x, jnp.int32)


def look(
    logits: Array,
    mass: Array,
    places: list[Array],
    best: tuple[Array, Array] | None,
    winners: int,
    shared: Array,
    together: int,
) -> None:
    """Puts what each warp finds in its tokens into shared memory.

    Args:
        logits: float32 `[1, W]`.
        mass: int32 `[1, W]`: what a thread's sum up to has 32 bits.
        places: float32 scalars, at most `SLOTS`: their slots are the first ones.
        best: logits with noise, float32 `[1, W]`, and tokens, int32 `[1, W]`; of the greatest the
            token goes to the last slot, a NaN being greater than all else. Where there are places,
            those whose logits lie beneath all of them may be left out.
        winners: 0; or of how many of the last places the greatest above each is wanted, which go to
            as many slots. Then none is NaN.
        shared: from `reserve`.
        together: tokens that a thread has.
    """
    shape = logits.shape
    arrays = [logits, mass, *places, *(best or ()), jnp.sum(shared)]
    arrays = [_bits(jnp.broadcast_to(x, shape)) for x in arrays]
    options = {"places": len(places), "best": best is not None, "winners": winners}
    _look(*arrays, results=["int32"], together=together, **options)


class _Meeting:
    """What `tell` and `told` begin with; `best` slots, the last ones, hold a token."""

    def __init__(self, b: Block, best: int):
        self.b, self.best = b, best
        # A thread's number, lane and warp; an address; and words that are soon done with.
        self.thread, self.lane, self.warp, self.place = b.u32s("thread", "lane", "warp", "place")
        self.word, self.other_word, self.some = b.u32s("word", "other_word", "some")
        # Slots: what is joined, and others.
        self.joined, self.other, self.larger = b.u64("joined"), b.u64("other"), b.u64("larger")
        self.last, self.is_there = b.pred("last"), b.pred("is_there")

    def begin(self) -> None:
        """A thread's lane, its warp, and whether its slot holds a token."""
        b = self.b
        b.mov(self.thread, TID)
        b.and_(self.lane, self.thread, 31)
        b.shr(self.warp, self.thread, 5)
        b.and_(self.word, self.lane, SLOTS - 1)
        b.setp("ge", self.last, self.word, SLOTS - self.best)

    def join(self, other: Register) -> None:
        """Adds a slot up; in the last ones, the greatest stays."""
        b, value = self.b, self.joined
        if not self.best:
            b.add(value, value, other)
            return
        b.max(self.larger, value, other)
        b.add(value, value, other)
        with b.when(self.last):
            b.mov(value, self.larger)

    def join_lanes(self) -> None:
        """The same over lanes that hold the same slot."""
        b = self.b
        for by in (8, 16):
            b.unpack(self.word, self.other_word, self.joined)
            b.shfl_bfly(self.word, self.word, by)
            b.shfl_bfly(self.other_word, self.other_word, by)
            b.pack(self.other, self.word, self.other_word)
            self.join(self.other)

    def join_warps(self, address: Register, warps: int) -> None:
        """What so many warps have put at an address, joined: of each lane's slot."""
        b, number = self.b, self.word
        b.mov(self.joined, 0)
        b.shr(number, self.lane, 3)
        b.mad_lo(self.place, self.lane, _SLOT_BYTES, address)
        for first in range(0, warps, len(_ALIKE)):
            at = self.place + first * SLOTS * _SLOT_BYTES
            if first + len(_ALIKE) <= warps:
                b.ld_shared(self.other, at)
            else:
                b.setp("lt", self.is_there, number, warps - first)
                b.mov(self.other, 0)
                with b.when(self.is_there):
                    b.ld_shared(self.other, at)
            self.join(self.other)
        self.join_lanes()


def _write_tell(
    b: Block,
    nothing: Register,
    shared: Register,
    board: Register,
    place: Register,
    tag: Register,
    *,
    warps: int,
    best: int,
) -> None:
    m, idle, is_other = _Meeting(b, best), b.label("idle"), b.pred("is_other")
    b.warps_jump_whole = True  # whole warps do
    m.begin()
    b.mov(nothing, 0)
    b.bar_sync()
    b.setp("ne", is_other, m.warp, 0)
    b.bra_if(is_other, idle)
    m.join_warps(shared, warps)
    b.shl(m.joined, m.joined, TAG_BITS)
    b.widen(m.other, tag.as_("u32"))
    b.or_(m.joined, m.joined, m.other)
    b.mad_lo(m.word, m.lane, _SLOT_BYTES, place)
    b.widen(m.other, m.word)
    b.add(m.other, m.other, board)
    b.setp("lt", m.is_there, m.lane, SLOTS)
    with b.when(m.is_there):
        b.st_relaxed(m.other, m.joined)
    b.mark(idle)


_tell = Operation("ffjax_draw_tell", _write_tell)


def tell(board: Any, shared: Array, place: Array, tag: Array, warps: int, best: int) -> None:
    """Writes what `look` has found to the board.

    Args:
        board: int32 array.
        shared: from `reserve`.
        place: int32 scalar, bytes from the board's beginning to this program's words.
        tag: int32 scalar, of this meeting; not 0.
        warps: of the program.
        best: slots that hold a token, the last ones.
    """
    operands = shared, Pointer(board, written=True), place, tag
    _tell(*operands, results=["int32"], warps=warps, best=best)


def _write_told(
    b: Block,
    count: Register,
    mass: Register,
    token: Register,
    slot: Register,
    shared: Register,
    board: Register,
    place: Register,
    tag: Register,
    *,
    warps: int,
    parts: int,
    best: int,
    most: int,
) -> None:
    threads, words = warps * _LANES, parts * SLOTS
    rounds, first = -(-words // threads), warps * SLOTS * _SLOT_BYTES
    m, at, come = _Meeting(b, best), b.u64("at"), b.label("come")
    reads, has_come, too_many = b.pred("reads"), b.pred("has_come"), b.pred("too_many")
    got, number = [b.u64("got") for _ in range(rounds)], b.f32("number")
    b.warps_jump_whole = True  # whole warps do
    m.begin()
    looks, tag_of = m.some, m.larger
    b.mov(looks, 0)
    b.mad_lo(m.word, m.thread, _SLOT_BYTES, place)
    b.widen(at, m.word)
    b.add(at, at, board)
    b.widen(tag_of, tag.as_("u32"))
    for word in got:
        b.mov(word, tag_of)
    b.comment("Each thread reads some of the row's words, until all carry the meeting's tag.")
    b.setp("lt", reads, m.thread, words)
    again = b.marked("again")
    with b.when(reads):
        for j, word in enumerate(got):
            b.ld_relaxed(word, at + j * threads * _SLOT_BYTES)
    b.mov(m.other, 0)
    for word in got:
        b.xor(m.joined, word, tag_of)
        b.or_(m.other, m.other, m.joined)
    b.and_(m.other, m.other, 2**TAG_BITS - 1)
    b.setp("eq", has_come, m.other, 0)
    b.bra_if(has_come, come)
    b.add(looks, looks, 1)
    b.setp("gt", too_many, looks, most)
    with b.when(too_many):
        b.trap()
    b.bra(again)
    b.mark(come)
    b.bar_warp()
    b.shr(m.joined, got[0], TAG_BITS)
    for word in got[1:]:
        b.shr(at, word, TAG_BITS)
        m.join(at)
    reading = min(warps, -(-words // _LANES))
    m.join_lanes()
    b.comment("Each warp puts what it has found beside the others'; then all is joined.")
    b.mad_lo(m.place, m.thread, _SLOT_BYTES, shared)
    b.mul_lo(m.word, m.warp, (_LANES - SLOTS) * _SLOT_BYTES)
    b.sub(m.place, m.place, m.word)
    b.setp("lt", m.is_there, m.lane, SLOTS)
    with b.when(m.is_there):
        b.st_shared(m.place + first, m.joined)
    b.bar_sync()
    b.add(m.other_word, shared, first)
    m.join_warps(m.other_word, reading)
    b.comment("From the lane that has it to each that asks.")
    b.unpack(m.word, m.other_word, m.joined)
    b.shfl_idx(m.word, m.word, slot)
    b.shfl_idx(m.other_word, m.other_word, slot)
    b.and_(m.some, m.word, _LAST_TOKEN)
    b.sub(token, _LAST_TOKEN, m.some)
    b.pack(m.joined, m.word, m.other_word)
    b.shr(m.other, m.joined, COUNT_AT)
    b.narrow(count.as_("u32"), m.other)
    b.and_(m.joined, m.joined, 2**COUNT_AT - 1)
    b.to_float(number, m.joined)
    b.mov(mass, number)


_told = Operation("ffjax_draw_told", _write_told)


def told(
    board: Any,
    shared: Array,
    place: Array,
    tag: Array,
    warps: int,
    parts: int,
    best: int,
    most: int,
) -> tuple[Array, Array, Array]:
    """What all programs of the row have told, joined.

    Args:
        board: int32 array.
        shared: from `reserve`.
        place: int32 scalar, bytes from the board's beginning to the row's words of this meeting.
        tag: int32 scalar, of this meeting; not 0.
        warps: of the program.
        parts: of the row.
        best: slots that hold a token, the last ones.
        most: how often to look before the launch ends in an error.

    Returns:
        Counts, int32 `[SLOTS]`; sums of masses, in their units, float32 `[SLOTS]`; tokens, int32
        `[SLOTS]`. Each means something in its own slots.
    """
    shape = (SLOTS,)
    slot = lax.broadcasted_iota(jnp.int32, shape, 0)
    counts, masses, token = _told(
        *(slot, jnp.sum(shared), Pointer(board), place, tag),
        results=["int32"] * 3,
        warps=warps,
        parts=parts,
        best=best,
        most=most,
    )
    return counts, lax.bitcast_convert_type(masses, jnp.float32), token
