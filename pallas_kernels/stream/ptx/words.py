"""Words that other programs write or read in the same launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.asm import Block, Register
from pallas_kernels.inline_ptx.operation import Choice, Operation, Pointer
from pallas_kernels.stream import access
from pallas_kernels.stream.plan import PIECE
from pallas_kernels.stream.ptx.feed import Feed, write_feed
from pallas_kernels.stream.ptx.giving_up import LOST, Wait

__all__ = ["collect_each", "collect_words", "load_pieces", "store_pair", "store_word"]

# Of more pieces than a few, the last one is waited for first. To look for very many takes so long
# that what is missing comes meanwhile; so it does where words are two activations.
_FEW_PIECES, _MANY_PIECES = 4, 8
# Bits of a word's tag, where one is waited for alone.
_TAG = 255
# Of `lop3`: c | (a ^ b).
_OR_XOR = 0xBE


def _write_collect(
    b: Block,
    *registers: Register,
    places: tuple[int, ...],
    size: int,
    bits: int,
    most: int,
    feed: Feed,
) -> None:
    """Results: the words. Operands: where they lie, the tag, how many, the weights, the ring."""
    count, pieces = size * len(places), len(places)
    words, (address, tag, there, weights, ring) = registers[:count], registers[count:]
    wait = Wait(b, ring, feed, most)
    found, wanted, left = b.pred("found"), b.pred("wanted"), b.u32("left")
    test = b.u32("test")  # what is 0, or is not
    b.comment("A bit for each piece that is still missing: only those are loaded again.")
    b.mov(left, 1)
    b.shl(left, left, there)
    b.sub(left, left, 1)
    for word in words:
        b.mov(word, tag)

    def load(q: int, wanted: Register) -> None:
        with b.when(wanted):
            for four in range(0, size, 4):
                some = words[size * q + four : size * q + four + 4]
                b.ld_relaxed(some, address + 4 * (places[q] + 32 * four))

    def check(q: int) -> None:
        """Whether the piece is there: then its bit goes."""
        b.mov(test, 0)
        for word in words[size * q : size * (q + 1)]:
            b.lop3(test, word, tag, test, _OR_XOR)
        b.and_(test, test, bits % 2**32)
        b.setp("eq", found, test, 0)
        with b.when(found):
            b.and_(left, left, ~(1 << q) % (1 << 32))  # as 32 bits without a sign: q goes to 31

    again = b.label("again")
    if size == PIECE and _FEW_PIECES < pieces <= _MANY_PIECES:
        b.comment("To look for all of many would take others' bandwidth: first for the last one.")
        early, last = b.marked("early"), pieces - 1
        b.and_(test, left, 1 << last)
        b.setp("eq", found, test, 0)
        wait.leave(found, again)
        b.setp("ne", wanted, test, 0)
        load(last, wanted)
        write_feed(b, feed, ring, weights)
        check(last)
        wait.leave(found, again)
        wait.look_again(early)
        b.bra(wait.missing)
    b.mark(again)
    for q in range(pieces):
        b.and_(test, left, 1 << q)
        b.setp("ne", wanted, test, 0)
        load(q, wanted)
    b.comment("While the look is on its way.")
    write_feed(b, feed, ring, weights)
    for q in range(pieces):
        check(q)
    b.setp("eq", found, left, 0)
    wait.leave(found, wait.done)
    wait.look_again(again)
    b.mark(wait.missing)
    wait.give_up(address, left)
    b.mov(words[0], LOST)
    b.mark(wait.done)


_collect = Operation("ffjax_collect", _write_collect)


def collect_words(
    ref: Any,
    offset: Array,
    places: Sequence[int],
    tag: Array,
    there: Array,
    size: int,
    bits: int,
    most: int,
    weights: Any,
    ring: Array,
    feed: Feed,
) -> list[Array]:
    """Loads words over and over until all carry a tag.

    Args:
        ref: int32 array.
        offset: int32 `[threads]`, where each thread's first piece begins: multiples of 4.
        places: words from there to each of its pieces, multiples of 4. Of a piece of 8 words the
            second 4 lie 128 words after the first: those of a warp's threads lie between.
        tag: int32 `[threads]`, all the same, 0 but in `bits`.
        there: int32 `[threads]`, how many pieces the thread has.
        size: words of a piece, 4 or 8.
        bits: those of a word that are its tag.
        most: how often to load before the program gives up, a power of two: see `giving_up`.
        weights: as `ref` in `feed_ring`, which is done between two looks.
        ring: int32 scalar, as in `feed_ring`.
        feed: as in `feed_ring`.

    Returns:
        Words, int32 `[threads]`, `size` a piece; the tag in place of those that are not there.
        Where the thread gave up, the first one has all bits set.
    """
    return _collect(
        *(Pointer(ref, offset), tag, there, Pointer(weights), ring),
        results=["int32"] * (size * len(places)),
        places=tuple(places),
        size=size,
        bits=bits,
        most=most,
        feed=feed,
    )


def _write_each(
    b: Block,
    *registers: list[Register],
    arrays: int,
    pairs: bool,
    most: int,
    feed: Feed,
    sparing: bool,
) -> None:
    """Results: words of each array. Operands: as many offsets, the tag, both arrays, the ring."""
    words = [x for some in registers[:arrays] for x in some]
    offsets = [x for some in registers[arrays : 2 * arrays] for x in some]
    tag, base, weights, ring = (some[0] for some in registers[2 * arrays :])
    wait = Wait(b, ring, feed, most)
    left, wrong, found, place = b.u32("left"), b.u32("wrong"), b.pred("found"), b.u64("place")
    for word in words:
        b.mov(word, 0 if pairs else tag)
    tags = [b.u32("tag") for _ in words] if pairs else words
    if pairs:
        for word in tags:
            b.mov(word, tag)
    pair = b.u64("pair")
    again = b.marked("again")
    for word, tagged, offset in zip(words, tags, offsets, strict=True):
        wanted = b.pred("wanted")
        b.setp("ge", wanted, offset, 0)
        b.mad_wide(place, offset, 4, base)
        with b.when(wanted):
            if pairs:
                b.ld_relaxed(pair, place)
                b.unpack(word, tagged, pair)
            else:
                b.ld_relaxed(word, place)
    b.comment("While the look is on its way.")
    write_feed(b, feed, ring, weights)
    b.mov(left, 0)
    b.comment("Not by lop3: ptxas crashes on it here.")
    for tagged in tags:
        b.xor(wrong, tagged, tag)
        b.or_(left, left, wrong)
    if not pairs:
        b.and_(left, left, _TAG)
    b.setp("eq", found, left, 0)
    wait.leave(found, wait.done)
    wait.look_again(again)
    b.mark(wait.missing)
    b.comment("The last one that is missing.")
    last = b.u32("last") if sparing else None
    if last is not None:
        b.mov(last, offsets[0])
    for tagged, offset in zip(tags, offsets, strict=True):
        lacks = b.pred("lacks")
        b.xor(wrong, tagged, tag)
        if not pairs:
            b.and_(wrong, wrong, _TAG)
        b.setp("ne", lacks, wrong, 0)
        with b.when(lacks):
            if last is None:
                b.mad_wide(place, offset, 4, base)
            else:
                b.mov(last, offset)
    if last is not None:
        b.mad_wide(place, last, 4, base)
    wait.give_up(place, left)
    for word in words:
        b.mov(word, LOST)
    b.mark(wait.done)


_collect_each = Operation("ffjax_collect_each", _write_each)


def collect_each(
    ref: Any,
    offsets: Sequence[Array],
    tag: Array,
    pairs: bool,
    together: int,
    most: int,
    weights: Any,
    ring: Array,
    feed: Feed,
    *,
    sparing: bool = False,
) -> list[Array]:
    """Loads words or pairs over and over until all of a thread's carry a tag.

    Args:
        ref: int32 array.
        offsets: int32 arrays of one shape: of words, or of pairs' first words, even numbers;
            negative where nothing is waited for.
        tag: int32 scalar, of a word's lowest 8 bits, or of a pair's second word.
        pairs: whether pairs are waited for.
        together: elements of each array that a thread waits for at the same time: as many as it
            has.
        most: how often to load before the program gives up, a power of two: see `giving_up`.
        weights: as `ref` in `feed_ring`, which is done between two looks.
        ring: int32 scalar, as in `feed_ring`.
        feed: as in `feed_ring`.
        sparing: whether no more than one address is computed when the program gives up. ptxas else
            keeps all of them for it, two registers each.

    Returns:
        Int32: words, or the first ones of pairs; the tag, or 0, where nothing is waited for; all
        bits set where the thread gave up.
    """
    shape = offsets[0].shape
    assert all(x.shape == shape for x in offsets), "Arrays of one shape are waited for together."
    return _collect_each(
        *(*offsets, tag, Pointer(ref), Pointer(weights), ring),
        results=["int32"] * len(offsets),
        arrays=len(offsets),
        pairs=pairs,
        together=together,
        most=most,
        feed=feed,
        sparing=sparing,
    )


def _spared(ref: Any, offsets: Array, mask: Array) -> Array:
    """Offsets, those the mask hides moved to the array's last words, which nobody uses.

    An interpreted store writes what was there before where the mask is false: there it must
    not meet what the same store writes elsewhere.
    """
    return jnp.where(mask, offsets, ref.shape[0] - 2)


def _write_word(b: Block, address: Register, word: Register, mask: Register) -> None:
    wanted = b.pred("wanted")
    b.setp("ne", wanted, mask, 0)
    with b.when(wanted):
        b.st_relaxed(address, word)


_store_word = Operation("ffjax_store_word", _write_word, anywhere=True)


def store_word(ref: Any, offsets: Array, word: Array, mask: Array, *, interpret: bool) -> None:
    """Stores 32-bit words so that another program's poll may read them at any time.

    Args:
        ref: int32 array.
        offsets: int32, any shape.
        word: int32, the same shape.
        mask: bool, the same shape.
        interpret: whether the kernel is interpreted.
    """
    if interpret:
        access.store(ref.at[_spared(ref, offsets, mask)], word, mask=mask)
    else:
        _store_word(Pointer(ref, offsets, written=True), word, mask)


def _write_pair(
    b: Block, address: Register, first: Register, second: Register, mask: Register
) -> None:
    wanted, pair = b.pred("wanted"), b.u64("pair")
    b.setp("ne", wanted, mask, 0)
    b.pack(pair, first, second)
    with b.when(wanted):
        b.st_relaxed(address, pair)


_store_pair = Operation("ffjax_store_pair", _write_pair, anywhere=True)


def store_pair(
    ref: Any, offsets: Array, first: Array, second: Array, mask: Array, *, interpret: bool
) -> None:
    """Stores two neighbouring words as one: a reader sees both or neither.

    Args:
        ref: int32 array.
        offsets: int32, even numbers.
        first: int32, the same shape, stored at the offset.
        second: int32, the same shape, stored after it.
        mask: bool, the same shape.
        interpret: whether the kernel is interpreted.
    """
    if interpret:
        offsets = _spared(ref, offsets, mask)
        access.store(ref.at[offsets], first, mask=mask)
        access.store(ref.at[offsets + 1], second, mask=mask)
    else:
        _store_pair(Pointer(ref, offsets, written=True), first, second, mask)


def _write_pieces(b: Block, *registers: Register, places: tuple[int, ...]) -> None:
    """Results: 4 words of each piece. Operands: where they lie, and how many there are."""
    *words, address, there = registers
    for q, place in enumerate(places):
        piece, is_there = words[4 * q : 4 * q + 4], b.pred("is_there")
        for word in piece:
            b.mov(word, 0)
        b.setp("gt", is_there, there, q)
        with b.when(is_there):
            b.ld_global_nc(piece, address + 2 * place)


_load_pieces = Operation("ffjax_load_pieces", _write_pieces)


def load_pieces(
    refs: Sequence[Any],
    beyond: Sequence[Array],
    offset: Array,
    places: Sequence[int],
    there: Array,
) -> list[Array]:
    """Loads pieces of 8 neighbouring bfloat16 that nobody writes, from one of several arrays.

    Which array is no matter of branches: after one, what was loaded would be waited for.

    Args:
        refs: bfloat16 arrays; they count as flat.
        beyond: bool `[threads]`, one for each array but the first: the last one whose condition
            holds is read, or the first.
        offset: int32 `[threads]`, where each thread's first piece begins: multiples of 8 elements.
        places: elements from there to each of its pieces, multiples of 8.
        there: int32 `[threads]`, how many pieces the thread has.

    Returns:
        Words of two, int32 `[threads]`, 4 a piece; 0 for those that are not there.
    """
    results = ["int32"] * (4 * len(places))
    return _load_pieces(Choice(refs, beyond, offset), there, results=results, places=tuple(places))
