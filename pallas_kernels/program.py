"""What a program of the decode step is given, whatever its plan: see `stream.env`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.dims import Dims

__all__ = ["Program", "iota"]


def iota(shape: tuple[int, ...], axis: int) -> Array:
    """int32 indices along `axis`."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)


@dataclasses.dataclass(frozen=True)
class Program:
    """One program's view of the step while the kernel is traced.

    Attributes:
        plan: the step's plan.
        refs: the arrays by name: weights, cache, exchange, outputs.
        program: this program's number, int32. Read once, at the top of the kernel:
            interpret mode knows it nowhere else.
        lengths: each sequence's live positions before this step, int32 scalars.
        interpret: whether the kernel is interpreted on a CPU.
    """

    plan: Any
    refs: dict[str, Any]
    program: Array
    lengths: tuple[Array, ...]
    interpret: bool

    @property
    def dims(self) -> Dims:
        """The sizes."""
        return self.plan.dims

    def __getitem__(self, name: str) -> Any:
        return self.refs[name]

    def share(self, items: Array | int, turn: Array | None = None) -> Array:
        """How many of `items`, dealt out in turn, are this program's: int32.

        Its j-th item is number `turn + j * P`; without `turn`, the program's number is its turn.
        """
        p = self.plan.programs
        items = jnp.asarray(items, jnp.int32)
        turn = self.program if turn is None else turn
        return lax.div(items - turn + (p - 1), jnp.int32(p))

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
