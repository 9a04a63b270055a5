"""The exchange: how programs hand activations to each other, in words that carry their own tags.

As in NCCL's LL protocol, data and flag are stored as one; here the flag counts, and is called a
*tag*. A *word* is 32 bits: the upper 24 of a float32, and in the lowest 8 the tag of the hand-over
that it belongs to. A reader polls the very words it needs until all carry the tag it waits for;
then it has them. A hand-over thus takes one store and one load, and no word depends on the order in
which others become visible: each is an atomic message of its own ("relaxed" in the memory model of
PTX). Where all 32 bits of a number matter, a *pair* holds the number and a tag of 32 bits, stored
and loaded as one, which is LL itself. Of several sequences, whatever every program reads
comes two activations a word, see `half2`.

Why a word is never overwritten before its readers have read it. Every buffer is written once
a layer. What a program writes in layer l + 1 depends, through the hand-overs, on the whole
residual that enters it; that depends on the whole output of every segment of layer l; and
whoever reads a buffer in layer l contributes to such an output afterwards. (A program
without work in a segment does not poll for it.) So at the time of the second writing every
reader has finished with the first.

Why a stale word is never taken for a fresh one. Tags count up and come round: 2 bits of half2 after
4 hand-overs, 8 bits of other words after 256. So a reader must know how old a word can be that it
finds, and that follows from what it has read before:

- A program's share of a matrix is the same in every layer, and so is what it owns of the residual.
  Who reads one of these buffers thus reads it in every layer, and the word that it finds has the
  tag of the layer before; at the beginning of a step, of the last layer of the step before, which
  has ended everywhere. That is one hand-over ago, or two.
- A program may have no tile in any layer, and some of the head's. It reads nothing from the step's
  beginning on, runs ahead to the head, and waits there while the residual of every layer passes. So
  the head's input has a buffer of its own, written once a step, and its tag counts steps.
- Who attends may do so in global layers alone, or in local ones. Queries, keys and values are words
  with 8 bits, and models with more layers than that in between are refused: see `planner.why_not`.
- What KV splits of attention give is written as needed, perhaps after thousands of steps. They are
  pairs, whose tags have 32 bits and are odd, so that what was never written has none.

`tests/search` holds a model of this, which looks at all orders in which programs can come.

The exchange lies in the cache and lives from step to step. It starts as zeros; the first tag
is 1. Its first word counts the steps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.stream import access, ptx
from pallas_kernels.stream.exchange_layout import Layout
from pallas_kernels.stream.exchange_order import within_piece
from pallas_kernels.stream.half2 import HALF2_TAG_BITS, Format, half2_tag, pack_half2, unpack_half2
from pallas_kernels.stream.plan import PIECE
from pallas_kernels.sync import MAX_POLLS

__all__ = ["Exchange", "Held", "Meanwhile"]

_TAG_BITS = 0xFF
_NAN = 0x7FC00000


def _of_pair(tag: Array) -> Array:
    """A pair's tag, int32. It is odd: tags come round, and what nobody has written yet is 0."""
    return 2 * tag + 1


class Held(NamedTuple):
    """Activations as threads hold them of wide rows: the words that they came in.

    Attributes:
        words: int32 `[threads]` each, two activations, in order.
        tags: int32 `[threads]`, what they carry, at its places.
        form: of the words.
    """

    words: list[Array]
    tags: Array
    form: Format


class Meanwhile(NamedTuple):
    """A ring to be fed: see `ptx.feed_ring`."""

    weights: Any
    ring: Array
    feed: ptx.Feed


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One program's view of the exchange while the kernel is traced.

    Attributes:
        words: ref of the int32 array.
        layout: where the buffers begin.
        interpret: whether the kernel is interpreted. Programs then run one after the
            other: what is not there when it is read will never come, and reads as NaN.
        threads: of a program.
        meanwhile: what to do between two looks at words that are missing.
        sparing: see `StreamPlan.spares_addresses`.
    """

    words: Any
    layout: Layout
    interpret: bool
    threads: int
    meanwhile: Meanwhile | None = None
    sparing: bool = False

    def publish(self, offsets: Array, values: Array, tag: Array, mask: Array) -> None:
        """Stores the upper 24 bits of float32 values, rounded, with their tag.

        Args:
            offsets: int32, any shape.
            values: float32, the same shape.
            tag: int32 scalar.
            mask: bool, the same shape.
        """
        bits = lax.bitcast_convert_type(values, jnp.int32)
        # Rounding a NaN up could make it a number.
        bits = jnp.where(jnp.isnan(values), _NAN, bits + 0x80)
        word = (bits & ~_TAG_BITS) | (tag & _TAG_BITS)
        ptx.store_word(self.words, offsets, word, mask, interpret=self.interpret)

    def publish_half2(
        self, offsets: Array, first: Array, second: Array, form: Format, tag: Array, mask: Array
    ) -> None:
        """Stores two activations a word: see `half2`.

        Args:
            offsets: int32, any shape.
            first: float32, the same shape.
            second: float32, the same shape.
            form: of the numbers.
            tag: int32 scalar.
            mask: bool, the same shape.
        """
        word = pack_half2(first, second, tag, form)
        ptx.store_word(self.words, offsets, word, mask, interpret=self.interpret)

    def publish_pair(self, offsets: Array, values: Array, tag: Array, mask: Array) -> None:
        """Stores 32-bit values (float32 or int32) whole, each with its tag.

        Args:
            offsets: int32, even numbers: where the values go, the tags after them.
            values: float32 or int32, the same shape.
            tag: int32 scalar.
            mask: bool, the same shape.
        """
        if values.dtype != jnp.int32:
            values = lax.bitcast_convert_type(values, jnp.int32)
        tags = jnp.broadcast_to(_of_pair(tag), values.shape)
        ptx.store_pair(self.words, offsets, values, tags, mask, interpret=self.interpret)

    def collect(self, offsets: Array, tag: Array, mask: Array) -> Array:
        """Waits for words; returns them as float32, 0 where the mask is false.

        Args:
            offsets: int32, any shape.
            tag: int32 scalar they must carry.
            mask: bool, the same shape.
        """
        return self.collect_all([(offsets, mask)], tag)[0]

    def collect_all(self, wanted: Sequence[tuple[Array, Array]], tag: Array) -> list[Array]:
        """Waits for several arrays of words, of one shape, at the same time.

        Args:
            wanted: offsets and mask of each, as in `collect`.
            tag: int32 scalar they must carry.
        """
        tag = tag & _TAG_BITS
        if not self.interpret:
            words = self._wait(wanted, tag, pairs=False)
            return [lax.bitcast_convert_type(word & ~_TAG_BITS, jnp.float32) for word in words]
        return [value for offsets, mask in wanted for value in self._look(offsets, tag, mask)]

    def collect_pieces(
        self,
        offset: Array,
        places: Sequence[int],
        tag: Array,
        there: Array,
        *,
        half2: Format | None,
    ) -> list[Array]:
        """Waits for pieces of 8 neighbouring activations, each thread for its own.

        Args:
            offset: int32 `[threads]`, where the thread's first piece begins, words.
            places: words from there to each of its pieces. What a thread loads at once are 4 words,
                and a warp's threads' lie side by side: a piece's next 4 are 128 words further on.
            tag: int32 scalar they must carry.
            there: int32 `[threads]`, how many pieces the thread has.
            half2: the format of a word's two activations; None where it has one.

        Returns:
            Float32 `[threads]`, 8 a piece; 0 where there is none.
        """
        if self.interpret:
            size = PIECE // 2 if half2 else PIECE
            look = functools.partial(self._look_for_half2, half2) if half2 else self._look
            return [
                value
                for q, place in enumerate(places)
                for j in range(size)
                for value in look(offset + place + within_piece(j), tag, q < there)
            ]
        if half2:
            words = self.hold_pieces(offset, places, tag, there, half2=half2).words
            return [value for word in words for value in ptx.unpack_half2(word, half2)]
        tags = jnp.full(offset.shape, tag & _TAG_BITS)
        words = self._wait_for_pieces(offset, places, tags, there, PIECE, _TAG_BITS)
        return [lax.bitcast_convert_type(word & ~_TAG_BITS, jnp.float32) for word in words]

    def hold_pieces(
        self, offset: Array, places: Sequence[int], tag: Array, there: Array, *, half2: Format
    ) -> Held:
        """Waits for pieces of words of two activations, and leaves them as they are.

        Args: see `collect_pieces`; the kernel is compiled.
        """
        tags = jnp.full(offset.shape, half2_tag(tag))
        size, bits = PIECE // 2, HALF2_TAG_BITS
        return Held(self._wait_for_pieces(offset, places, tags, there, size, bits), tags, half2)

    def _wait_for_pieces(
        self,
        offset: Array,
        places: Sequence[int],
        tags: Array,
        there: Array,
        size: int,
        bits: int,
    ) -> list[Array]:
        """Words of pieces: see `ptx.collect_words`."""
        assert self.meanwhile is not None
        return ptx.collect_words(
            self.words, offset, places, tags, there, size, bits, MAX_POLLS, *self.meanwhile
        )

    def _look(self, offsets: Array, tag: Array, mask: Array) -> tuple[Array, ...]:
        """Interpreted: words as they are; NaN where one has another tag."""
        word = access.load(self.words.at[offsets], mask=mask, other=0)
        there = (word ^ tag) & _TAG_BITS == 0
        value = lax.bitcast_convert_type(word & ~_TAG_BITS, jnp.float32)
        return (jnp.where(mask, jnp.where(there, value, jnp.nan), 0.0),)

    def _look_for_half2(
        self, form: Format, offsets: Array, tag: Array, mask: Array
    ) -> tuple[Array, ...]:
        """The same of words of two."""
        word = access.load(self.words.at[offsets], mask=mask, other=0)
        there = (word ^ half2_tag(tag)) & HALF2_TAG_BITS == 0
        return tuple(
            jnp.where(mask, jnp.where(there, value, jnp.nan), 0.0)
            for value in unpack_half2(word, form)
        )

    def collect_pairs(self, wanted: Sequence[tuple[Array, Array]], tag: Array) -> list[Array]:
        """Waits for several arrays of pairs, of one shape, at the same time.

        Args:
            wanted: offsets, even numbers, and mask of each.
            tag: int32 scalar they must carry.

        Returns:
            Their values as int32 bits, 0 where the mask is false.
        """
        if not self.interpret:
            return self._wait(wanted, _of_pair(tag), pairs=True)
        found = []
        for offsets, mask in wanted:
            # What the mask hides is read too, from a place that is always there.
            at = jnp.where(mask, offsets, self.layout.best)
            there = access.load(self.words.at[at + 1]) == _of_pair(tag)
            value = jnp.where(there, access.load(self.words.at[at]), _NAN)
            found.append(jnp.where(mask, value, 0))
        return found

    def combine(
        self,
        values: Array,
        sums: Array,
        there: Array,
        tag: Array,
        count: int,
        lanes: int,
        step: int,
    ) -> Array:
        """Waits for pairs of a head's KV splits, and combines them: see `ptx.combine_splits`."""
        assert self.meanwhile is not None
        return ptx.combine_splits(
            self.words,
            values,
            sums,
            there,
            _of_pair(tag),
            count,
            lanes,
            step,
            MAX_POLLS,
            *self.meanwhile,
        )

    def _wait(
        self, wanted: Sequence[tuple[Array, Array]], tag: Array, *, pairs: bool
    ) -> list[Array]:
        """Polls until all have come, each thread until its own have; `ptx.collect_each` says what.

        An element that several threads have is waited for by each of them: none goes on with
        what it loaded before. Warps come out of it one by one.
        """
        assert self.meanwhile is not None
        offsets = [jnp.where(mask, at, -1) for at, mask in wanted]
        size = math.prod(offsets[0].shape)
        together = max(1, size // self.threads)
        how = pairs, together, MAX_POLLS
        words = ptx.collect_each(
            self.words, offsets, tag, *how, *self.meanwhile, sparing=self.sparing
        )
        if size < self.threads:
            # Of those who have the same element, one might be left behind when others have gone
            # so far that it is overwritten.
            access.meet()
        return words
