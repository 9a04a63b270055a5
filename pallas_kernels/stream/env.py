"""What every part of the fused kernel is given."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.dims import Features
from pallas_kernels.program import Program, iota
from pallas_kernels.stream import ptx
from pallas_kernels.stream.exchange import Exchange
from pallas_kernels.stream.plan import Segment, SegmentPlan, StreamPlan

__all__ = ["StreamEnv", "pick", "select"]


def pick(conditions: Sequence[Array], values: Sequence[Array | int]) -> Array:
    """The value of the last condition that holds, int32; the first value if none does.

    Args:
        conditions: bool scalars, each of which implies the one before it.
        values: one more than conditions.
    """
    out = jnp.asarray(values[0], jnp.int32)
    for condition, (before, value) in zip(conditions, itertools.pairwise(values), strict=True):
        if isinstance(before, int) and isinstance(value, int) and before == value:
            continue
        out = jnp.where(condition, jnp.asarray(value, jnp.int32), out)
    return out


def select(index: Array, values: list[int]) -> Array:
    """The `index`-th of a few constants, int32; the last one for any other index."""
    out = jnp.int32(values[-1])
    for number in range(len(values) - 2, -1, -1):
        if values[number] != values[-1]:
            out = jnp.where(index == number, jnp.int32(values[number]), out)
    return out


@dataclasses.dataclass(frozen=True)
class StreamEnv(Program):
    """A program's view of the fused step.

    Attributes:
        plan: the step's plan.
        step: number of the step, int32: how many were finished before.
        exchange: what programs hand to each other.
        shared: int32 scalar, where the shared memory begins that the kernel lays out itself.
        hidden_layers: whose residual the step returns: see `stream_step`.
    """

    plan: StreamPlan
    step: Array
    exchange: Exchange
    shared: Array
    hidden_layers: tuple[int, ...] = ()

    def iota(self, shape: tuple[int, ...], axis: int) -> Array:
        """int32 indices along `axis`, which the compiler takes for new ones where it has to.

        See `ptx.anew`: what follows from them is not kept from layer to layer.
        """
        numbers = iota(shape, axis)
        return ptx.anew(numbers) if self.plan.indices_anew and not self.interpret else numbers

    def segment(self, segment: Segment) -> SegmentPlan:
        """The plan of a segment."""
        return self.plan.segments[segment]

    @property
    def features(self) -> Features:
        """What the model does besides Llama."""
        return self.plan.dims.features

    def is_local(self, layer: Array) -> Array:
        """Whether the layer's attention sees a window alone; bool scalar."""
        return self._is_among(self.features.local_layers, layer)

    def rotates_otherwise(self, layer: Array) -> Array:
        """Whether the layer has rotary frequencies of its own; bool scalar."""
        return self._is_among(self.features.other_rope, layer)

    def _is_among(self, layers: Sequence[bool], layer: Array) -> Array:
        """What a list of all layers says of one; bool scalar."""
        if not any(layers) or all(layers):
            return jnp.bool_(any(layers))
        words = [
            sum(1 << bit for bit, one in enumerate(layers[start : start + 31]) if one)
            for start in range(0, len(layers), 31)
        ]
        number = lax.div(layer, jnp.int32(31))
        word = select(number, words)
        return (lax.shift_right_logical(word, layer - number * 31) & 1) != 0

    def norm_weight(self, name: str, *index: Array) -> Array:
        """Weights of a norm as they multiply, float32."""
        return self[name][index].astype(jnp.float32) + self.features.norm_offset

    def tag(self, layer: Array | int) -> Array:
        """Tag of what is handed over in a layer, int32; the best logits have that of layer L."""
        return self.step * (self.dims.num_layers + 1) + layer + 1

    @property
    def head_tag(self) -> Array:
        """Tag of the head's input, int32: it counts steps, since it is written once in each."""
        return self.step + 1

    def length_of(self, sequence: Array) -> Array:
        """Lengths of sequences, as the step finds them: int32; padding repeats the last one."""
        out = jnp.broadcast_to(self.lengths[-1], sequence.shape)
        for b, length in enumerate(self.lengths[:-1]):
            out = jnp.where(sequence == b, length, out)
        return out

    def sequence_and_token(self, column: Array) -> tuple[Array, Array | int]:
        """Which sequence's token a column is, and which of its tokens of this step: int32."""
        if (tokens := self.dims.tokens) == 1:
            return column, 0
        sequence = lax.div(column, jnp.int32(tokens))
        return sequence, column - sequence * tokens

    def positions(self, column: Array) -> Array:
        """The new position of each column's token, int32."""
        sequence, token = self.sequence_and_token(column)
        length = self.length_of(sequence)
        return length if isinstance(token, int) else length + token
