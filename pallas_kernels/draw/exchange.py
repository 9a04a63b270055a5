"""How the programs of a launch tell each other what each has found in its part of a row.

What is told before a meeting is known to all behind it. Each program tells what it has in a place
of its own, and all add it up alike: in the same order, whoever comes first. (Atomic sums would be
the other way; Pallas adds arrays of integers as if they were floating-point numbers.)
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

# What a meeting tells is read before the next one, and so may be overwritten behind that.
_BUFFERS = 2


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
    place = plan.programs, plan.padded_batch
    return {
        "noisy": jax.ShapeDtypeStruct((_BUFFERS, 1, *place), jnp.float32),
        "behind": jax.ShapeDtypeStruct((_BUFFERS, 1, *place), jnp.float32),
        "tokens": jax.ShapeDtypeStruct((_BUFFERS, 1, *place), jnp.int32),
        "parts": jax.ShapeDtypeStruct((_BUFFERS, sums, *place), jnp.int32),
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
    """One program's end of it.

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

    def _tell(self, name: str, meeting: Array, i: int, value: Array) -> None:
        """Stores this program's value of each row, `[B]`."""
        b = iota((self.plan.padded_batch,), 0)
        buffer, program = (jnp.broadcast_to(x, b.shape) for x in (meeting % _BUFFERS, self.program))
        plgpu.store(self.refs[name].at[buffer, jnp.full_like(b, i), program, b], value)

    def _told(self, name: str, meeting: Array, i: int, zero: Array) -> tuple[Array, Array]:
        """All programs' values, `[P, B]` rounded up, and which of them are: the others repeat."""
        p = self.plan.programs
        shape = next_power_of_2(p), self.plan.padded_batch
        row, column = iota(shape, 0), iota(shape, 1)
        buffer = jnp.broadcast_to(meeting % _BUFFERS + zero, shape)
        where = buffer, jnp.full_like(row, i), jnp.minimum(row, p - 1), column
        return plgpu.load(self.refs[name].at[where], volatile=True), row < p

    def _sums(self, meeting: Array, count: int, zero: Array) -> tuple[Array, ...]:
        told = (self._told("parts", meeting, i, zero) for i in range(count))
        return tuple(jnp.sum(jnp.where(real, part, 0), axis=0) for part, real in told)

    def total(self, meeting: Array, parts: tuple[Array, ...]) -> tuple[Array, ...]:
        """Sums over all programs.

        Args:
            meeting: int32, how many meetings came before.
            parts: this program's, each int32 `[B]`.
        """
        if self._alone:
            return parts
        for i, part in enumerate(parts):
            self._tell("parts", meeting, i, part)
        return self._sums(meeting, len(parts), self._meet())

    def best(
        self,
        meeting: Array,
        noisy: Array,
        token: Array,
        behind: Array,
        parts: tuple[Array, ...] = (),
    ) -> tuple[Best, tuple[Array, ...]]:
        """The best of all programs, and sums over them.

        Args:
            meeting: int32, how many meetings came before.
            noisy: float32 `[B, W]`, this program's tokens.
            token: int32 `[1, W]`.
            behind: float32 `[B, W]`.
            parts: what is to be summed beside, each int32 `[B]`.
        """
        own = _first_of(noisy, token, behind, 1)
        if self._alone:
            return own, parts
        names = "noisy", "tokens", "behind"
        for name, value in zip(names, own, strict=True):
            self._tell(name, meeting, 0, value)
        for i, part in enumerate(parts):
            self._tell("parts", meeting, i, part)
        zero = self._meet()
        # A value that repeats another is of the same token.
        told = [self._told(name, meeting, 0, zero)[0] for name in names]
        return _first_of(told[0], told[1], told[2], 0), self._sums(meeting, len(parts), zero)
