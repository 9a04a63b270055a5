"""What every phase of the kernel is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.plan import Plan
from pallas_kernels.program import Program
from pallas_kernels.sync import GridSync

__all__ = ["Env", "Wait", "no_wait"]

# Waits for the phase before: a phase calls it once, before it reads what others wrote.
Wait = Callable[[], None]


def no_wait() -> None:
    """For a phase whose inputs are already there, as when phases run one launch each."""


@dataclasses.dataclass(frozen=True)
class Env(Program):
    """A program's view of the phased step.

    Attributes:
        plan: the step's plan.
        sync: how programs wait for each other.
    """

    plan: Plan
    sync: GridSync

    def discard(self, words: Array) -> Array:
        """Waits for loaded words and drops them. The result, 0, must be used."""
        if self.interpret:
            return jnp.int32(0)
        # To the compiler the result depends on the words.
        [zero] = plgpu.elementwise_inline_asm(
            "mov.u32 $0, 0;",
            args=[words.astype(jnp.int32)],
            constraints="=r,r",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.int32)],
        )
        return jnp.sum(zero)
