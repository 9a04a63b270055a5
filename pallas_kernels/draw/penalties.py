"""Penalties for tokens that came before, put on logits as a program loads them.

The formula, and the rounding of each of its steps, are those of `ffjax.sampling.edits.penalized` as
XLA compiles it for a GPU. There it is PTX, since Triton rounds a product and a sum together, and
XLA does not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.asm import Block, Register
from pallas_kernels.inline_ptx.operation import Operation
from pallas_kernels.primitives import access

__all__ = ["Before", "Penalties", "by_ptx", "penalized"]

# XLA's division may err by two units in the last place. A repetition penalty between 1 and this
# could let a token overtake one that it equals.
_LEAST_REPETITION = 1.00001


class Before(NamedTuple):
    """Which tokens came before, and what they cost; arrays of a whole batch.

    Attributes:
        penalties: float32 `[B, 3]`: of repetition, presence and frequency.
        prompt: bool `[B, V]`, whether the prompt holds a token.
        counts: int32 `[B, V]`, how often the answer does.
        fed: int32 `[B]`, a token that the answer holds beside these at the first launch with a
            board. At each later one it is the token that the launch before has drawn: an array of
            each launch's own would have to be copied. The kernel counts it. None: there is none,
            and `counts` stay as they are.
        running: bool `[B]`, in which sequences that is so; None: in all.
    """

    penalties: Any
    prompt: Any
    counts: Any
    fed: Any = None
    running: Any = None


def penalized(
    logits: Array,
    counts: Array,
    prompt: Array,
    repetition: Array,
    presence: Array,
    frequency: Array,
) -> Array:
    """Logits with penalties, by the formula of `ffjax.sampling.edits.penalized`.

    Args:
        logits: float32.
        counts: int32, how often the answer holds each token.
        prompt: bool, whether the prompt does.
        repetition: float32 scalar; the others likewise.
        presence: of each token that the answer holds.
        frequency: of each time that it does.
    """
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(prompt | (counts > 0), scaled, logits)
    return jnp.where(counts > 0, logits - (presence + frequency * counts), logits)


def _write_penalized(
    b: Block,
    result: Register,
    logit: Register,
    count: Register,
    prompt: Register,
    repetition: Register,
    presence: Register,
    frequency: Register,
) -> None:
    said, held, positive = b.preds("said", "held", "positive")
    number, other, times, cost, some = b.f32s("number", "other", "times", "cost", "some")
    b.mov(number, logit)
    b.mov(times, repetition)
    b.setp("gt", said, count, 0)
    b.setp("ne", held, prompt, 0)
    b.or_(held, held, said)
    b.comment("What the prompt or the answer holds is divided, or multiplied where it is negative.")
    b.setp("gt", positive, number, 0.0)
    b.div_full(other, number, times)
    b.mul_rn(some, number, times)
    b.selp(other, other, some, positive)
    b.selp(number, other, number, held)
    b.comment("Each step is rounded by itself: presence + frequency * count, then the difference.")
    b.to_float(cost, count)
    b.mov(some, frequency)
    b.mul_rn(cost, some, cost)
    b.mov(some, presence)
    b.add_rn(cost, some, cost)
    b.sub_rn(other, number, cost)
    b.selp(number, other, number, said)
    b.mov(result, number)


_penalized = Operation("ffjax_draw_penalized", _write_penalized)


def by_ptx(logits: Array, counts: Array, prompt: Array, *penalties: Array) -> Array:
    """The same as `penalized`, of arrays of one dimension or more, in PTX."""
    floats = logits, *(jnp.broadcast_to(x, logits.shape) for x in penalties)
    bits, *rest = (lax.bitcast_convert_type(x, jnp.int32) for x in floats)
    operands = bits, counts, prompt.astype(jnp.int32), *rest
    [out] = _penalized(*operands, results=["int32"], early=False)
    return lax.bitcast_convert_type(out, jnp.float32)


class Penalties:
    """Those of a row, in a program of the kernel that draws.

    Attributes:
        fed: int32 scalar, a token that is counted beside those before; -1 where there is none.
        lowers: whether no logit becomes greater.
        none: whether none changes.
    """

    def __init__(
        self,
        refs: dict[str, Any],
        row: Array,
        launches: Array,
        drawn: Array,
        vocab_size: int,
        interpret: bool,
    ):
        """Loads what holds for the whole row.

        Args:
            refs: of the fields of `Before`, by name; those that are None are not there.
            row: int32.
            launches: int32, how many there were with this board.
            drawn: int32, the token of the last one.
            vocab_size: V.
            interpret: by jnp, on a CPU.
        """
        self._refs, self._row = refs, row
        self._formula = penalized if interpret else by_ptx
        self._kinds = [access.load(refs["penalties"].at[row, jnp.int32(i)]) for i in range(3)]
        repetition, presence, frequency = self._kinds
        self.lowers = (
            ((repetition == 1) | (repetition > _LEAST_REPETITION))
            & (presence >= 0)
            & (frequency >= 0)
        )
        self.none = (repetition == 1) & (presence == 0) & (frequency == 0)
        self.fed = jnp.int32(-1)
        self._fed_count = jnp.int32(0)
        if "fed" not in refs:
            return
        fed = jnp.where(launches == 0, access.load(refs["fed"].at[row]), drawn)
        if "running" in refs:
            fed = jnp.where(access.load(refs["running"].at[row]), fed, -1)
        self.fed = jnp.where(fed < vocab_size, fed, -1)
        # Its count is written by one program of the row. What the others have of it, they have
        # from before they first meet that one, which writes after that.
        place = jnp.maximum(self.fed, 0)
        self._fed_count = access.load(refs["counts"].at[row, place]) + 1

    def _held(self, where: tuple[Array, Array], real: Array | None) -> tuple[Array, Array]:
        """How often the answers hold tokens, and whether the prompts do."""
        nothing = (0, False) if real is not None else (None, None)
        counts, prompt = (
            access.load(self._refs[name].at[where], mask=real, other=other)
            for name, other in zip(("counts", "prompt"), nothing, strict=True)
        )
        return jnp.where(where[1] == self.fed, self._fed_count, counts), prompt

    def put_on(self, logits: Array, where: tuple[Array, Array], real: Array) -> Array:
        """Tokens' logits with their penalties, float32 `[1, W]`.

        Args:
            logits: float32 `[1, W]`.
            where: rows and tokens, int32 `[1, W]`.
            real: bool `[1, W]`, which tokens there are.
        """
        return self._formula(logits, *self._held(where, real), *self._kinds)

    def one(self, token: Array) -> tuple[Array, Array]:
        """A token's logit with its penalties, and whether any is put on it; scalars."""
        where = jnp.full((1,), self._row), jnp.full((1,), token)
        raw = access.load(self._refs["logits"].at[where])
        counts, prompt = self._held(where, None)
        edited = self._formula(raw, counts, prompt, *self._kinds)
        # A NaN is kept by a maximum of one.
        held = jnp.max((prompt | (counts > 0)).astype(jnp.int32)) > 0
        return jnp.max(edited), held

    def count(self, token: Array) -> None:
        """Counts the token that was fed, if it is one of these; after the row's first meeting.

        Args:
            token: int32 `[1, W]`, all of this program's.
        """
        if "fed" not in self._refs:
            return
        where = jnp.full_like(token, self._row), token
        counts = jnp.full_like(token, self._fed_count)
        access.store(self._refs["counts"].at[where], counts, mask=token == self.fed)
