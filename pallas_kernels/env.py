"""What every phase of the kernel is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dims import Dims
from pallas_kernels.plan import Plan
from pallas_kernels.sync import GridSync

__all__ = ["Env", "Wait", "no_wait"]

# Waits for the phase before: a phase calls it once, before it reads what others wrote.
Wait = Callable[[], None]


def no_wait() -> None:
    """For a phase whose inputs are already there, as when phases run one launch each."""


@dataclasses.dataclass(frozen=True)
class Env:
    """One program's view of the step while the kernel is traced.

    Attributes:
        plan: the step's plan.
        refs: the arrays by name: weights, cache, scratch, outputs.
        program: this program's number, int32. Read once, at the top of the kernel:
            interpret mode knows it nowhere else.
        lengths: each sequence's live positions before this step, int32 scalars.
        sync: how programs wait for each other.
        interpret: whether the kernel is interpreted on a CPU.
    """

    plan: Plan
    refs: dict[str, Any]
    program: Array
    lengths: tuple[Array, ...]
    sync: GridSync
    interpret: bool

    @property
    def dims(self) -> Dims:
        """The sizes."""
        return self.plan.dims

    def __getitem__(self, name: str) -> Any:
        return self.refs[name]

    def share(self, items: Array | int) -> Array:
        """How many of `items`, dealt out in turn, are this program's: int32.

        Its j-th item is number `program + j * P`.
        """
        p = self.plan.programs
        items = jnp.asarray(items, jnp.int32)
        return lax.div(items - self.program + (p - 1), jnp.int32(p))

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

    def dot(self, a: Array, b: Array, *, transpose_b: bool = False) -> Array:
        """`a @ b` (or `a @ b.T`) of bfloat16 tiles, summed in float32."""
        if self.interpret:  # CPUs lack a bfloat16 product with a float32 result
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        contract = (((1,), (1 if transpose_b else 0,)), ((), ()))
        return lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)

    def dot_split(self, a: Array, b: Array, *, transpose_b: bool = False) -> Array:
        """Like `dot` for a float32 `a`, as two bfloat16 products: 16 bits of `a` survive."""
        high = a.astype(jnp.bfloat16)
        low = (a - high.astype(jnp.float32)).astype(jnp.bfloat16)
        return self.dot(high, b, transpose_b=transpose_b) + self.dot(
            low, b, transpose_b=transpose_b
        )
