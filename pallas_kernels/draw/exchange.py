"""How the programs of a row tell each other what each has found in its part of it.

All meet some times. At a meeting each program writes what it has into a place of its own, and reads
all places of its row until each holds what belongs to this meeting; then all add it up alike. Words
carry a tag that says which meeting they belong to, as those of the fused kernel do, so that
nothing is counted, locked or fenced: a word is there or it is not.

There are two buffers, which the meetings of a row have in turn. A program writes to one again when
it has all words of the meeting in between. Who told those had read this buffer to the end: a
program's threads read all of it before a barrier, and tell the next meeting after that barrier.
Between launches nothing is read. A row's first meeting of a launch may have the buffer of its last
one in the launch before, or the other: meetings are numbered from launch to launch, and what counts
is that all words of a launch are read before the next begins. So one meeting a launch is enough,
and rows may have different numbers of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.dims import ceil_div
from pallas_kernels.draw import ptx
from pallas_kernels.draw.mass import halves, mass_bits, whole
from pallas_kernels.draw.plan import DrawPlan
from pallas_kernels.draw.ptx import SLOTS
from pallas_kernels.primitives import access
from pallas_kernels.program import iota
from pallas_kernels.sync import MAX_POLLS

__all__ = ["SLOTS", "Best", "Exchange", "Told", "board_shape", "meeting_tag"]

# What a meeting tells is read before the next one ends, and so may be overwritten after that.
_BUFFERS = 2
# Programs of a row poll lines of their own row: 32 words of 4 bytes.
_LINE = 32
_WORD = 4
# Words that a program keeps from launch to launch.
_OWN = 3


class Best(NamedTuple):
    """Tokens of which the one that is ahead is told; of equals that with the lowest id.

    Attributes:
        noisy: float32 `[1, W]`, logits with noise; a NaN is ahead of all else.
        token: int32 `[1, W]`, their ids.
        places: 0: of all tokens. Else, of those above each of the last so many places; then none is
            NaN.
    """

    noisy: Array
    token: Array
    places: int = 0

    @property
    def slots(self) -> int:
        """That tell a token: the last ones."""
        return max(1, self.places)


class Told(NamedTuple):
    """What the row's programs have found together.

    Attributes:
        counts: int32 `[SLOTS]`, how many tokens lie above each place. It means nothing in slots
            that hold a token.
        masses: float32 `[SLOTS]`, what they sum up to, in units of the likeliest's; likewise.
        tokens: int32 `[SLOTS]`, the ids of those that are ahead, in the last slots, if they were
            asked for. Where no token lies above a place, it is of no matter which.
    """

    counts: Array
    masses: Array
    tokens: Array

    @property
    def token(self) -> Array:
        """The token of the last slot, int32 scalar."""
        return jnp.max(jnp.where(iota((SLOTS,), 0) == SLOTS - 1, self.tokens, -1))


def board_shape(plan: DrawPlan) -> jax.ShapeDtypeStruct:
    """What launches hand on, int32 `[B, words]`; zeros to begin with.

    A row begins with three words of each of its programs: how many meetings and launches there
    were, and which token the last one has drawn. The rest is what was told.

    Args:
        plan: the launch.
    """
    told = _BUFFERS * plan.parts * 2 * SLOTS
    return jax.ShapeDtypeStruct((plan.batch, _counted(plan) + told), jnp.int32)


def _counted(plan: DrawPlan) -> int:
    """Words that programs keep for themselves, in whole lines."""
    return ceil_div(_OWN * plan.parts, _LINE) * _LINE


def meeting_tag(meeting: Array) -> Array:
    """What marks the words of a meeting, int32: not zero, which is nobody's, and another for the
    next meeting that has the same buffer.
    """
    return lax.div(meeting, jnp.int32(_BUFFERS)) % 2 + 1


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One program's end of it.

    Attributes:
        plan: the launch.
        board: the array of `board_shape`.
        row: this program's, int32.
        part: of the row, int32.
        shared: from `ptx.reserve`; None where the kernel is interpreted, and a row is one part.
    """

    plan: DrawPlan
    board: Any
    row: Array
    part: Array
    shared: Array | None

    def before(self) -> tuple[Array, Array, Array]:
        """What `leave` said in the launch before; zeros in the first one."""
        at = _OWN * self.part
        one, other, third = (access.load(self.board.at[self.row, at + i]) for i in range(_OWN))
        return one, other, third

    def leave(self, meetings: Array, launches: Array, token: Array) -> None:
        """Says what the next launch is to know, in words that this program alone reads.

        A row may have had no meeting, so that some of its programs come later than others leave.

        Args:
            meetings: of the row, in all launches.
            launches: how many there were.
            token: that was drawn.
        """
        for i, number in enumerate((meetings, launches, token)):
            place = jnp.full((1,), self.row), jnp.full((1,), _OWN * self.part + i)
            access.store(self.board.at[place], jnp.full((1,), number))

    def _place(self, meeting: Array, part: Array | int) -> Array:
        """Where on the board a part's words of a meeting begin, in bytes."""
        words = board_shape(self.plan).shape[1]
        at = (meeting % _BUFFERS * self.plan.parts + part) * 2 * SLOTS
        return (self.row * words + _counted(self.plan) + at) * _WORD

    def tell(
        self, meeting: Array, logits: Array, mass: Array, places: list[Array], best: Best | None
    ) -> Any:
        """Tells what lies above some places in this program's part, and which token is ahead.

        Args:
            meeting: int32, how many came before; of the row, in all launches.
            logits: float32 `[1, W]`.
            mass: int32 `[1, W]`.
            places: float32 scalars, one for each slot, or less; `best` has slots of its own.
            best: which tokens may be ahead; None: that is not asked.

        Returns:
            What `told` is given.
        """
        if self.shared is None:
            return self._alone(logits, mass, places, best)
        warps = self.plan.num_warps
        together = self.plan.width // (32 * warps)
        pair = None if best is None else (best.noisy, best.token)
        winners = 0 if best is None else best.places
        ptx.look(logits, mass, places, pair, winners, self.shared, together)
        own, tag = self._place(meeting, self.part), meeting_tag(meeting)
        told = 0 if best is None else best.slots
        ptx.tell(self.board, self.shared, own, tag, warps, told)
        return meeting, told

    def told(self, telling: Any) -> Told:
        """What all programs of the row have told, whatever each has to say.

        Args:
            telling: from `tell`.
        """
        if self.shared is None:
            return telling
        meeting, best = telling
        place, tag = self._place(meeting, 0), meeting_tag(meeting)
        warps, parts = self.plan.num_warps, self.plan.parts
        counts, masses, tokens = ptx.told(
            self.board, self.shared, place, tag, warps, parts, best, MAX_POLLS
        )
        bits = mass_bits(self.plan.vocab_size)
        tokens = jnp.minimum(tokens, self.plan.vocab_size - 1)
        return Told(counts, masses * 2.0 ** (-2 * bits), tokens)

    def _alone(self, logits: Array, mass: Array, places: list[Array], best: Best | None) -> Told:
        """What a program finds that has the whole row."""
        bits = mass_bits(self.plan.vocab_size)
        each = in_slots([*places, *[jnp.float32(jnp.inf)] * (SLOTS - len(places))])
        there = logits > each[:, None]
        high, low = halves(mass, bits)
        one, high, low = (jnp.sum(jnp.where(there, x, 0), axis=1) for x in (1, high, low))
        tokens = [jnp.int32(0)] * SLOTS
        if best is not None:
            above = [logits > place for place in places[len(places) - best.places :]]
            for i, among in enumerate(above or [jnp.full(logits.shape, True)]):
                noisy = jnp.where(among, best.noisy, -jnp.inf)
                ahead = (noisy == jnp.max(noisy)) | jnp.isnan(noisy)
                token = jnp.min(jnp.where(ahead, best.token, jnp.iinfo(jnp.int32).max))
                tokens[SLOTS - best.slots + i] = token
        return Told(one, whole(high, low, bits), in_slots(tokens))


def in_slots(values: list[Array]) -> Array:
    """Scalars as an array, `[SLOTS]`."""
    i = iota((SLOTS,), 0)
    out = jnp.full((SLOTS,), values[-1])
    for at, value in enumerate(values[:-1]):
        out = jnp.where(i == at, value, out)
    return out
