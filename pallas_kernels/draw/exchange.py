"""How the programs of a launch tell each other what each has found in its part of a row.

A phase ends with a barrier of all programs (`pallas_kernels.sync`): what was stored before it is
seen behind it. Sums are of integers, so that they do not hang on the order in which programs come.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dims import next_power_of_2
from pallas_kernels.draw.plan import DrawPlan
from pallas_kernels.program import iota
from pallas_kernels.sync import GridSync

__all__ = ["Best", "Exchange", "exchange_shapes"]

# Sums are made in one of three buffers in turn: what a phase adds to was set to zero the phase
# before, when all had read what it held two phases earlier.
_SUM_BUFFERS = 3
# What a phase stores is read before the next one's barrier, and so may be overwritten behind it.
_BEST_BUFFERS = 2
_COUNTERS = 64  # of `GridSync`: the barrier's, and one that no one uses here


def exchange_shapes(plan: DrawPlan, sums: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What the exchange needs in memory; `counters` and `sums` hold zeros when a launch starts.

    Args:
        plan: the launch.
        sums: most sums of a row in one phase.
    """
    b, p = plan.padded_batch, plan.programs
    return {
        "counters": jax.ShapeDtypeStruct((_COUNTERS,), jnp.int32),
        "sums": jax.ShapeDtypeStruct((_SUM_BUFFERS, sums, b), jnp.int32),
        "best_noisy": jax.ShapeDtypeStruct((_BEST_BUFFERS, p, b), jnp.float32),
        "best_behind": jax.ShapeDtypeStruct((_BEST_BUFFERS, p, b), jnp.float32),
        "best_token": jax.ShapeDtypeStruct((_BEST_BUFFERS, p, b), jnp.int32),
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


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One program's end of it.

    Attributes:
        plan: the launch.
        refs: the arrays of `exchange_shapes`, by name.
        program: this program's number, int32.
        sync: the barrier.
    """

    plan: DrawPlan
    refs: dict[str, Any]
    program: Array
    sync: GridSync

    @property
    def _alone(self) -> bool:
        return self.plan.programs == 1

    def _meet(self, phase: Array) -> None:
        self.sync.arrive()
        self.sync.wait(phase + 1)

    def total(self, phase: Array, parts: tuple[Array, ...]) -> tuple[Array, ...]:
        """Sums over all programs.

        Args:
            phase: int32, how many phases came before.
            parts: this program's, each int32 `[B]`.
        """
        if self._alone:
            return parts
        sums, b = self.refs["sums"], iota((self.plan.padded_batch,), 0)
        buffer = phase % _SUM_BUFFERS

        def place(buffer: Array, i: int) -> tuple[Array, Array, Array]:
            return jnp.broadcast_to(buffer, b.shape), jnp.full_like(b, i), b

        for i, part in enumerate(parts):
            plgpu.atomic_add(sums, place(buffer, i), part)
        self._clear(phase)
        self._meet(phase)
        places = (sums.at[place(buffer, i)] for i in range(len(parts)))
        return tuple(plgpu.load(one, volatile=True) for one in places)

    def _clear(self, phase: Array) -> None:
        """Sets to zero what the next phase adds to."""
        sums, b = self.refs["sums"], iota((self.plan.padded_batch,), 0)
        buffer = jnp.broadcast_to((phase + 1) % _SUM_BUFFERS, b.shape)
        first = jnp.broadcast_to(self.program == 0, b.shape)
        for i in range(sums.shape[1]):
            place = sums.at[buffer, jnp.full_like(b, i), b]
            plgpu.store(place, jnp.zeros_like(b), mask=first)

    def best(self, phase: Array, noisy: Array, token: Array, behind: Array) -> Best:
        """The best of all programs.

        Args:
            phase: int32, how many phases came before.
            noisy: float32 `[B, W]`, this program's tokens.
            token: int32 `[1, W]`.
            behind: float32 `[B, W]`.
        """
        own = _first_of(noisy, token, behind, 1)
        if self._alone:
            return own
        p, rows = self.plan.programs, self.plan.padded_batch
        refs = [self.refs[f"best_{name}"] for name in Best._fields]
        buffer, b = phase % _BEST_BUFFERS, iota((rows,), 0)
        here = jnp.broadcast_to(buffer, b.shape), jnp.broadcast_to(self.program, b.shape), b
        for ref, value in zip(refs, own, strict=True):
            plgpu.store(ref.at[here], value)
        self._clear(phase)
        self._meet(phase)
        shape = next_power_of_2(p), rows
        row, column = iota(shape, 0), iota(shape, 1)
        where = jnp.broadcast_to(buffer, shape), jnp.minimum(row, p - 1), column
        # Programs beyond the last read its own: it is the same token.
        noisy, token, behind = (plgpu.load(ref.at[where], volatile=True) for ref in refs)
        return _first_of(noisy, token, behind, 0)
