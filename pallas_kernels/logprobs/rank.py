"""The likeliest tokens of each row, and log-probabilities.

The n likeliest tokens lie in those n groups, of tokens side by side, whose own likeliest are ahead:
for each group before them has a token that is ahead of all the rest. One program a row takes the
greatest of the groups n times, and then of what these hold.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.calls import kernel_call
from pallas_kernels.dims import next_power_of_2
from pallas_kernels.logprobs.order import GREATEST, LEAST, unordered
from pallas_kernels.logprobs.survey import GROUP, as_numbers, finite_or_0, survey
from pallas_kernels.primitives import access
from pallas_kernels.program import iota

__all__ = ["MOST_TOKENS", "likeliest"]

# The kernel's name in compiled programs and in profiles.
KERNEL_NAME = "ffjax_likeliest"

MOST_TOKENS = 1 << 19
"""V at most: a program holds the groups of a row."""
_WARPS = 8


def _best(values: Array, ids: Array, best: int, room: int) -> tuple[Array, Array]:
    """The n greatest values, falling, and their ids; of equals the lowest id is first.

    Args:
        values: int32 `[N]` or `[N, M]`; those that are LEAST are nobody's.
        ids: int32, likewise; none is `GREATEST`.
        best: n.
        room: a power of two, n or more.

    Returns:
        Values and ids, int32 `[room]`; LEAST and GREATEST where there are no more.
    """

    def over(reduce, x: Array) -> Array:
        return reduce(x) if x.ndim == 1 else reduce(reduce(x, axis=1))

    i = iota((room,), 0)

    def take(at: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        values, found, where = state
        most = over(jnp.max, values)
        # What was taken is LEAST, as is what is nobody's: there, no id is left.
        there = (values == most) & (values != LEAST)
        one = over(jnp.min, jnp.where(there, ids, GREATEST))
        values = jnp.where(ids == one, LEAST, values)
        return values, jnp.where(i == at, most, found), jnp.where(i == at, one, where)

    start = values, jnp.full((room,), LEAST), jnp.full((room,), GREATEST)
    _, found, where = lax.fori_loop(0, best, take, start)
    return found, where


def _log_total(most: Array, sums: Array) -> Array:
    """The logarithm of all exponentials of a row, float32 scalar.

    Args:
        most: int32 `[N]`, as in `Survey`; LEAST after them.
        sums: float32 `[N]`; 0 likewise.
    """
    greatest = finite_or_0(unordered(jnp.max(most)))
    behind = finite_or_0(unordered(most)) - greatest
    # A part of which nothing comes may lie at any distance.
    scaled = jnp.where(sums == 0, 0.0, sums * jnp.exp(behind))
    return jnp.log(jnp.sum(scaled)) + greatest


def _rank(refs: dict, *, vocab: int, best: int) -> None:
    row = pl.program_id(0)

    def load(name: str, other) -> tuple[Array, Array]:
        """A row of an array, to a power of two; and where each is of."""
        size = refs[name].shape[1]
        at = iota((next_power_of_2(size),), 0)
        where = jnp.full_like(at, row), at
        return access.load(refs[name].at[where], mask=at < size, other=other), at

    logits = refs["logits"]
    token = jnp.full((1,), jnp.maximum(access.load(refs["token"].at[row]), 0))
    here = jnp.full((1,), row)
    chosen = access.load(logits.at[here, token])
    total = _log_total(load("most", LEAST)[0], load("sums", 0.0)[0])
    access.store(refs["chosen"].at[here], unordered(as_numbers(chosen)) - total)
    if not best:
        return
    room = next_power_of_2(best)
    _, groups = _best(*load("groups", LEAST), best, room)
    ids = jnp.where(groups == GREATEST, vocab, groups * GROUP)[:, None] + iota((room, GROUP), 1)
    real = ids < vocab
    other = LEAST if logits.dtype == jnp.int32 else -jnp.inf
    held = access.load(logits.at[jnp.full_like(ids, row), ids], mask=real, other=other)
    values, ids = _best(jnp.where(real, as_numbers(held), LEAST), ids, best, room)
    i = iota((room,), 0)
    for name, x in (("ids", ids), ("top", unordered(values) - total)):
        access.store(refs[name].at[jnp.full_like(i, row), i], x, mask=i < best)


def likeliest(
    logits: Array, token: Array, best: int, *, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """The log-probabilities of a token of each row and of its likeliest ones.

    Args:
        logits: float32 `[R, V]`; or int32, as `ordered` has them. V is `MOST_TOKENS` or less.
        token: int32 `[R]`; what is less than 0 is told of 0.
        best: n, how many of the likeliest, V or less.
        interpret: run on a CPU.

    Returns:
        Of the token, float32 `[R]`; ids of the likeliest, int32 `[R, n]`, as `lax.top_k` orders
        them; their log-probabilities, float32 `[R, n]`.
    """
    rows, vocab = logits.shape
    seen = survey(logits, interpret=interpret)
    inputs = {"logits": logits, "token": token, **seen._asdict()}
    outputs = {"chosen": jax.ShapeDtypeStruct((rows,), jnp.float32)}
    if best:
        outputs["ids"] = jax.ShapeDtypeStruct((rows, best), jnp.int32)
        outputs["top"] = jax.ShapeDtypeStruct((rows, best), jnp.float32)

    def kernel(*refs):
        _rank(dict(zip([*inputs, *outputs], refs, strict=True)), vocab=vocab, best=best)

    chosen, *told = kernel_call(
        kernel,
        grid=(rows,),
        out_shape=list(outputs.values()),
        interpret=interpret,
        num_warps=_WARPS,
        name=KERNEL_NAME,
    )(*inputs.values())
    nothing = jnp.zeros((rows, 0), jnp.int32), jnp.zeros((rows, 0), jnp.float32)
    ids, top = told or nothing
    return chosen, ids, top
