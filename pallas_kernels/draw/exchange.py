"""How the programs of a launch tell each other what each has found in its part of a row.

What is told before a meeting is known to all behind it. Sums are of integers, so that they do not
hang on the order in which programs come.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dims import next_power_of_2
from pallas_kernels.draw.plan import DrawPlan
from pallas_kernels.program import iota
from pallas_kernels.sync import MAX_POLLS, trap_if_over

__all__ = ["Best", "Exchange", "arrivals_shape", "exchange_shapes"]

# Sums are made in one of three buffers in turn: what a meeting adds to was set to zero the meeting
# before, when all had read what it held two meetings earlier.
_SUM_BUFFERS = 3
# What a meeting tells is read before the next one, and so may be overwritten behind that.
_BEST_BUFFERS = 2
_PARTS = 3  # most sums of the first meeting, which are told as they are


def arrivals_shape() -> jax.ShapeDtypeStruct:
    """The one number that launches hand on: how often a program has arrived at a meeting.

    Zero to begin with, and a multiple of the programs between launches.
    """
    return jax.ShapeDtypeStruct((1,), jnp.int32)


def exchange_shapes(plan: DrawPlan, sums: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What the exchange needs in memory, whatever it holds when a launch starts.

    Args:
        plan: the launch.
        sums: most sums of a row in one meeting.
    """
    b, p = plan.padded_batch, plan.programs
    return {
        "sums": jax.ShapeDtypeStruct((_SUM_BUFFERS, sums, b), jnp.int32),
        "best_noisy": jax.ShapeDtypeStruct((_BEST_BUFFERS, p, b), jnp.float32),
        "best_behind": jax.ShapeDtypeStruct((_BEST_BUFFERS, p, b), jnp.float32),
        "best_token": jax.ShapeDtypeStruct((_BEST_BUFFERS, p, b), jnp.int32),
        "parts": jax.ShapeDtypeStruct((_PARTS, p, b), jnp.int32),
    }


class Best(NamedTuple):
    """The token that is ahead in each row, `[B]`.

    Attributes:
        noisy: float32, its logit with noise.
        token: int32, its id, the lowest of equals.
        behind: float32, how far its logit lies behind the row's largest.
    """

    noisy: Array
    token: Array
    behind: Array


def _first_of(noisy: Array, token: Array, behind: Array, axis: int) -> Best:
    """The best along an axis."""
    top = jnp.max(noisy, axis=axis)
    nobody = jnp.iinfo(jnp.int32).max
    winner = jnp.min(jnp.where(noisy == jnp.expand_dims(top, axis), token, nobody), axis=axis)
    own = token == jnp.expand_dims(winner, axis)
    return Best(top, winner, jnp.min(jnp.where(own, behind, jnp.inf), axis=axis))


def _fenced() -> Array:
    """int32 zero, made behind a fence: what hangs on it reads nothing from before the fence."""
    [zero] = plgpu.elementwise_inline_asm(
        "fence.acq_rel.gpu; mov.u32 $0, $1;",
        args=[jnp.zeros((1,), jnp.int32)],  # inline assembly takes arrays only
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((1,), jnp.int32)],
    )
    return jnp.sum(zero)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One program's end of it. The first meeting has no sums.

    Attributes:
        plan: the launch.
        refs: the arrays of `exchange_shapes`, and `arrivals`, by name.
        program: this program's number, int32.
    """

    plan: DrawPlan
    refs: dict[str, Any]
    program: Array

    @property
    def _alone(self) -> bool:
        return self.plan.programs == 1

    def _meet(self) -> Array:
        """Waits for all programs; int32 zero, on which reads of what they told must hang.

        Nobody can be a meeting ahead, so that how many have arrived before says which one it is.
        """
        arrivals, p = self.refs["arrivals"], jnp.int32(self.plan.programs)
        plgpu.debug_barrier()  # all threads have told
        before = plgpu.atomic_add(arrivals, (0,), jnp.int32(1))
        wanted = (lax.div(before, p) + 1) * p

        def poll(state):
            _, polls = state
            # Looked at without an atomic, which all would have to queue for.
            return plgpu.load(arrivals.at[0], volatile=True), trap_if_over(polls + 1, MAX_POLLS)

        state = before, jnp.int32(0)
        lax.while_loop(lambda s: (s[0] < wanted) & (s[1] >= 0), poll, state)
        zero = _fenced()
        plgpu.debug_barrier()
        return zero

    def _clear(self, meeting: Array) -> None:
        """Sets to zero what the next meeting adds to."""
        sums, b = self.refs["sums"], iota((self.plan.padded_batch,), 0)
        buffer = jnp.broadcast_to((meeting + 1) % _SUM_BUFFERS, b.shape)
        first = jnp.broadcast_to(self.program == 0, b.shape)
        for i in range(sums.shape[1]):
            place = sums.at[buffer, jnp.full_like(b, i), b]
            plgpu.store(place, jnp.zeros_like(b), mask=first)

    def total(self, meeting: Array, parts: tuple[Array, ...]) -> tuple[Array, ...]:
        """Sums over all programs.

        Args:
            meeting: int32, how many meetings came before; 1 or more.
            parts: this program's, each int32 `[B]`.
        """
        if self._alone:
            return parts
        sums, b = self.refs["sums"], iota((self.plan.padded_batch,), 0)

        def place(buffer: Array, i: int) -> tuple[Array, Array, Array]:
            return jnp.broadcast_to(buffer, b.shape), jnp.full_like(b, i), b

        buffer = meeting % _SUM_BUFFERS
        for i, part in enumerate(parts):
            plgpu.atomic_add(sums, place(buffer, i), part)
        self._clear(meeting)
        buffer += self._meet()
        places = (sums.at[place(buffer, i)] for i in range(len(parts)))
        return tuple(plgpu.load(one, volatile=True) for one in places)

    def best(
        self,
        meeting: Array,
        noisy: Array,
        token: Array,
        behind: Array,
        parts: tuple[Array, ...] = (),
    ) -> tuple[Best, tuple[Array, ...]]:
        """The best of all programs.

        Args:
            meeting: int32, how many meetings came before.
            noisy: float32 `[B, W]`, this program's tokens.
            token: int32 `[1, W]`.
            behind: float32 `[B, W]`.
            parts: what is to be summed beside, int32 `[B]`, up to three; at the first meeting.

        Returns:
            The best, and the sums.
        """
        own = _first_of(noisy, token, behind, 1)
        if self._alone:
            return own, parts
        p, rows = self.plan.programs, self.plan.padded_batch
        refs = [self.refs[f"best_{name}"] for name in Best._fields]
        buffer, b = meeting % _BEST_BUFFERS, iota((rows,), 0)
        here = jnp.broadcast_to(buffer, b.shape), jnp.broadcast_to(self.program, b.shape), b
        for ref, value in zip(refs, own, strict=True):
            plgpu.store(ref.at[here], value)
        for i, part in enumerate(parts):
            plgpu.store(self.refs["parts"].at[jnp.full_like(b, i), *here[1:]], part)
        self._clear(meeting)
        zero = self._meet()
        shape = next_power_of_2(p), rows
        row, column = iota(shape, 0), iota(shape, 1)
        rest = jnp.minimum(row, p - 1) + zero, column
        where = jnp.broadcast_to(buffer, shape), *rest
        # Programs beyond the last read its own: it is the same token.
        noisy, token, behind = (plgpu.load(ref.at[where], volatile=True) for ref in refs)
        best = _first_of(noisy, token, behind, 0)
        totals = []
        for i in range(len(parts)):
            place = self.refs["parts"].at[jnp.full_like(row, i), *rest]
            told = plgpu.load(place, mask=row < p, other=0, volatile=True)
            totals.append(jnp.sum(told, axis=0))
        return best, tuple(totals)
