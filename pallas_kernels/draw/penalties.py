"""Penalties for tokens that came before, put on logits as a program loads them.

The formula, and the rounding of each of its steps, are those of `ffjax.sampling.edits.penalized` as
XLA compiles it for a GPU. There it is PTX, since Triton rounds a product and a sum together, and
XLA does not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.primitives import access, made, pure
from pallas_kernels.stream.ptx import lowered

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


def _text() -> str:
    """Operands: a result; the logit, the count, whether the prompt holds it, three penalties."""
    return " ".join(
        [
            "{ .reg .pred %said, %held, %p; .reg .f32 %l, %a, %b, %r, %n;",
            "mov.b32 %l, $1; mov.b32 %r, $4;",
            "setp.gt.s32 %said, $2, 0; setp.ne.s32 %held, $3, 0; or.pred %held, %held, %said;",
            "setp.gt.f32 %p, %l, 0f00000000;",
            "div.full.f32 %a, %l, %r; mul.rn.f32 %b, %l, %r; selp.f32 %a, %a, %b, %p;",
            "selp.f32 %l, %a, %l, %held;",
            "cvt.rn.f32.s32 %n, $2; mov.b32 %b, $6; mul.rn.f32 %n, %b, %n;",
            "mov.b32 %b, $5; add.rn.f32 %n, %b, %n; sub.rn.f32 %a, %l, %n;",
            "selp.f32 %l, %a, %l, %said; mov.b32 $0, %l; }",
        ]
    )


_penalized_p = pure(
    "ffjax_draw_penalized", lambda logits, *_: made(logits.shape, jnp.int32), results=False
)


@lowered.rule(_penalized_p)
def _(ctx, *args):
    arguments = lowered.values(ctx, args)
    result = lowered.like(ctx.avals_out[0].shape, lowered.i32())
    return lowered.assembly([result], _text(), "=r,r,r,r,r,r,r", arguments)[0]


def by_ptx(logits: Array, counts: Array, prompt: Array, *penalties: Array) -> Array:
    """The same as `penalized`, of arrays of one dimension or more, in PTX."""
    floats = logits, *(jnp.broadcast_to(x, logits.shape) for x in penalties)
    bits, *rest = (lax.bitcast_convert_type(x, jnp.int32) for x in floats)
    out = _penalized_p.bind(bits, counts, prompt.astype(jnp.int32), *rest)
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
        # from before they first meet that one, which writes behind that.
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
        """Counts the token that was fed, if it is one of these; behind the row's first meeting.

        Args:
            token: int32 `[1, W]`, all of this program's.
        """
        if "fed" not in self._refs:
            return
        where = jnp.full_like(token, self._row), token
        counts = jnp.full_like(token, self._fed_count)
        access.store(self._refs["counts"].at[where], counts, mask=token == self.fed)
