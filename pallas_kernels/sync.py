"""How the programs of one launch wait for each other.

All counters live in one int32 array that is zero between launches: the last program
of a launch to arrive sets back what the launch has counted, so no second kernel is
needed. Every wait is bounded: a program that has polled `MAX_POLLS` times traps, which
ends the launch in an error instead of a hung GPU.

In interpret mode programs run one after another, to completion. Then a barrier has
nothing to wait for and does nothing; a grid of several programs is run phase by phase.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

__all__ = ["MAX_POLLS", "GridSync", "num_counters", "trap_if_over"]

# A poll takes about a microsecond, so a wait ends after some seconds.
MAX_POLLS = 1 << 22

# Counters polled at the same time stay 128 bytes (32 words) apart.
_BARRIER = 0
_FINISHED = 32
_HEADS = 64


def num_counters(batch: int, num_kv_heads: int) -> int:
    """Length of the int32 counter array for B sequences and K key/value heads."""
    return _HEADS + batch * num_kv_heads


def trap_if_over(polls: Array, limit: int) -> Array:
    """Returns `polls`; ends the launch in an error where they exceed `limit`."""
    [out] = plgpu.elementwise_inline_asm(
        f"{{ .reg .pred p; setp.gt.s32 p, $1, {limit}; @p trap; mov.u32 $0, $1; }}",
        args=[jnp.full((1,), polls)],  # inline assembly takes arrays only
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((1,), jnp.int32)],
    )
    return jnp.sum(out)


@dataclasses.dataclass(frozen=True)
class GridSync:
    """Synchronisation between the programs of one launch.

    Attributes:
        counters: ref of the int32 counters.
        programs: P.
        interpret: whether the kernel is interpreted, programs one after another.
    """

    counters: Any
    programs: int
    interpret: bool

    def _add(self, index: Array | int, value: int) -> Array:
        """Atomically adds, with acquire and release order; returns the count before."""
        if self.interpret:  # interpret mode has no atomics on a scalar index
            before = plgpu.atomic_add(
                self.counters, (pl.ds(index, 1),), jnp.full((1,), value, jnp.int32)
            )
            return before.reshape(())
        return plgpu.atomic_add(self.counters, (index,), jnp.int32(value))

    def fence(self) -> None:
        """Waits for the threads of this program: their stores come before what follows."""
        if not self.interpret:
            plgpu.debug_barrier()

    def arrive(self) -> None:
        """Counts this program in, once a number: what it has stored before is then done."""
        if self.interpret:
            return
        self.fence()
        self._add(_BARRIER, 1)

    def wait(self, number: Array | int) -> None:
        """Waits until all programs have arrived for the `number`-th time (from 1).

        What any program stored before it arrived is then seen by this one.
        """
        if self.interpret:
            return
        target = jnp.int32(number) * self.programs

        def poll(state):
            _, polls = state
            return self._add(_BARRIER, 0), trap_if_over(polls + 1, MAX_POLLS)

        count = self._add(_BARRIER, 0)
        lax.while_loop(
            lambda state: (state[0] < target) & (state[1] >= 0), poll, (count, jnp.int32(0))
        )
        self.fence()

    def last_of_head(self, head: Array, parts: Array) -> Array:
        """Counts this program's part of a head in; whether it was the last of `parts`.

        What the other parts' programs stored before is then seen by this one. The
        last arrival sets the counter back.
        """
        self.fence()
        last = self._add(_HEADS + head, 1) == parts - 1

        @pl.when(last)
        def _():
            self.counters[_HEADS + head] = jnp.int32(0)

        self.fence()
        return last

    def last_program(self) -> Array:
        """Counts this program in at the end; whether it is the last of the launch.

        The last one sets the counters back: nobody polls them any more.
        """
        self.fence()
        last = self._add(_FINISHED, 1) == self.programs - 1

        @pl.when(last)
        def _():
            self.counters[_BARRIER] = jnp.int32(0)
            self.counters[_FINISHED] = jnp.int32(0)

        self.fence()
        return last
