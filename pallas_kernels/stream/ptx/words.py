"""Words that other programs write or read in the same launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax._src import core, state

from pallas_kernels.stream import access
from pallas_kernels.stream.plan import PIECE
from pallas_kernels.stream.ptx import lowered
from pallas_kernels.stream.ptx.feed import Feed, feed_lines
from pallas_kernels.stream.ptx.giving_up import LOST, REGISTERS, give_up, leave_line, look_again

__all__ = ["collect_each", "collect_words", "load_pieces", "store_pair", "store_word"]

# Of more pieces than a few, the last one is waited for first. To look for very many takes so long
# that what is missing comes meanwhile; so it does where words are two activations.
_FEW_PIECES, _MANY_PIECES = 4, 8

_collect_p = core.Primitive("ffjax_collect")
_collect_p.multiple_results = True


@_collect_p.def_effectful_abstract_eval
def _(ref, weights, offset, tag, there, ring, *, places, size, bits, most, feed):
    word = core.ShapedArray(offset.shape, jnp.int32)
    return [word] * (size * len(places)), {
        lowered.ORDERED,
        state.ReadEffect(0),
        state.ReadEffect(1),
    }


@lowered.rule(_collect_p)
def _(ctx, ref, weights, *args, places, size, bits, most, feed):
    offset, tag, there, ring = lowered.values(ctx, args)
    shape = ctx.avals_out[0].shape
    pieces = len(places)
    count = size * pieces
    address, tag_of, there_of = f"${count}", f"${count + 1}", f"${count + 2}"
    # A bit for each piece that is still missing: only those are loaded again.
    ring_of = f"${count + 4}"
    lines = [
        f"{{ .reg .pred %p; .reg .b32 %n, %w, %left; {REGISTERS} mov.u32 %n, 0;",
        f"mov.u32 %left, 1; shl.b32 %left, %left, {there_of}; sub.u32 %left, %left, 1;",
    ]
    lines.extend(f"mov.b32 ${i}, {tag_of};" for i in range(count))

    def load(q: int, guard: str) -> list[str]:
        return [
            f"{guard}ld.relaxed.gpu.global.v4.b32 "
            f"{{{', '.join(f'${size * q + four + i}' for i in range(4))}}}, "
            f"[{address}+{4 * (places[q] + 32 * four)}];"
            for four in range(0, size, 4)
        ]

    def check(q: int) -> list[str]:
        """Whether the piece is there, in %p: then its bit goes."""
        return [
            "mov.b32 %w, 0;",
            # w |= word ^ tag, for all words
            *(f"lop3.b32 %w, ${size * q + i}, {tag_of}, %w, 0xbe;" for i in range(size)),
            f"and.b32 %w, %w, {bits % 2**32}; setp.eq.u32 %p, %w, 0;",
            f"@%p and.b32 %left, %left, {~(1 << q)};",
        ]

    # While a look is on its way, and behind it.
    feeding = feed_lines(feed, ring_of, f"${count + 3}")
    if size == PIECE and _FEW_PIECES < pieces <= _MANY_PIECES:
        # To look for all of many would take others' bandwidth: first only for the last one.
        last = pieces - 1
        lines.append("early:")
        lines.append(f"and.b32 %w, %left, {1 << last}; setp.eq.u32 %p, %w, 0;")
        lines.append(leave_line("again"))
        lines.append("setp.ne.u32 %p, %w, 0;")
        lines += load(last, "@%p ")
        lines += [*feeding, *check(last), leave_line("again")]
        lines += [*look_again("early", ring_of, feed, most), "bra missing;"]
    lines.append("again:")
    for q in range(pieces):
        lines.append(f"and.b32 %w, %left, {1 << q}; setp.ne.u32 %p, %w, 0;")
        lines += load(q, "@%p ")
    lines += feeding
    for q in range(pieces):
        lines += check(q)
    lines += ["setp.eq.u32 %p, %left, 0;", leave_line("done")]
    lines += look_again("again", ring_of, feed, most)
    lines += ["missing:", *give_up(address, ring_of, feed), f"mov.b32 $0, {LOST}; done: }}"]
    addresses = lowered.addresses(ref, offset, shape)
    constraints = ",".join(["=&r"] * count + ["l", "r", "r", "l", "r"])
    word = lowered.like(shape, lowered.i32())
    pointer = lowered.spread(lowered.pointer(weights), list(shape))
    arguments = [addresses, tag, there, pointer, ring]
    return lowered.assembly([word] * count, " ".join(lines), constraints, arguments)


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
        offset: int32 `[T]`, where each thread's first piece begins: multiples of 4.
        places: words from there to each of its pieces, multiples of 4. Of a piece of 8 words the
            second 4 lie 128 words behind the first: those of a warp's threads lie between.
        tag: int32 `[T]`, all the same, 0 but in `bits`.
        there: int32 `[T]`, how many pieces the thread has.
        size: words of a piece, 4 or 8.
        bits: those of a word that are its tag.
        most: how often to load before the program gives up, a power of two: see `giving_up`.
        weights: as `ref` in `feed_ring`, which is done between two looks.
        ring: int32 scalar, as in `feed_ring`.
        feed: as in `feed_ring`.

    Returns:
        Words, int32 `[T]`, `size` a piece; the tag in place of those that are not there. Where the
        thread gave up, the first one has all bits set.
    """
    rings = jnp.full(offset.shape, ring)
    options = {"places": tuple(places), "size": size, "bits": bits, "most": most, "feed": feed}
    return _collect_p.bind(ref, weights, offset, tag, there, rings, **options)


_collect_each_p = core.Primitive("ffjax_collect_each")
_collect_each_p.multiple_results = True


@_collect_each_p.def_effectful_abstract_eval
def _(ref, weights, tag, ring, *offsets, pairs, together, most, feed):
    word = core.ShapedArray(offsets[0].shape, jnp.int32)
    return [word] * len(offsets), {lowered.ORDERED, state.ReadEffect(0), state.ReadEffect(1)}


def _collect_each_text(count: int, pairs: bool, together: int, most: int, feed: Feed) -> str:
    """Operands: `count` results, as many offsets, the tag, the arrays' addresses, the ring's."""
    tag, base, weights, ring = (f"${2 * count + i * together}" for i in range(4))
    lines = [
        f"{{ .reg .pred %p; .reg .b32 %n, %left, %x; .reg .b64 %a, %w; {REGISTERS} mov.u32 %n, 0;",
        *(f"mov.b32 ${i}, {0 if pairs else tag};" for i in range(count)),
        *([f".reg .b32 %t<{count}>;", *(f"mov.b32 %t{i}, {tag};" for i in range(count))] * pairs),
        "again:",
    ]
    for i in range(count):
        offset = f"${count + i}"
        lines.append(f"setp.ge.s32 %p, {offset}, 0; mad.wide.s32 %a, {offset}, 4, {base};")
        if pairs:
            lines.append(
                f"@%p ld.relaxed.gpu.global.b64 %w, [%a]; @%p mov.b64 {{${i}, %t{i}}}, %w;"
            )
        else:
            lines.append(f"@%p ld.relaxed.gpu.global.b32 ${i}, [%a];")
    lines += [*feed_lines(feed, ring, weights), "mov.b32 %left, 0;"]
    tags = [f"%t{i}" if pairs else f"${i}" for i in range(count)]
    # Not by lop3: ptxas crashes on it here.
    lines += [f"xor.b32 %x, {word}, {tag}; or.b32 %left, %left, %x;" for word in tags]
    if not pairs:
        lines.append("and.b32 %left, %left, 255;")
    lines += ["setp.eq.u32 %p, %left, 0;", leave_line("done")]
    lines += look_again("again", ring, feed, most)
    lines.append("missing:")
    for i, word in enumerate(tags):  # the last one that is missing
        lines.append(f"xor.b32 %x, {word}, {tag};" + ("" if pairs else " and.b32 %x, %x, 255;"))
        lines.append(f"setp.ne.u32 %p, %x, 0; @%p mad.wide.s32 %a, ${count + i}, 4, {base};")
    lines += give_up("%a", ring, feed)
    lines += [f"mov.b32 ${i}, {LOST};" for i in range(count)]
    return " ".join([*lines, "done: }"])


@lowered.rule(_collect_each_p)
def _(ctx, ref, weights, *args, pairs, together, most, feed):
    tag, ring, *offsets = lowered.values(ctx, args)
    shape = list(ctx.avals_out[0].shape)
    count = len(offsets) * together
    text = _collect_each_text(count, pairs, together, most, feed)
    kinds = ["=&r"] * count + ["r"] * (count + together) + ["l"] * (2 * together)
    constraints = ",".join(kinds + ["r"] * together)
    arrays = [lowered.spread(lowered.pointer(x), shape) for x in (ref, weights)]
    results = [lowered.like(shape, lowered.i32())] * len(offsets)
    return lowered.assembly(results, text, constraints, [*offsets, tag, *arrays, ring], together)


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

    Returns:
        Int32: words, or the first ones of pairs; the tag, or 0, where nothing is waited for; all
        bits set where the thread gave up.
    """
    shape = offsets[0].shape
    assert all(x.shape == shape for x in offsets), "Arrays of one shape are waited for together."
    scalars = [jnp.full(shape, x) for x in (tag, ring)]
    options = {"pairs": pairs, "together": together, "most": most, "feed": feed}
    return _collect_each_p.bind(ref, weights, *scalars, *offsets, **options)


def _spared(ref: Any, offsets: Array, mask: Array) -> Array:
    """Offsets, those the mask hides moved to the array's last words, which nobody uses.

    An interpreted store writes what was there before where the mask is false: there it must
    not meet what the same store writes elsewhere.
    """
    return jnp.where(mask, offsets, ref.shape[0] - 2)


_store_word_p = core.Primitive("ffjax_store_word")
_store_word_p.multiple_results = True


@_store_word_p.def_effectful_abstract_eval
def _(ref, offsets, word, mask):
    return [core.ShapedArray(offsets.shape, jnp.int32)], {lowered.ORDERED, state.WriteEffect(0)}


@lowered.rule(_store_word_p)
def _(ctx, ref, *args):
    offsets, word, mask = lowered.values(ctx, args)
    shape = ctx.avals_out[0].shape
    mask = lowered.arith.extui(lowered.like(shape, lowered.i32()), mask)
    return lowered.assembly(
        [lowered.like(shape, lowered.i32())],
        "{ .reg .pred %p; setp.ne.s32 %p, $3, 0; "
        "@%p st.relaxed.gpu.global.b32 [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r,r",
        [lowered.addresses(ref, offsets, shape), word, mask],
    )


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
        _store_word_p.bind(ref, offsets, word, mask)


_store_pair_p = core.Primitive("ffjax_store_pair")
_store_pair_p.multiple_results = True


@_store_pair_p.def_effectful_abstract_eval
def _(ref, offsets, first, second, mask):
    return [core.ShapedArray(offsets.shape, jnp.int32)], {lowered.ORDERED, state.WriteEffect(0)}


@lowered.rule(_store_pair_p)
def _(ctx, ref, *args):
    offsets, first, second, mask = lowered.values(ctx, args)
    shape = ctx.avals_out[0].shape
    mask = lowered.arith.extui(lowered.like(shape, lowered.i32()), mask)
    return lowered.assembly(
        [lowered.like(shape, lowered.i32())],
        "{ .reg .pred %p; .reg .b64 %w; setp.ne.s32 %p, $4, 0; mov.b64 %w, {$2, $3}; "
        "@%p st.relaxed.gpu.global.b64 [$1], %w; mov.u32 $0, 0; }",
        "=r,l,r,r,r",
        [lowered.addresses(ref, offsets, shape), first, second, mask],
    )


def store_pair(
    ref: Any, offsets: Array, first: Array, second: Array, mask: Array, *, interpret: bool
) -> None:
    """Stores two neighbouring words as one: a reader sees both or neither.

    Args:
        ref: int32 array.
        offsets: int32, even numbers.
        first: int32, the same shape, stored at the offset.
        second: int32, the same shape, stored behind it.
        mask: bool, the same shape.
        interpret: whether the kernel is interpreted.
    """
    if interpret:
        offsets = _spared(ref, offsets, mask)
        access.store(ref.at[offsets], first, mask=mask)
        access.store(ref.at[offsets + 1], second, mask=mask)
    else:
        _store_pair_p.bind(ref, offsets, first, second, mask)


_load_pieces_p = core.Primitive("ffjax_load_pieces")
_load_pieces_p.multiple_results = True


@_load_pieces_p.def_effectful_abstract_eval
def _(*args, places, arrays):
    reads = {state.ReadEffect(i) for i in range(arrays)}
    words = [core.ShapedArray(args[-1].shape, jnp.int32)] * (4 * len(places))
    return words, {lowered.ORDERED, *reads}


@lowered.rule(_load_pieces_p)
def _(ctx, *args, places, arrays):
    refs = args[:arrays]
    *beyond, offset, there = lowered.values(ctx, args[arrays:])
    shape, count = ctx.avals_out[0].shape, 4 * len(places)
    lines = ["{ .reg .pred %p;"]
    for q, place in enumerate(places):
        words = [f"${4 * q + i}" for i in range(4)]
        lines.extend(f"mov.b32 {word}, 0;" for word in words)
        lines.append(f"setp.gt.s32 %p, ${count + 1}, {q};")
        to = ", ".join(words)
        lines.append(f"@%p ld.global.nc.v4.b32 {{{to}}}, [${count}+{2 * place}];")
    lines.append("}")
    address = lowered.addresses(refs[0], offset, shape)
    for condition, ref in zip(beyond, refs[1:], strict=True):
        address = lowered.arith.select(condition, lowered.addresses(ref, offset, shape), address)
    constraints = ",".join(["=&r"] * count + ["l", "r"])
    results = [lowered.like(shape, lowered.i32())] * count
    return lowered.assembly(results, " ".join(lines), constraints, [address, there])


def load_pieces(
    refs: Sequence[Any],
    beyond: Sequence[Array],
    offset: Array,
    places: Sequence[int],
    there: Array,
) -> list[Array]:
    """Loads pieces of 8 neighbouring bfloat16 that nobody writes, from one of several arrays.

    Which array is no matter of branches: behind one, what was loaded would be waited for.

    Args:
        refs: bfloat16 arrays; they count as flat.
        beyond: bool `[T]`, one for each array but the first: the last one whose condition
            holds is read, or the first.
        offset: int32 `[T]`, where each thread's first piece begins: multiples of 8 elements.
        places: elements from there to each of its pieces, multiples of 8.
        there: int32 `[T]`, how many pieces the thread has.

    Returns:
        Words of two, int32 `[T]`, 4 a piece; 0 for those that are not there.
    """
    options = {"places": tuple(places), "arrays": len(refs)}
    return _load_pieces_p.bind(*refs, *beyond, offset, there, **options)
