"""Activation fragments: what each thread holds of a product's inputs, as its weights want them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.stream import ptx
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.exchange import Held
from pallas_kernels.stream.fragment_layout import place_of_offset
from pallas_kernels.stream.layout import SharedLayout, offset_pitch
from pallas_kernels.stream.plan import PIECE, PRODUCT, SegmentPlan

__all__ = ["Fragments", "inputs_of", "no_fragments", "pack", "pack_held", "packed", "unpacked"]


class Fragments(NamedTuple):
    """What each thread holds of a segment's activations.

    Attributes:
        words: int32 `[threads]` each: two bfloat16, or digits as `ptx.pack_digits` has them.
        scale: of digits, float32 `[threads]`; None where no matrix is quantized.
    """

    words: tuple[Array, ...]
    scale: Array | None


def _most_words(env: StreamEnv) -> int:
    return max(p.pieces for p in env.plan.segments.values()) * PIECE // 2


def no_fragments(env: StreamEnv) -> Fragments:
    """Before the first activations are collected."""
    shape = (env.plan.threads,)
    words = (jnp.zeros(shape, jnp.int32),) * _most_words(env)
    return Fragments(words, jnp.zeros(shape, jnp.float32) if env.plan.quantized else None)


def packed(first: Array, second: Array) -> Array:
    """Two float32 `[threads]`, rounded to bfloat16, as one int32."""
    low, high = (
        lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.int16).astype(jnp.int32)
        for x in (first, second)
    )
    return (low & 0xFFFF) | lax.shift_left(high, 16)


def inputs_of(part: SegmentPlan, fragments: Fragments) -> list[Array]:
    """Fragments as numbers, for interpret mode: float32 `[threads]`, inputs in order."""
    words = fragments.words[: part.pieces * PIECE // 2]
    if part.bits == 16:
        return [x for word in words for x in unpacked(word)]
    assert fragments.scale is not None
    halved = part.held != part.grain
    return ptx.unpack_digits(words, fragments.scale, part.bits, halved=halved, held=part.held)


def unpacked(word: Array) -> tuple[Array, Array]:
    """The two numbers of a word of two bfloat16, float32."""
    low, high = lax.shift_left(word, 16), word & ~0xFFFF
    return (
        lax.bitcast_convert_type(low, jnp.float32),
        lax.bitcast_convert_type(high, jnp.float32),
    )


def pack(env: StreamEnv, part: SegmentPlan, values: list[Array] | Held) -> Fragments:
    """Activations as the segment's weights want them."""
    if isinstance(values, Held):
        return pack_held(env, part, values)
    scale = jnp.zeros_like(values[0]) if env.plan.quantized else None
    if part.bits == 16:
        words = [packed(*values[i : i + 2]) for i in range(0, len(values), 2)]
    else:
        halved = part.held != part.grain
        how = {"halved": halved, "held": part.held, "interpret": env.interpret}
        words, scale = ptx.pack_digits(values, part.bits, **how)
        _sum_groups(env, part, words)
    return _filled_up(env, words, scale)


def pack_held(
    env: StreamEnv,
    part: SegmentPlan,
    held: Held,
    norm: ptx.NormRow | None = None,
    scale_of: Callable[[Array], Array] = lambda squares: squares,
) -> Fragments:
    """Activations of wide rows, perhaps normed, as the segment's weights want them.

    Args:
        env: the program's view.
        part: the segment.
        held: the activations.
        norm: the norm's weights; None: there is no norm.
        scale_of: with a norm, its scale, of the sum of the squares of each thread's sequence.
    """
    words, tags, form = held
    if part.bits == 16:
        scale = None
        if norm is not None:
            scale = scale_of(ptx.sum_squares(norm.squares, words, norm.warps, form))
        own = jnp.zeros(tags.shape, jnp.float32) if env.plan.quantized else None
        return _filled_up(env, ptx.pack_held(words, tags, form, norm, scale), own)
    digits, own, squares = ptx.pack_held_digits(words, tags, part.bits, form, norm, held=part.held)
    _sum_groups(env, part, digits)
    return _filled_up(env, digits, own if squares is None else own * scale_of(squares))


def _filled_up(env: StreamEnv, words: list[Array], scale: Array | None) -> Fragments:
    """Fragments of as many words as any segment has."""
    # Pallas lets no plain constant out of a branch.
    rest = [words[0] * 0] * (_most_words(env) - len(words))
    return Fragments((*words, *rest), scale)


def _sum_groups(env: StreamEnv, part: SegmentPlan, words: list[Array]) -> None:
    """Puts the sums of each group's digits where products find them, if weights have an offset.

    They are the same for all rows of the matrix. Each warp makes those that it uses.
    """
    plan = env.plan
    if part.grouping is None or part.grouping.offset is None or env.interpret:
        return
    start, size = env.shared + SharedLayout.of(plan).offsets, offset_pitch(plan)
    ptx.sum_groups(
        place_of_offset(plan, part, start, size),
        words,
        ptx.GroupSums(
            reads=part.reads,
            by_sixteen=part.bits == 4,
            chunked=plan.chunked,
            fine=part.fine,
            threads=32 * plan.product_warps,
            products=part.grouping.size // PRODUCT,
        ),
    )
