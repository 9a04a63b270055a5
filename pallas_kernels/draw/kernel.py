"""The kernel that draws: noise, filters and the choice, in one launch.

A program has a part of one row in its registers. The token that is ahead, noise included
(`ffjax.sampling.draw.sample`), is the choice, if filters leave it:

- `min_p` has left out what it leaves out before.
- `top_k`: fewer than so many tokens are likelier.
- `top_p`: the likelier tokens do not sum up to this share of what `top_k` keeps.

What those two keep lies above a border (`pallas_kernels.draw.border`), and each meeting of a row's
programs looks at some places for it. Tokens that are known to lie beneath are out. A meeting also
tells which token is ahead of all that lie above some of its places, those that may turn out to be
the border. That is the token which would be ahead if all beneath had been left out from the start,
for the noise is the same. If it lies above the border for certain it is drawn. If that is not known
the next meeting asks whether it does.

Penalties are put on the logits as they are loaded (`pallas_kernels.draw.penalties`). Where one may
have changed which token is the likeliest, a meeting of its own looks for that.

Nothing is sorted: tokens are told apart by their logits, as XLA's filters do. All that is summed is
integers (`pallas_kernels.draw.mass`), which add up to the same in any order: a row draws the same
token however it is cut, and so whatever batch it stands in. XLA sums floating-point numbers: a
token at the border of `top_p`, to a few millionths of what is kept, may fall on its other side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.calls import kernel_call
from pallas_kernels.draw import ptx
from pallas_kernels.draw.border import WINNERS, Border, first_places, out_of_reach
from pallas_kernels.draw.exchange import SLOTS, Best, Exchange, Told, board_shape, in_slots
from pallas_kernels.draw.mass import mass_bits, masses
from pallas_kernels.draw.noise import noisy
from pallas_kernels.draw.penalties import Before, Penalties
from pallas_kernels.draw.plan import DrawPlan
from pallas_kernels.draw.threefry import folded, gumbel
from pallas_kernels.logprobs import ordered
from pallas_kernels.primitives import access
from pallas_kernels.program import iota

__all__ = ["KERNEL_NAME", "Drawn", "draw_tokens", "no_board"]

# The kernel's name in compiled programs and in profiles.
KERNEL_NAME = "ffjax_draw"

_LEAST_TEMPERATURE = 1e-30
# Meetings after which what is ahead is taken, whatever it is. Each narrows the border to a quarter
# of what it was at worst, so that less than half as many leave a float32 no room.
_MOST_MEETINGS = 32
_NOBODY = 2**31 - 1


class _Row(NamedTuple):
    """A row: a program's part of it, `[1, W]`, and its parameters, scalars.

    Attributes:
        logits: float32, -inf where there is no token.
        token: int32.
        mass: int32.
        top_k: int32.
        top_p: float32.
    """

    logits: Array
    token: Array
    mass: Array
    top_k: Array
    top_p: Array

    def narrowed(
        self, border: Border, places: list[Array], told: Told
    ) -> tuple[Border, Array, Array]:
        """What is known of the border after a meeting, and which token is ahead of what is left.

        Args:
            border: what was known before.
            places: where the meeting looked. Above the place of a slot that held a token, there is
                nothing.
            told: what it found: in the last slots, tokens that are ahead above the last places.

        Returns:
            What is known, a token, int32, and whether the meeting has told it.
        """
        each = in_slots([*places, *[jnp.float32(jnp.inf)] * (SLOTS - len(places))])
        there = iota((SLOTS,), 0) < len(places)
        counts, sums = (jnp.where(there, x, 0) for x in (told.counts, told.masses))
        border, out = border.narrowed(each, counts, sums, self.top_k, self.top_p)
        # What lies above the highest place that is out are the fewest. By places it could not be
        # told for certain: where the kernel is interpreted, two uses of one may round differently.
        fewest = jnp.min(jnp.where(out & there, counts, _NOBODY))
        ahead = [
            jnp.max(jnp.where(iota((SLOTS,), 0) == SLOTS - 1 - i, told.tokens, -1))
            for i in range(WINNERS)
        ]
        token = jnp.int32(-1)
        for i, one in enumerate(ahead):
            place = iota((SLOTS,), 0) == len(places) - 1 - i
            highest = place & out & (counts == fewest)
            token = jnp.where(jnp.max(highest.astype(jnp.int32)) > 0, one, token)
        return border, token, token >= 0


class _State(NamedTuple):
    """Between meetings; scalars.

    Attributes:
        meetings: int32, how many the row has had.
        border: what is known of it.
        token: int32, the one that is ahead, unless it is known to be out.
        logit: float32, its logit; -inf where there is none yet.
        settled: whether it is the choice.
    """

    meetings: Array
    border: Border
    token: Array
    logit: Array
    settled: Array


class _Chosen(NamedTuple):
    """A row's token; scalars.

    Attributes:
        token: int32.
        logit: float32, its own.
        meetings: int32, how many the row has had.
    """

    token: Array
    logit: Array
    meetings: Array


def _choose(
    exchange: Exchange,
    row: _Row,
    before: Array,
    most: Array,
    scale: Array,
    noise: Any,
    logit_of: Any,
    early: bool,
) -> _Chosen:
    """The token that is drawn.

    Args:
        exchange: this program's end of it.
        row: the row.
        before: int32, how many it has had so far.
        most: its largest logit, finite.
        scale: the temperature.
        noise: makes the logits with noise, float32 `[1, W]`, of tokens above a border; -inf where
            `min_p` leaves out. Beneath the border they may be -inf, or be made.
        logit_of: any token's.
        early: whether the first meeting tells which token is ahead of all.
    """
    known = Border.unknown(most, scale)
    places = first_places(SLOTS - early, most, scale)
    made = noise(known.outside) if early else None
    best = None if made is None else Best(made, row.token)
    told = exchange.told(exchange.tell(before, row.logits, row.mass, places, best))
    border, *_ = row.narrowed(known, places, told)
    first = _State(before + 1, border, told.token, jnp.full_like(most, -jnp.inf), jnp.bool_(False))
    if made is None:
        # Most tokens are out by now, unless nearly all are kept.
        made = noise(border.outside)
    else:
        logit = logit_of(told.token)
        first = first._replace(logit=logit, settled=logit >= border.inside)

    def meet(state: _State) -> _State:
        # Of a token that is out, what the border was last known to be.
        beneath = jnp.maximum(state.logit, state.border.outside)
        places = state.border.places(beneath, row.top_k, row.top_p)
        best = Best(made, row.token, WINNERS)
        told = exchange.told(exchange.tell(state.meetings, row.logits, row.mass, places, best))
        border, ahead, known = row.narrowed(state.border, places, told)
        is_out = state.logit <= border.outside
        asked = is_out & known
        token = jnp.where(asked, ahead, state.token)
        logit = jnp.where(asked, logit_of(token), jnp.where(is_out, -jnp.inf, state.logit))
        # Where all tokens are kept, a logit of -inf is none.
        settled = (logit >= border.inside) & (logit > -jnp.inf)
        return _State(state.meetings + 1, border, token, logit, settled)

    def unsettled(state: _State) -> Array:
        return ~state.settled & (state.meetings - before < _MOST_MEETINGS)

    out = lax.while_loop(unsettled, meet, first)
    return _Chosen(out.token, out.logit, out.meetings)


def _likeliest(
    exchange: Exchange,
    penalties: Penalties,
    given: Array | None,
    before: Array,
    logits: Array,
    token: Array,
) -> _Chosen:
    """The likeliest token of a row after its penalties; of equals the lowest, and a NaN first.

    It is the one from before if that has none, and nothing has become likelier. Else the row's
    programs look for it, which takes a meeting.

    Args:
        exchange: this program's end of it.
        penalties: the row's.
        given: int32, the likeliest before penalties; None: nobody knows.
        before: int32, how many meetings the row has had.
        logits: float32 `[1, W]`, with penalties.
        token: int32 `[1, W]`.
    """

    def looked_for() -> _Chosen:
        told = exchange.told(exchange.tell(before, logits, token, [], Best(logits, token)))
        return _Chosen(told.token, penalties.one(told.token)[0], before + 1)

    if given is None:
        return looked_for()
    logit, held = penalties.one(given)
    sure = penalties.none | (penalties.lowers & ~held)
    return lax.cond(sure, lambda: _Chosen(given, logit, before), looked_for)


def _draw(refs: dict[str, Any], plan: DrawPlan, interpret: bool) -> None:
    program = pl.program_id(0)
    b, part = lax.div(program, jnp.int32(plan.parts)), program % plan.parts
    shared = None if interpret else ptx.reserve(plan.num_warps)

    def of_row(name: str, *at: int) -> Array | None:
        return access.load(refs[name].at[b, *map(jnp.int32, at)]) if name in refs else None

    # All loads are asked for before the first is waited for.
    likeliest, temperature, from_ = map(of_row, ("likeliest", "temperature", "first"))
    one, other, top_k = of_row("keys", 0), of_row("keys", 1), of_row("top_k")
    top_p, min_p = of_row("nucleus", 0), of_row("nucleus", 1)
    exchange = Exchange(plan, refs["board"], b, part, shared)
    before, launches, drawn_before = exchange.before()
    penalties = None
    if plan.penalizes:
        penalties = Penalties(refs, b, launches, drawn_before, plan.vocab_size, interpret)
    token = part * plan.width + iota((1, plan.width), 1)
    real = token < plan.vocab_size
    where = jnp.full_like(token, b), token
    logits = access.load(refs["logits"].at[where], mask=real, other=-jnp.inf)
    if "kept" in refs:
        step = jnp.full_like(token, launches), *where
        access.store(refs["kept"].at[step], ordered(logits), mask=real)
    if penalties is not None:
        logits = penalties.put_on(logits, where, real)

    def logit_of(token: Array) -> Array:
        if penalties is None:
            return access.load(refs["logits"].at[b, token])
        return penalties.one(token)[0]

    if penalties is None:
        assert likeliest is not None
        first = _Chosen(likeliest, logit_of(likeliest), before)
    else:
        first = _likeliest(exchange, penalties, likeliest, before, logits, token)
    chosen = first
    if plan.draws:
        assert temperature is not None and one is not None and other is not None
        most = first.logit
        scale = jnp.maximum(temperature, _LEAST_TEMPERATURE)
        key = one, other
        if from_ is not None:
            key = folded(key, (from_ + launches).astype(jnp.uint32))

        def noise(outside: Array) -> Array:
            least = outside
            if min_p is not None:
                least = jnp.maximum(outside, most + scale * jnp.log(min_p))
            if not interpret:
                together = plan.width // (32 * plan.num_warps)
                return noisy(logits, key, token, temperature, least, together)
            made = logits + temperature * gumbel(key, token.astype(jnp.uint32))
            return jnp.where(logits >= least, made, -jnp.inf)

        def drawn() -> _Chosen:
            if top_k is None or top_p is None:
                best = Best(noise(out_of_reach(most, scale)), token)
                telling = exchange.tell(first.meetings, logits, token, [], best)
                ahead = exchange.told(telling).token
                logit = most if penalties is None else logit_of(ahead)
                return _Chosen(ahead, logit, first.meetings + 1)
            mass = masses(logits, most, scale, token, mass_bits(plan.vocab_size))
            k = jnp.where(top_k < plan.vocab_size, top_k, _NOBODY)
            row = _Row(logits, token, mass, k, top_p)
            how = most, scale, noise, logit_of, plan.early
            return _choose(exchange, row, first.meetings, *how)

        # The likeliest is the choice without noise, and where it is NaN, as in jnp.argmax, or
        # infinite.
        drawn_at_all = (temperature > 0) & (jnp.abs(most) < jnp.inf)
        chosen = lax.cond(drawn_at_all, drawn, lambda: first)
    exchange.leave(chosen.meetings, launches + 1, chosen.token)
    if penalties is not None:
        penalties.count(token)
    tells = jnp.full((1,), part == 0)
    access.store(refs["token"].at[jnp.full((1,), b)], jnp.full((1,), chosen.token), mask=tells)
    if penalties is not None:
        logit = jnp.full((1,), chosen.logit)
        access.store(refs["logit"].at[jnp.full((1,), b)], logit, mask=tells)


def no_board(plan: DrawPlan) -> Array:
    """What the first of some launches is given as `board`."""
    shape = board_shape(plan)
    return jnp.zeros(shape.shape, shape.dtype)


class Drawn(NamedTuple):
    """What a launch has made.

    Attributes:
        token: int32 `[B]`.
        board: what the next launch is given.
        logit: float32 `[B]`, of each token, with its penalties; None without these.
        counts: int32 `[B, V]`, those of `Before`, with the tokens that were fed; None if there
            were none.
        kept: int32 `[n, B, V]`, what was given as `kept`, with these logits; None if none was.
    """

    token: Array
    board: Array
    logit: Array | None
    counts: Array | None
    kept: Array | None


def draw_tokens(
    plan: DrawPlan,
    logits: Array,
    likeliest: Array | None,
    keys: Array | None,
    board: Array,
    temperature: Array | None = None,
    top_k: Array | None = None,
    nucleus: Array | None = None,
    first: Array | None = None,
    *,
    before: Before | None = None,
    kept: Array | None = None,
    interpret: bool = False,
) -> Drawn:
    """Draws a token of each row: `ffjax.sampling.draw.sample` of the logits that filters leave.

    Args:
        plan: the launch.
        logits: float32 `[B, V]`.
        likeliest: int32 `[B]`, the tokens of the largest logits; those of a NaN where there is one.
            None, if the plan has penalties: the kernel looks for them.
        keys: uint32 `[B, 2]`, the words of a Threefry key each. None where nothing is drawn.
        board: `no_board(plan)`, or what the launch before returned; of the same plan.
        temperature: float32 `[B]`, 0 or more; None likewise.
        top_k: int32 `[B]`, at least 1; V and more keep all. None where the plan has no filters.
        nucleus: float32 `[B, 2]`, `top_p` and `min_p`; None likewise.
        first: int32 `[B]`, 0 or more, what the first launch with a board folds into the keys, as
            `jax.random.fold_in` does; each later one folds in 1 more. None: the keys are of this
            draw.
        before: which tokens came before; None where the plan has no penalties. Where a token is
            fed, its `counts` are used up.
        kept: int32 `[n, B, V]`, where the i-th launch with a board, from 0, writes its logits, as
            `pallas_kernels.logprobs.ordered` has them. It is used up. There are up to n launches.
        interpret: run on a CPU, where each row is one part.
    """
    inputs: dict[str, Any] = {"logits": logits, "likeliest": likeliest, "first": first}
    outputs = {"board": board, "token": jax.ShapeDtypeStruct((plan.batch,), jnp.int32)}
    given = {"board": board}
    if plan.draws:
        inputs |= {"keys": keys, "temperature": temperature}
    if plan.filters and plan.draws:
        inputs |= {"top_k": top_k, "nucleus": nucleus}
    if plan.penalizes:
        assert before is not None
        inputs |= before._asdict()
        outputs["logit"] = jax.ShapeDtypeStruct((plan.batch,), jnp.float32)
        if before.fed is not None:
            given["counts"] = outputs["counts"] = inputs.pop("counts")
    if kept is not None:
        given["kept"] = outputs["kept"] = kept
    inputs = {name: x for name, x in inputs.items() if x is not None}

    def kernel(*refs):
        # What is given and goes on is one array.
        names = [*inputs, *(f"given {name}" for name in given), *outputs]
        _draw(dict(zip(names, refs, strict=True)), plan, interpret)

    order = list(outputs)
    out = kernel_call(
        kernel,
        grid=(plan.programs,),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()],
        aliases={len(inputs) + i: order.index(name) for i, name in enumerate(given)},
        interpret=interpret,
        num_warps=plan.num_warps,
        name=KERNEL_NAME,
    )(*inputs.values(), *given.values())
    made = dict(zip(order, out, strict=True))
    more = (made.get(name) for name in ("logit", "counts", "kept"))
    return Drawn(made["token"], made["board"], *more)
