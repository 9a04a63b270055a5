"""Random kernels that mix what the lowering for Mosaic GPU knows, for a machine to run.

Numbers are such that no sum depends on its order: integers, and floats that are small whole
numbers. So another evaluation of the same kernel gives the same bits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.stream import access

__all__ = ["INPUTS", "OUTPUT", "RESULTS", "kernel_of", "numbers_of", "put", "shapes_of"]

# Words of each result.
OUTPUT = 4096
_ROOM = 2048
_DTYPES = (jnp.int32, jnp.float32, jnp.int8, jnp.int16, jnp.bfloat16, jnp.float16)
INPUTS = [jax.ShapeDtypeStruct((256, 4), dtype) for dtype in _DTYPES]
RESULTS = [jax.ShapeDtypeStruct((OUTPUT,), dtype) for dtype in (jnp.int32, jnp.float32)]
_LARGEST = 32.0


def numbers_of(seed: int) -> list[np.ndarray]:
    """The inputs: whole numbers from -9 to 9."""
    rng = np.random.default_rng(seed)
    return [rng.integers(-9, 10, x.shape).astype(x.dtype) for x in INPUTS]


def shapes_of(threads: int) -> list[tuple[int, ...]]:
    """Shapes that arrays begin with."""
    shapes = [(), (1,), (4,), (32,), (8, 1, 4), (1, 8), (2, 16), (8, 8, 4), (4, 4, 2, 2)]
    return [*shapes, (threads,), (threads, 4), (2, threads), (256, 8)]


def put(out: Any, value: Array, mask: Array | None = None, room: int = 0) -> None:
    """Stores an array's elements in order, from `room` on."""
    index = jnp.full(value.shape, room, jnp.int32)
    for axis, size in enumerate(value.shape):
        stride = math.prod(value.shape[axis + 1 :])
        if size > 1:
            index += stride * lax.broadcasted_iota(jnp.int32, value.shape, axis)
    access.store(out.at[index], value, mask=mask)


class _Writer:
    """Writes operations at random on what is there so far."""

    def __init__(self, seed: int, threads: int, inputs: Sequence[Any]):
        self.draw, self.inputs = random.Random(seed), inputs
        self.shapes = shapes_of(threads)
        self.made: list[Array] = []

    def write(self, count: int, depth: int) -> None:
        ways: list[Callable[[], Array]] = [
            self.iota,
            self.load,
            self.load,
            self.binary,
            self.binary,
            self.binary,
            self.reduction,
            self.reduction,
            self.broadcast,
            self.broadcast,
            self.reshaped,
            self.selected,
            self.converted,
            self.unary,
        ]
        if depth:
            ways += [lambda: self.cond(depth - 1), lambda: self.loop(depth - 1)] * 2
        for _ in range(count):
            self.made.append(self.draw.choice(ways)())

    # What there is

    def some(self) -> Array:
        if not self.made or self.draw.random() < 0.05:
            return self.iota()
        # The newest are wanted most.
        place = min(int(self.draw.expovariate(0.2)), len(self.made) - 1)
        return self.made[-1 - place]

    def number(self) -> Array:
        """An int32 scalar."""
        value = self.some()
        axes = tuple(range(value.ndim))
        return self.whole(lax.reduce_max(value, axes) if axes else value)

    def whole(self, value: Array) -> Array:
        return value.astype(jnp.int32)

    def small(self, value: Array) -> Array:
        """Floats that stay exact."""
        if value.dtype == jnp.int32:
            return value
        return jnp.clip(value, -_LARGEST, _LARGEST)

    def of_shape(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array that was there, brought to a shape."""
        same = [x for x in self.made if x.shape == shape]
        one = self.draw.choice(same) if same and self.draw.random() < 0.7 else self.some()
        if one.shape != shape:
            one = self.brought(one, shape)
        return one if one.dtype == dtype else self.small(one.astype(dtype))

    def brought(self, x: Array, shape: tuple[int, ...]) -> Array:
        if x.size == math.prod(shape):
            return x.reshape(shape)
        # Axes that fit somewhere are kept there, the others are reduced.
        axes, kept, first = [], [], 0
        for axis, size in enumerate(x.shape):
            found = [i for i in range(first, len(shape)) if shape[i] == size]
            if found:
                axes.append(self.draw.choice(found))
                kept.append(axis)
                first = axes[-1] + 1
        gone = tuple(axis for axis in range(x.ndim) if axis not in kept)
        x = self.small(lax.reduce_sum(x, gone)) if gone else x
        return lax.broadcast_in_dim(x, shape, axes)

    # Operations

    def iota(self) -> Array:
        shape = self.draw.choice([x for x in self.shapes if x])
        made = lax.broadcasted_iota(jnp.int32, shape, self.draw.randrange(len(shape)))
        return made - self.draw.randrange(5)

    def load(self) -> Array:
        row, mask, other = self.some(), None, None
        if row.dtype != jnp.int32:
            row = self.whole(row)
        rows = row.reshape(row.shape or (1,)) & 255
        if self.draw.random() < 0.5:
            column: Any = self.of_shape(rows.shape, jnp.int32) & 3
        else:
            column = self.draw.randrange(4)
        if self.draw.random() < 0.5:
            mask = self.test(rows.shape)
            rows = jnp.where(mask, rows, rows + 4096)  # beyond the array: must not be loaded
            other = self.draw.choice([0, 3])
        ref = self.draw.choice(self.inputs)
        if mask is not None:
            # Interpreted, the index is clamped.
            made = access.load(ref.at[rows, column], mask=mask, other=other)
        else:
            made = access.load(ref.at[rows, column])
        is_float = jnp.issubdtype(made.dtype, jnp.floating)
        return made.astype(jnp.float32 if is_float else jnp.int32)

    def test(self, shape: tuple[int, ...]) -> Array:
        a, b = (self.of_shape(shape, jnp.int32) for _ in range(2))
        compare = self.draw.choice([jnp.less, jnp.greater_equal, jnp.equal, jnp.not_equal])
        found = compare(a, b)
        if self.draw.random() < 0.3:
            found = self.draw.choice([jnp.logical_and, jnp.logical_or])(found, a > -b)
        return ~found if self.draw.random() < 0.3 else found

    def binary(self) -> Array:
        a = self.some()
        b = self.of_shape(a.shape, a.dtype)
        ways: list[Any] = [jnp.add, jnp.subtract, jnp.multiply, jnp.maximum, jnp.minimum]
        if a.dtype == jnp.int32:
            ways += [jnp.bitwise_and, jnp.bitwise_or, jnp.bitwise_xor]
            ways += [lambda a, b: lax.div(a, (b & 7) + 1), lambda a, b: lax.rem(a, (b & 7) + 1)]
            ways += [lambda a, b: lax.shift_right_logical(a, b & 31)]
            ways += [lambda a, b: lax.shift_right_arithmetic(a, b & 31)]
            ways += [lambda a, b: lax.shift_left(a, b & 31)]
        return self.small(self.draw.choice(ways)(a, b))

    def unary(self) -> Array:
        a = self.some()
        ways: list[Any] = [jnp.abs, jnp.negative, lambda a: lax.integer_pow(a, 2)]
        if a.dtype == jnp.int32:
            ways += [jnp.bitwise_not]
        return self.small(self.draw.choice(ways)(a))

    def reduction(self) -> Array:
        a = self.some()
        if not a.shape:
            a = self.iota()
        axes = tuple(sorted(self.draw.sample(range(a.ndim), self.draw.randint(1, a.ndim))))
        way = self.draw.choice([lax.reduce_sum, lax.reduce_max, lax.reduce_min])
        return self.small(way(a, axes))

    def broadcast(self) -> Array:
        a = self.some()
        shape, axes = list(a.shape), list(range(a.ndim))
        for i, size in enumerate(shape):  # axes of 1 grow
            if size == 1 and self.draw.random() < 0.5:
                shape[i] = self.draw.choice([2, 8])
        for _ in range(self.draw.randint(1, 2)):
            place, size = self.draw.randint(0, len(shape)), self.draw.choice([1, 2, 4, 8])
            shape.insert(place, size)
            axes = [axis + (axis >= place) for axis in axes]
        if math.prod(shape) > _ROOM:
            return self.reduction()
        return lax.broadcast_in_dim(a, tuple(shape), axes)

    def reshaped(self) -> Array:
        a = self.some()
        shape, rest = [], a.size
        while rest > 1 and len(shape) < 3:
            size = 1 << self.draw.randint(0, rest.bit_length() - 1)
            shape.append(size)
            rest //= size
        return a.reshape((*shape, rest))

    def selected(self) -> Array:
        a = self.some()
        return jnp.where(self.test(a.shape), a, self.of_shape(a.shape, a.dtype))

    def converted(self) -> Array:
        a = self.some()
        if a.dtype == jnp.float32:
            return (a * 3).astype(jnp.int32)
        narrow = self.draw.choice([jnp.int8, jnp.int16, jnp.bool_, jnp.float32])
        made = a.astype(narrow)
        return self.small(made) if narrow == jnp.float32 else made.astype(jnp.int32)

    # Control flow

    def within(self, depth: int, *more: Array) -> _Writer:
        """Of what is in a block of code: it sees what is outside, and not the other way round."""
        inner = _Writer(self.draw.randrange(1 << 30), 32, self.inputs)
        inner.shapes = self.shapes
        inner.made = [*self.made, *more]
        inner.write(self.draw.randint(1, 4), depth)
        return inner

    def cond(self, depth: int) -> Array:
        like = self.some()

        def branch() -> Array:
            inner = self.within(depth)
            return inner.small(inner.of_shape(like.shape, like.dtype) + like)

        index = self.number()
        if self.draw.random() < 0.4:
            return lax.cond(index > 2, branch, branch)
        return lax.switch(index & 3, [branch] * 3)  # beyond the last branch too

    def loop(self, depth: int) -> Array:
        first, second = self.some(), self.some()
        most = self.number() & 3

        def test(carry: Any) -> Array:
            i, a, _ = carry
            if bound is None:
                return i < most
            return (i < most) & (self.whole(lax.reduce_max(a, tuple(range(a.ndim)))) < bound)

        def body(carry: Any) -> Any:
            i, a, b = carry
            inner = self.within(depth, a, b)
            a, b = (inner.small(inner.of_shape(x.shape, x.dtype) + x) for x in (a, b))
            return i + 1, a, b

        bound = self.draw.choice([None, 100])
        _, a, b = lax.while_loop(test, body, (jnp.int32(0), first, second))
        self.made.append(b)
        return a


def kernel_of(seed: int, threads: int, count: int = 14, depth: int = 2) -> Callable[..., None]:
    """A kernel of `INPUTS`, then of `RESULTS`.

    Args:
        seed: draws it.
        threads: T, for which shapes are of interest.
        count: operations outside of any branch or loop.
        depth: of branches and loops in each other.
    """

    def kernel(*refs: Any) -> None:
        inputs, outs = refs[: len(INPUTS)], refs[len(INPUTS) :]
        writer = _Writer(seed, threads, inputs)
        writer.write(count, depth)
        for out, spec in zip(outs, RESULTS, strict=True):
            put(out, jnp.ones((1,), spec.dtype))
            room = 1
            for x in reversed(writer.made):
                if x.dtype != spec.dtype or room + x.size > OUTPUT or writer.draw.random() < 0.3:
                    continue
                mask = writer.test(x.shape) if writer.draw.random() < 0.3 else None
                put(out, x, mask, room)
                room += x.size

    return kernel
