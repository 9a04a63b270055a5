"""int4 weights in 32-bit words: which bits of a word hold which input.

Eight consecutive inputs e0 to e7 of a row, integers of 0 to 15, make a word. Its nibbles, the
lowest first, are

    nibble   0   1   2   3   4   5   6   7
    input    e0  e2  e4  e6  e1  e3  e5  e7

so that a shift, an and and an or make two neighbours into a pair of bfloat16, as tensor cores and
packed arithmetic take them, with no shuffle: for i of 0 to 3,

    ((word >> 4 * i) & 0x000F000F) | 0x43004300

holds 128 + e(2i) in its low half and 128 + e(2i+1) in its high half: 0x4300 is 128 in bfloat16,
whose seven mantissa bits count ones there. Less 136 it is exactly the weight before scaling.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.dims import WORD_SHIFTS

__all__ = ["INPUTS_A_WORD", "ZERO", "pack", "planes", "unpack"]

INPUTS_A_WORD = 8
ZERO = 8
"""The packed integer that stands for 0."""


def pack(integers: Array) -> Array:
    """Packs eight integers a word.

    Args:
        integers: of 0 to 15, `[..., in]`; in is a multiple of 8.

    Returns:
        int32 `[..., in / 8]`.

    Raises:
        ValueError: in is no multiple of 8.
    """
    *rows, inputs = integers.shape
    if inputs % INPUTS_A_WORD:
        raise ValueError(
            f"A word holds {INPUTS_A_WORD} inputs: a row has a multiple of that, got {inputs}."
        )
    eights = integers.astype(jnp.uint32).reshape(*rows, -1, INPUTS_A_WORD)
    # No two share a bit, so that the sum is an or.
    words = (eights << jnp.array(WORD_SHIFTS, jnp.uint32)).sum(axis=-1, dtype=jnp.uint32)
    return lax.bitcast_convert_type(words, jnp.int32)


def unpack(words: Array) -> Array:
    """The inverse of `pack`.

    Args:
        words: int32 `[..., in / 8]`.

    Returns:
        int8 `[..., in]`, of 0 to 15.
    """
    bits = lax.bitcast_convert_type(words, jnp.uint32)[..., None]
    eights = (bits >> jnp.array(WORD_SHIFTS, jnp.uint32)) & 0xF
    return eights.astype(jnp.int8).reshape(*words.shape[:-1], -1)


def planes(words: Array) -> Array:
    """The weights before scaling, those of each place in a word together.

    Args:
        words: int32 `[..., in / 8]`.

    Returns:
        int8 `[..., 8, in / 8]`, of -8 to 7: at `[..., place, word]` is input `8 * word + place`.
    """
    bits = lax.bitcast_convert_type(words, jnp.uint32)[..., None, :]
    shifts = jnp.array(WORD_SHIFTS, jnp.uint32)[:, None]
    return ((bits >> shifts) & 0xF).astype(jnp.int8) - jnp.int8(ZERO)
