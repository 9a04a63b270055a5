"""The kernel that draws: noise, filters and the choice, in one launch.

A program has a part of the vocabulary, of all rows, in its registers. The token that is ahead,
noise included (`ffjax.sampling.draw.sample`), is found first, and then whether filters leave it:

- `min_p` has left out what it leaves out before.
- `top_k`: fewer than so many tokens are likelier.
- `top_p`: the likelier tokens do not sum up to this share of what `top_k` keeps.

If they do not leave it, they leave no token that is less likely either: it and those are out, and
the next one that is ahead is looked at. That is the token which would be ahead if all had been left
out from the start, for the noise is the same. Most of the time the first is taken.

What `top_k` keeps sums up to something that is known to lie between two bounds. Only while the
answer hangs on where, the k-th likeliest token is searched for: each meeting counts and sums the
tokens ahead of some places between two that have it between them.

Nothing is sorted. Logits are told apart by how far they lie behind the row's largest, in units of
the temperature; what lies further than `_FURTHEST` behind is never drawn: noise spans less.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.draw.exchange import Best, Exchange, arrivals_shape, exchange_shapes
from pallas_kernels.draw.plan import DrawPlan
from pallas_kernels.draw.threefry import gumbel
from pallas_kernels.program import iota

__all__ = ["KERNEL_NAME", "draw_tokens", "no_arrivals"]

# The kernel's name in compiled programs and in profiles.
KERNEL_NAME = "ffjax_draw"

# Gumbel noise of float32 lies between -4.5 and 16.7.
_FURTHEST = 32.0
# Places that a step of the search looks at, and steps after which what is left is equal: it lies
# within 32 / 4^12, two millionths of a temperature.
_PLACES = 3
_MOST_STEPS = 12
_LEAST_TEMPERATURE = 1e-30
# Masses are summed as two integers: units of 2^-_UNIT, and the rest in units of 2^-_REST of one.
_REST_BITS = 22
# Most sums of a meeting: a count and two integers of a mass, of the candidate and of each place.
_SUMS = 3 * (1 + _PLACES)


def _unit_bits(vocab_size: int) -> int:
    """A mass of up to V in so small units stays below 2^30."""
    return 30 - (vocab_size - 1).bit_length()


def _parts(mass: Array, bits: int) -> tuple[Array, Array]:
    """A mass as two integers."""
    scaled = mass * 2.0**bits
    whole = jnp.floor(scaled)
    rest = (scaled - whole) * 2.0**_REST_BITS
    return whole.astype(jnp.int32), rest.astype(jnp.int32)


def _whole(parts: tuple[Array, ...], bits: int) -> Array:
    """The mass of two integers."""
    whole, rest = (part.astype(jnp.float32) for part in parts)
    return (whole + rest * 2.0**-_REST_BITS) * 2.0**-bits


class _Search(NamedTuple):
    """Where the k-th likeliest token lies, of each row `[B]`.

    Attributes:
        low: fewer than k tokens lie nearer than this to the likeliest.
        high: k or more lie nearer than this.
        low_mass: what the former sum up to.
        high_mass: what the latter do.
        steps: int32 scalar, how many steps it has made.
    """

    low: Array
    high: Array
    low_mass: Array
    high_mass: Array
    steps: Array

    def places(self) -> list[Array]:
        """Where to look next: between the two."""
        width = (self.high - self.low) / (_PLACES + 1)
        return [self.low + width * (i + 1) for i in range(_PLACES)]

    def narrowed(self, counts: list[Array], masses: list[Array], top_k: Array) -> _Search:
        """With what lies nearer than each place."""
        low, high, low_mass, high_mass, steps = self
        places = self.places()
        looked = [*zip(places, counts, masses, strict=True)]
        for at, count, mass in looked:
            few = count < top_k
            low, low_mass = jnp.where(few, at, low), jnp.where(few, mass, low_mass)
        for at, count, mass in reversed(looked):
            # All that lies nearer is what `top_k` keeps, if it is so many exactly.
            enough = count >= top_k
            high, high_mass = jnp.where(enough, at, high), jnp.where(enough, mass, high_mass)
            exact = count == top_k
            low, low_mass = jnp.where(exact, at, low), jnp.where(exact, mass, low_mass)
        last = steps + 1 >= _MOST_STEPS
        low_mass = jnp.where(last, high_mass, low_mass)
        return _Search(low, high, low_mass, high_mass, steps + 1)


class _Candidate(NamedTuple):
    """What is looked at, of each row `[B]`.

    Attributes:
        end: less likely tokens, which lie so far behind, are out.
        best: the token that is ahead of all others.
        settled: whether it is the choice.
    """

    end: Array
    best: Best
    settled: Array


def _sum_of(exchange: Exchange, where: Array, mass: Array) -> tuple[Array, Array, Array]:
    """This program's count and mass of some tokens, bool `[B, W]`, as `Exchange.total` takes it."""
    count = jnp.sum(where.astype(jnp.int32), axis=1)
    bits = _unit_bits(exchange.plan.vocab_size)
    return count, *_parts(jnp.sum(jnp.where(where, mass, 0.0), axis=1), bits)


def _choose(
    exchange: Exchange,
    noisy: Array,
    token: Array,
    behind: Array,
    top_k: Array,
    nucleus: tuple[Array, Array],
) -> Array:
    """The token that is ahead, `[B]`, of those that may be drawn.

    Args:
        exchange: this program's end of it.
        noisy: float32 `[B, W]`.
        token: int32 `[1, W]`.
        behind: float32 `[B, W]`.
        top_k: int32 `[B]`.
        nucleus: float32 `[B]` each, `top_p` and `min_p`.
    """
    bits = _unit_bits(exchange.plan.vocab_size)
    top_p, min_p = nucleus
    mass = jnp.exp(-behind)
    possible = behind <= -jnp.log(min_p)[:, None]
    by_count = top_k < exchange.plan.vocab_size

    def ahead(meeting: Array, end: Array, parts: tuple[Array, ...] = ()) -> Any:
        there = possible & (behind < end[:, None])
        return exchange.best(meeting, jnp.where(there, noisy, -jnp.inf), token, behind, parts)

    def look(
        meeting: Array, at: Array, search: _Search, searches: Array
    ) -> tuple[Array, Array, _Search]:
        """Count and mass of what is likelier than a candidate; and a step of the search."""
        own = _sum_of(exchange, behind < at[:, None], mass)

        def with_search():
            parts = own
            for place in search.places():
                parts += _sum_of(exchange, behind < place[:, None], mass)
            totals = exchange.total(meeting, parts)
            counts = [totals[i] for i in range(3, len(totals), 3)]
            masses = [_whole(totals[i + 1 : i + 3], bits) for i in range(3, len(totals), 3)]
            return (*totals[:3], search.narrowed(counts, masses, top_k))

        def without():
            return (*exchange.total(meeting, own), search)

        count, whole, rest, search = lax.cond(searches, with_search, without)
        return count, _whole((whole, rest), bits), search

    def settle(state):
        meeting, candidate, search, searches = state
        end, best, settled = candidate
        count, above, search = look(meeting, best.behind, search, searches)
        # Of equal tokens all stay, so that the likeliest always does.
        out = (count > 0) & (count >= top_k)
        out |= (above > 0) & (above >= top_p * search.high_mass) & (top_p < 1)
        # What stays of `top_k` sums up to no less than what is likelier and the candidate itself.
        least = jnp.maximum(search.low_mass, above + jnp.exp(-best.behind))
        in_ = ~out & ((top_p >= 1) | (above == 0) | (above < top_p * least))
        settled |= in_
        out &= ~settled
        searches = jnp.sum((~settled & ~out).astype(jnp.int32)) > 0
        end = jnp.where(out, best.behind, end)
        again = jnp.sum(out.astype(jnp.int32)) > 0
        best = lax.cond(again, lambda: ahead(meeting + 1, end)[0], lambda: best)
        meeting = jnp.where(again, meeting + 2, meeting + 1)
        return meeting, _Candidate(end, best, settled), search, searches

    def unsettled(state):
        return jnp.sum((~state[1].settled).astype(jnp.int32)) > 0

    end = jnp.full(top_k.shape, jnp.inf)
    # All that is near enough to be drawn: what `top_k` keeps, where it is off.
    parts = _sum_of(exchange, behind < _FURTHEST, mass)
    first, total = ahead(jnp.int32(0), end, parts)
    everything = _whole(total[1:], bits)
    keeps_all = ~by_count | (total[0] <= top_k)
    nothing = jnp.zeros_like(end)
    search = _Search(
        low=nothing,
        high=jnp.full_like(end, _FURTHEST),
        low_mass=jnp.where(keeps_all, everything, nothing),
        high_mass=everything,
        steps=jnp.int32(0),
    )
    # Where nothing is left out, the first is the choice.
    free = keeps_all & (top_p >= 1)
    start = jnp.int32(1), _Candidate(end, first, free), search, jnp.bool_(False)
    return lax.while_loop(unsettled, settle, start)[1].best.token


def _pair(ref: Any, row: Array) -> tuple[Array, Array]:
    """Two numbers of each row, of `[B, 2]`."""
    first, second = (plgpu.load(ref.at[row, jnp.full_like(row, i)]) for i in range(2))
    return first, second


def _draw(refs: dict[str, Any], plan: DrawPlan, *, filters: bool) -> None:
    program = pl.program_id(0)
    rows = plan.padded_batch
    b = iota((rows,), 0)
    row = jnp.minimum(b, plan.batch - 1)  # what a row beyond the last does is for nobody
    token = program * plan.width + iota((1, plan.width), 1)
    real = jnp.broadcast_to(token < plan.vocab_size, (rows, plan.width))
    where = jnp.broadcast_to(row[:, None], real.shape), jnp.broadcast_to(token, real.shape)
    logits = plgpu.load(refs["logits"].at[where], mask=real, other=-jnp.inf)
    temperature = plgpu.load(refs["temperature"].at[row])
    key = _pair(refs["keys"], row)
    index = jnp.broadcast_to(token.astype(jnp.uint32), real.shape)
    noisy = logits + temperature[:, None] * gumbel((key[0][:, None], key[1][:, None]), index)
    # A NaN wins, as in jnp.argmax.
    noisy = jnp.where(jnp.isnan(logits), jnp.inf, noisy)
    exchange = Exchange(plan, refs, program)
    if not filters:
        best, _ = exchange.best(jnp.int32(0), noisy, token, jnp.zeros_like(noisy))
        chosen = best.token
    else:
        likeliest = plgpu.load(refs["likeliest"].at[row])
        most = plgpu.load(refs["logits"].at[row, likeliest])
        scale = jnp.maximum(temperature, _LEAST_TEMPERATURE)
        behind = (most[:, None] - logits) / scale[:, None]
        behind = jnp.where(jnp.isnan(behind), 0.0, behind)
        behind = jnp.where(real, behind, jnp.inf)
        top_k = plgpu.load(refs["top_k"].at[row])
        nucleus = _pair(refs["nucleus"], row)
        chosen = _choose(exchange, noisy, token, behind, top_k, nucleus)
    plgpu.store(refs["token"].at[b], chosen, mask=jnp.broadcast_to(program == 0, b.shape))


def no_arrivals() -> Array:
    """What the first of some launches is given as `arrivals`."""
    shape = arrivals_shape()
    return jnp.zeros(shape.shape, shape.dtype)


def draw_tokens(
    plan: DrawPlan,
    logits: Array,
    likeliest: Array,
    keys: Array,
    arrivals: Array,
    temperature: Array,
    top_k: Array | None = None,
    nucleus: Array | None = None,
    *,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Draws a token of each row: `ffjax.sampling.draw.sample` of the logits that filters leave.

    Args:
        plan: the launch.
        logits: float32 `[B, V]`.
        likeliest: int32 `[B]`, the tokens of the largest logits; those of a NaN where there is one.
        keys: uint32 `[B, 2]`, the words of a Threefry key each.
        arrivals: `no_arrivals()`, or what the launch before returned; of the same plan.
        temperature: float32 `[B]`, 0 or more.
        top_k: int32 `[B]`, at least 1; None where nothing is filtered.
        nucleus: float32 `[B, 2]`, `top_p` and `min_p`; likewise.
        interpret: run on a CPU, with one program.

    Returns:
        The tokens, int32 `[B]`, and what the next launch is given as `arrivals`.
    """
    inputs: dict[str, Array] = {"logits": logits, "keys": keys, "temperature": temperature}
    filters = top_k is not None
    if filters:
        assert nucleus is not None
        inputs |= {"likeliest": likeliest, "top_k": top_k, "nucleus": nucleus}
    outputs = {
        "arrivals": arrivals_shape(),
        "token": jax.ShapeDtypeStruct((plan.padded_batch,), jnp.int32),
        **exchange_shapes(plan, _SUMS),
    }

    def kernel(*refs):
        named = dict(zip(inputs, refs[: len(inputs)], strict=True))
        named |= dict(zip(outputs, refs[len(inputs) + 1 :], strict=True))
        _draw(named, plan, filters=filters)

    arrivals, token, *_ = pl.pallas_call(
        kernel,
        grid=(plan.programs,),
        out_shape=[*outputs.values()],
        input_output_aliases={len(inputs): 0},
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=plan.num_warps, num_stages=1),
        name=KERNEL_NAME,
    )(*inputs.values(), arrivals)
    return token[: plan.batch], arrivals
