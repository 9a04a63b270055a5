"""The kernel that draws: noise, filters and the choice, in one launch.

A program has a part of the vocabulary, of all rows, in its registers. Three things need all
programs:

- `top_k`: where the k-th largest logit lies. Each phase counts the tokens ahead of seven places
  between two that have it between them, and goes on between two neighbours.
- The token that is ahead, noise included (`ffjax.sampling.draw.sample`), of those in question.
- `top_p`: whether that token belongs to the likeliest ones that sum up to it. If it does not, no
  token that is less likely does: it and they leave, and the next one that is ahead is looked at.
  This is the token that would be ahead if all had been left out before, for the noise is the same;
  and most of the time the first is taken.

Nothing is sorted. Logits are told apart by how far they lie behind the row's largest, in units of
the temperature; what lies further than `_FURTHEST` behind is never drawn: noise spans less.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.draw.exchange import Exchange, exchange_shapes
from pallas_kernels.draw.plan import DrawPlan
from pallas_kernels.draw.threefry import gumbel
from pallas_kernels.program import iota
from pallas_kernels.sync import GridSync

__all__ = ["KERNEL_NAME", "draw_tokens"]

# The kernel's name in compiled programs and in profiles.
KERNEL_NAME = "ffjax_draw"

# Gumbel noise of float32 lies between -4.5 and 16.7.
_FURTHEST = 32.0
# Places that a phase of the search looks at, and phases after which what is left is equal: it lies
# within 32 / 8^8, two millionths of a temperature.
_PLACES = 7
_MOST_PHASES = 8
_LEAST_TEMPERATURE = 1e-30
# Masses are summed as two integers: units of 2^-_UNIT, and the rest in units of 2^-_REST of one.
_REST_BITS = 22
_SUMS = _PLACES


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


def _search(exchange: Exchange, behind: Array, top_k: Array) -> tuple[Array, Array]:
    """Below which distance the `top_k` nearest lie, `[B]`, and the next phase's number.

    Infinite where fewer lie within reach, or all are wanted.
    """
    vocab = exchange.plan.vocab_size

    def look(state):
        phase, low, high, count, done = state
        step = (high - low) / (_PLACES + 1)
        places = [low + step * (i + 1) for i in range(_PLACES)]
        own = [jnp.sum((behind < at[:, None]).astype(jnp.int32), axis=1) for at in places]
        counts = exchange.total(phase, tuple(own))
        # From the last to the first place that has enough below it.
        new_low, new_high, new_count = low, high, count
        for at, below in zip(reversed(places), reversed(counts), strict=True):
            enough = below >= top_k
            new_high = jnp.where(enough, at, new_high)
            new_count = jnp.where(enough, below, new_count)
        for at, below in zip(places, counts, strict=True):
            new_low = jnp.where(below < top_k, at, new_low)
        low, high = jnp.where(done, low, new_low), jnp.where(done, high, new_high)
        count = jnp.where(done, count, new_count)
        return phase + 1, low, high, count, done | (count == top_k)

    def goes_on(state):
        phase, *_, done = state
        return (phase <= _MOST_PHASES) & (jnp.sum((~done).astype(jnp.int32)) > 0)

    within = jnp.sum((behind < _FURTHEST).astype(jnp.int32), axis=1)
    [within] = exchange.total(jnp.int32(0), (within,))
    all_wanted = (top_k >= vocab) | (within <= top_k)
    low = jnp.zeros(all_wanted.shape, jnp.float32)
    start = jnp.int32(1), low, jnp.full_like(low, _FURTHEST), within, all_wanted
    phase, _, high, _, _ = lax.while_loop(goes_on, look, start)
    return jnp.where(all_wanted, jnp.inf, high), phase


def _choose(
    exchange: Exchange,
    noisy: Array,
    token: Array,
    behind: Array,
    within: Array,
    nucleus: tuple[Array, Array],
    phase: Array,
) -> Array:
    """The token that is ahead, `[B]`, of those that may be drawn.

    Args:
        exchange: this program's end of it.
        noisy: float32 `[B, W]`.
        token: int32 `[1, W]`.
        behind: float32 `[B, W]`.
        within: float32 `[B]`, below which distance the tokens lie that top-k keeps.
        nucleus: float32 `[B]` each, `top_p` and `min_p`.
        phase: how many phases came before.
    """
    bits = _unit_bits(exchange.plan.vocab_size)
    top_p, min_p = nucleus
    kept = behind < within[:, None]
    mass = jnp.where(kept, jnp.exp(-behind), 0.0)
    parts = exchange.total(phase, _parts(jnp.sum(mass, axis=1), bits))
    wanted = jnp.where(top_p < 1, top_p * _whole(parts, bits), jnp.inf)
    kept &= behind <= -jnp.log(min_p)[:, None]

    def look(state):
        phase, end, *_ = state
        ahead = kept & (behind < end[:, None])
        best = exchange.best(phase, jnp.where(ahead, noisy, -jnp.inf), token, behind)
        above = jnp.where(kept & (behind < best.behind[:, None]), mass, 0.0)
        parts = exchange.total(phase + 1, _parts(jnp.sum(above, axis=1), bits))
        above = _whole(parts, bits)
        leaves = (above > 0) & (above >= wanted)
        done = jnp.sum(leaves.astype(jnp.int32)) == 0
        return phase + 2, jnp.where(leaves, best.behind, end), best.token, done

    end = jnp.full_like(within, jnp.inf)
    start = phase + 1, end, jnp.zeros(within.shape, jnp.int32), jnp.bool_(False)
    _, _, chosen, _ = lax.while_loop(lambda state: ~state[-1], look, start)
    return chosen


def _pair(ref: Any, row: Array) -> tuple[Array, Array]:
    """Two numbers of each row, of `[B, 2]`."""
    first, second = (plgpu.load(ref.at[row, jnp.full_like(row, i)]) for i in range(2))
    return first, second


def _draw(refs: dict[str, Any], plan: DrawPlan, *, filters: bool, interpret: bool) -> None:
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
    sync = GridSync(refs["counters"], plan.programs, interpret)
    exchange = Exchange(plan, refs, program, sync)
    if not filters:
        chosen = exchange.best(jnp.int32(0), noisy, token, jnp.zeros_like(noisy)).token
    else:
        likeliest = plgpu.load(refs["likeliest"].at[row])
        most = plgpu.load(refs["logits"].at[row, likeliest])
        scale = jnp.maximum(temperature, _LEAST_TEMPERATURE)
        behind = (most[:, None] - logits) / scale[:, None]
        behind = jnp.where(jnp.isnan(behind), 0.0, behind)
        behind = jnp.where(real, behind, jnp.inf)
        top_k = plgpu.load(refs["top_k"].at[row])
        nucleus = _pair(refs["nucleus"], row)
        within, phase = _search(exchange, behind, top_k)
        chosen = _choose(exchange, noisy, token, behind, within, nucleus, phase)
    plgpu.store(refs["token"].at[b], chosen, mask=jnp.broadcast_to(program == 0, b.shape))


def draw_tokens(
    plan: DrawPlan,
    logits: Array,
    likeliest: Array,
    keys: Array,
    temperature: Array,
    top_k: Array | None = None,
    nucleus: Array | None = None,
    *,
    interpret: bool = False,
) -> Array:
    """Draws a token of each row: `ffjax.sampling.draw.sample` of the logits that filters leave.

    Args:
        plan: the launch.
        logits: float32 `[B, V]`.
        likeliest: int32 `[B]`, the tokens of the largest logits; those of a NaN where there is one.
        keys: uint32 `[B, 2]`, the words of a Threefry key each.
        temperature: float32 `[B]`, 0 or more.
        top_k: int32 `[B]`, at least 1; None where nothing is filtered.
        nucleus: float32 `[B, 2]`, `top_p` and `min_p`; likewise.
        interpret: run on a CPU, with one program.

    Returns:
        int32 `[B]`.
    """
    filters = top_k is not None
    inputs: dict[str, Array] = {"logits": logits, "keys": keys, "temperature": temperature}
    if filters:
        assert nucleus is not None
        inputs |= {"likeliest": likeliest, "top_k": top_k, "nucleus": nucleus}
    shapes = exchange_shapes(plan, _SUMS)
    zeros = {name: jnp.zeros(shapes[name].shape, jnp.int32) for name in ("counters", "sums")}
    outputs = zeros | {name: shape for name, shape in shapes.items() if name not in zeros}
    outputs |= {"token": jax.ShapeDtypeStruct((plan.padded_batch,), jnp.int32)}
    out_shape = [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in outputs.values()]

    def kernel(*refs):
        named = dict(zip(inputs, refs[: len(inputs)], strict=True))
        named |= dict(zip(outputs, refs[len(inputs) + len(zeros) :], strict=True))
        _draw(named, plan, filters=filters, interpret=interpret)

    results = pl.pallas_call(
        kernel,
        grid=(plan.programs,),
        out_shape=out_shape,
        input_output_aliases={len(inputs) + i: i for i in range(len(zeros))},
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=plan.num_warps, num_stages=1),
        name=KERNEL_NAME,
    )(*inputs.values(), *zeros.values())
    return results[-1][: plan.batch]
