"""One look at all logits of many rows: what is greatest in each group, and what all sum up to."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.calls import kernel_call
from pallas_kernels.dims import ceil_div, next_power_of_2
from pallas_kernels.logprobs.order import LEAST, ordered, unordered
from pallas_kernels.primitives import access
from pallas_kernels.program import iota

__all__ = ["GROUP", "Survey", "as_numbers", "finite_or_0", "survey"]

# The kernel's name in compiled programs and in profiles.
KERNEL_NAME = "ffjax_survey"

GROUP = 32
"""Tokens of a group."""
# Tokens of a program, a power of two: 16 of each thread.
_MOST_WIDTH, _WARPS = 4096, 8


class Survey(NamedTuple):
    """What was seen.

    Attributes:
        groups: int32 `[R, G]`, the greatest number of each group of `GROUP` tokens side by side;
            LEAST of those beyond the vocabulary.
        most: int32 `[R, parts]`, the greatest of each part.
        sums: float32 `[R, parts]`, of `exp(logit - most)` of a part; of `exp(logit)` if the
            greatest is not finite.
    """

    groups: Array
    most: Array
    sums: Array


def as_numbers(logits: Array) -> Array:
    """Logits, float32 or already int32, as `ordered` has them."""
    return logits if logits.dtype == jnp.int32 else ordered(logits)


def finite_or_0(x: Array) -> Array:
    """x, or 0 where it is not finite."""
    return jnp.where(jnp.abs(x) < jnp.inf, x, 0.0)


def _look(logits, groups, most, sums, *, vocab: int, parts: int, width: int) -> None:
    program = pl.program_id(0)
    row, part = lax.div(program, jnp.int32(parts)), program % parts
    shape = width // GROUP, GROUP
    token = part * width + iota(shape, 0) * GROUP + iota(shape, 1)
    real = token < vocab
    other = LEAST if logits.dtype == jnp.int32 else -jnp.inf
    loaded = access.load(logits.at[jnp.full_like(token, row), token], mask=real, other=other)
    numbers = jnp.where(real, as_numbers(loaded), LEAST)
    best = jnp.max(numbers, axis=1)
    first = iota(best.shape, 0)
    places = jnp.full_like(first, row), part * (width // GROUP) + first
    access.store(groups.at[places], best)
    greatest = jnp.max(best)
    each = jnp.exp(unordered(numbers) - finite_or_0(unordered(greatest)))
    total = jnp.sum(jnp.sum(jnp.where(real, each, 0.0), axis=1))
    place = jnp.full((1,), row), jnp.full((1,), part)
    access.store(most.at[place], jnp.full((1,), greatest))
    access.store(sums.at[place], jnp.full((1,), total))


def survey(logits: Array, *, interpret: bool = False) -> Survey:
    """Looks at all logits once.

    How a row is cut depends on V alone, so that it gets the same whatever rows are beside it.

    Args:
        logits: float32 `[R, V]`; or int32, as `ordered` has them.
        interpret: run on a CPU.
    """
    rows, vocab = logits.shape
    width = min(_MOST_WIDTH, max(GROUP, next_power_of_2(vocab)))
    parts = ceil_div(vocab, width)

    def kernel(*refs):
        _look(*refs, vocab=vocab, parts=parts, width=width)

    return Survey(
        *kernel_call(
            kernel,
            grid=(rows * parts,),
            out_shape=[
                jax.ShapeDtypeStruct((rows, parts * width // GROUP), jnp.int32),
                jax.ShapeDtypeStruct((rows, parts), jnp.int32),
                jax.ShapeDtypeStruct((rows, parts), jnp.float32),
            ],
            interpret=interpret,
            num_warps=_WARPS,
            name=KERNEL_NAME,
        )(logits)
    )
