"""What every part of the streamed kernel is given."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dims import Dims, Features
from pallas_kernels.stream.mail import Mail
from pallas_kernels.stream.plan import Segment, SegmentPlan, StreamPlan

__all__ = ["StreamEnv", "iota", "select"]


def iota(shape: tuple[int, ...], axis: int) -> Array:
    """int32 indices along `axis`."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def select(index: Array, values: list[int]) -> Array:
    """The `index`-th of a few constants, int32; the last one for any other index."""
    out = jnp.int32(values[-1])
    for number in range(len(values) - 2, -1, -1):
        if values[number] != values[-1]:
            out = jnp.where(index == number, jnp.int32(values[number]), out)
    return out


@dataclasses.dataclass(frozen=True)
class StreamEnv:
    """One program's view of the step while the kernel is traced.

    Attributes:
        plan: the step's plan.
        refs: the arrays by name: weights, cache, outputs.
        program: this program's number, int32. Read once, at the top of the kernel:
            interpret mode knows it nowhere else.
        lengths: each sequence's live positions before this step, int32 scalars.
        step: number of the step, int32: how many were finished before.
        mail: the mail.
        interpret: whether the kernel is interpreted on a CPU.
    """

    plan: StreamPlan
    refs: dict[str, Any]
    program: Array
    lengths: tuple[Array, ...]
    step: Array
    mail: Mail
    interpret: bool

    @property
    def dims(self) -> Dims:
        """The sizes."""
        return self.plan.dims

    def __getitem__(self, name: str) -> Any:
        return self.refs[name]

    def segment(self, segment: Segment) -> SegmentPlan:
        """The plan of a segment."""
        return self.plan.segments[segment]

    @property
    def features(self) -> Features:
        """What the model does besides Llama."""
        return self.plan.dims.features

    def is_local(self, layer: Array) -> Array:
        """Whether the layer's attention sees a window alone; bool scalar."""
        local = self.features.local_layers
        if not any(local) or all(local):
            return jnp.bool_(any(local))
        words = [
            sum(1 << bit for bit, one in enumerate(local[start : start + 31]) if one)
            for start in range(0, len(local), 31)
        ]
        number = lax.div(layer, jnp.int32(31))
        word = select(number, words)
        return (lax.shift_right_logical(word, layer - number * 31) & 1) != 0

    def norm_weight(self, name: str, *index: Array) -> Array:
        """Weights of a norm as they multiply, float32."""
        return self[name][index].astype(jnp.float32) + self.features.norm_offset

    def tag(self, layer: Array | int) -> Array:
        """Tag of what is handed over in a layer; the head's input has that of layer L."""
        return self.step * (self.dims.num_layers + 1) + layer + 1

    def share(self, items: Array | int) -> Array:
        """How many of `items`, dealt out in turn, are this program's: int32.

        Its j-th item is number `program + j * P`.
        """
        p = self.plan.programs
        items = jnp.asarray(items, jnp.int32)
        return lax.div(items - self.program + (p - 1), jnp.int32(p))

    def batch_lengths(self, column: Array) -> Array:
        """Lengths of the sequences in `column`, int32; padding repeats the last one."""
        out = jnp.broadcast_to(self.lengths[-1], column.shape)
        for b, length in enumerate(self.lengths[:-1]):
            out = jnp.where(column == b, length, out)
        return out

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

    def again(self, number: Array) -> Array:
        """The same int32 scalar, of which the compiler does not know that it is the same.

        What is computed from it is computed anew. The pipelined loop loads a tile several
        iterations before it is used: values that both need would be kept for as many.
        """
        if self.interpret:
            return number
        [out] = plgpu.elementwise_inline_asm(
            "mov.u32 $0, $1;",
            args=[jnp.full((1,), number)],  # inline assembly takes arrays only
            constraints="=r,r",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct((1,), jnp.int32)],
        )
        return jnp.sum(out)

    def fence(self) -> None:
        """Waits for the threads of this program."""
        if not self.interpret:
            plgpu.debug_barrier()
