"""Products of a few dozen tokens with a quantized matrix, which is read as the integers it is.

So few tokens cost what reading the weights costs. Multiplied out for a library's product, the
weights would be written and read once more, as bfloat16: nine times the bytes of int4. Here a
program has a tile of rows of the matrix and a tile of tokens. It makes bfloat16 of the integers in
registers and multiplies them on tensor cores.

- int8: the integers are multiplied, exactly; a row's scale multiplies its sums. In groups it is
  integers times scales, rounded to bfloat16.
- int4: integers times scales, with minima added, rounded to bfloat16, are multiplied: those are
  the reference's numbers (`ffjax.model`). A word holds eight inputs of a row, of which each is as
  far from its next one as the words are long: so eight products, one for each place in a word, of
  the words' matrix and every eighth input of a token.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.calls import kernel_call
from pallas_kernels.dims import WORD_SHIFTS, ceil_div, next_power_of_2
from pallas_kernels.gpu import Gpu
from pallas_kernels.primitives import access
from pallas_kernels.program import iota

__all__ = ["MAX_TOKENS", "Tiling", "can_read", "multiply", "tiling_for"]

MAX_TOKENS = {8: 128, 4: 64}
"""By the bits of a weight: with more tokens, multiplying the weights out for cuBLAS is as fast."""

KERNEL_NAME = "ffjax_prefill_product"
# 128 in bfloat16, whose seven bits of mantissa count ones there; and what stands for 0.
_MAGIC, _ZERO = 0x4300, 128 + 8
_LEAST = 16  # what tensor cores multiply along any axis
_SPARE = 4096  # of shared memory, for what the compiler exchanges between threads


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of the work of a program.

    Attributes:
        rows: of the matrix; a power of two, 16 or more.
        tokens: likewise.
        depth: columns of the array of integers that are read at a time, int8 or words; likewise.
        num_warps: warps of a program.
        num_stages: tiles of the matrix that are on their way, or in use.
    """

    rows: int
    tokens: int
    depth: int
    num_warps: int = 4
    num_stages: int = 4


def can_read(weight: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether the kernel can reach all of a matrix.

    Pallas counts an array's elements in 32 bits, with a sign, unless it has more than 2^32 bytes.
    Between the two, elements of one byte are lost: int8 of more than 2 GiB and less than 4.

    Args:
        weight: of all layers, `[L, out, ...]`.
    """
    size = math.prod(weight.shape)
    return size < 1 << 31 or size * weight.dtype.itemsize > 1 << 32


def tiling_for(rows: int, tokens: int, bits: int, gpu: Gpu) -> Tiling:
    """The sizes for a matrix of so many rows: the fastest of those tried on an H200.

    Args:
        rows: of the matrix.
        tokens: T.
        bits: of a weight, 8 or 4.
        gpu: each of whose cores should get a program.
    """
    wide = min(128, max(_LEAST, next_power_of_2(tokens)))
    each = 64 if wide == 128 else 128
    while each > _LEAST and ceil_div(rows, each) < 0.9 * gpu.cores:
        each //= 2
    if bits == 8:
        depths = (256, 128, 64, 32) if wide == 128 and each <= 32 else (128, 64, 32)
    else:
        depths = (64, 32, 16) if each <= 32 else (32, 16)
    # Bytes of a column of a tile: of the matrix, and of what each of its numbers multiplies.
    column = each + 2 * wide if bits == 8 else 4 * each + 16 * wide
    stages = 4 if bits == 8 and wide < 128 else 3
    for depth in depths:
        for count in range(stages, 1, -1):
            if count * depth * column <= gpu.shared_memory - _SPARE:
                return Tiling(each, wide, depth, num_stages=count)
    return Tiling(_LEAST, _LEAST, depths[-1], num_stages=2)


def multiply(
    x: Array,
    weight: Array,
    scale: Array,
    layer: Array,
    tiling: Tiling,
    *,
    dtype: jnp.dtype,
    offset: str | None = None,
    interpret: bool = False,
) -> Array:
    """`x @ w.T`, where w is a layer's matrix.

    Args:
        x: bfloat16 `[T, in]`.
        weight: of all layers: int8 `[L, out, in]`, or int4 in words, int32 `[L, out, in / 8]`.
        scale: float32 `[L, out]` of int8; of groups bfloat16 or float16 `[L, out, in / group]`, or
            of int4 with an offset `[L, out, in / group, 2]`.
        layer: int32.
        tiling: sizes.
        dtype: of the result; the sums are float32.
        offset: what stands beside a scale: "zero" or "minimum", as in `dims.Grouping`; or None.
        interpret: run on a CPU.

    Returns:
        `[T, out]`.
    """
    tokens, rows = x.shape[0], weight.shape[1]
    grid = ceil_div(rows, tiling.rows), ceil_div(tokens, tiling.tokens)
    if is_int4 := weight.dtype == jnp.int32:
        # Every eighth input of a token stands together: [8, T, in / 8].
        x = jnp.transpose(x.reshape(tokens, -1, len(WORD_SHIFTS)), (2, 0, 1))
    body: Any = _int8_kernel if scale.ndim == 2 else _grouped_int8_kernel
    if is_int4:
        body = functools.partial(_int4_kernel, offset=offset)
    kernel = functools.partial(body, tiling=tiling, interpret=interpret)

    return kernel_call(
        kernel,
        grid=grid,
        out_shape=jax.ShapeDtypeStruct((tokens, rows), dtype),
        interpret=interpret,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        name=KERNEL_NAME,
    )(x, weight, scale, jnp.asarray(layer, jnp.int32).reshape(1))


def _dot(a: Array, b: Array, interpret: bool) -> Array:
    """`a @ b.T`, summed in float32."""
    if interpret:  # CPUs lack a bfloat16 product with a float32 result
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _load(ref, where: tuple, sizes: tuple[int, int], limits: tuple[int, int]) -> Array:
    """A tile `[sizes]` of the last two axes; 0 beyond their limits."""
    *outer, first, second = where
    at = *outer, first + iota(sizes, 0), second + iota(sizes, 1)
    inside = [i for i in (0, 1) if limits[i] % sizes[i]]
    if not inside:
        return access.load(ref.at[at])
    masks = [at[len(outer) + i] < limits[i] for i in inside]
    return access.load(ref.at[at], mask=masks[0] & masks[-1], other=0)


def _store(out_ref, sums: Array, row: Array, token: Array) -> None:
    """Stores `[rows, tokens]` as `[tokens, rows]`."""
    tokens, rows = out_ref.shape
    at = token + iota(sums.shape, 1), row + iota(sums.shape, 0)
    mask = (at[0] < tokens) & (at[1] < rows)
    access.store(out_ref.at[at], sums.astype(out_ref.dtype), mask=mask)


def _int8_kernel(x_ref, weight_ref, scale_ref, layer_ref, out_ref, *, tiling, interpret):
    tokens, inputs = x_ref.shape
    rows, layer = weight_ref.shape[1], layer_ref[0]
    row, token = pl.program_id(0) * tiling.rows, pl.program_id(1) * tiling.tokens

    def step(i, sums):
        column = i * tiling.depth
        size = tiling.rows, tiling.depth
        integers = _load(weight_ref, (layer, row, column), size, (rows, inputs))
        size = tiling.tokens, tiling.depth
        x = _load(x_ref, (token, column), size, (tokens, inputs))
        return sums + _dot(integers.astype(jnp.bfloat16), x, interpret)

    sums = jnp.zeros((tiling.rows, tiling.tokens), jnp.float32)
    steps = ceil_div(inputs, tiling.depth)
    sums = lax.fori_loop(jnp.int32(0), jnp.int32(steps), step, sums)
    own = row + iota((tiling.rows,), 0)
    scale = access.load(scale_ref.at[layer, own], mask=own < rows, other=0.0)
    _store(out_ref, sums * scale[:, None], row, token)


def _rounded(weight: Array, interpret: bool) -> Array:
    """float32 rounded to bfloat16."""
    if interpret:  # XLA may leave out a rounding that is followed by a cast to float32
        weight = lax.reduce_precision(weight, 8, 7)
    return weight.astype(jnp.bfloat16)


def _weight(
    bits: Array, scale: Array, second: Array | None, offset: str | None, interpret: bool
) -> Array:
    """bfloat16 weights of 4-bit integers, scales, and what stands beside these."""
    if second is None and scale.dtype == jnp.bfloat16 and not interpret:
        integer = lax.bitcast_convert_type((bits | _MAGIC).astype(jnp.int16), jnp.bfloat16)
        return (integer - jnp.bfloat16(_ZERO)) * scale
    if second is None:
        weight = (bits - (_ZERO - 128)).astype(jnp.float32) * scale.astype(jnp.float32)
        return _rounded(weight, interpret)
    integers = bits.astype(jnp.float32)
    scale, second = scale.astype(jnp.float32), second.astype(jnp.float32)
    weight = (integers - second) * scale if offset == "zero" else integers * scale + second
    return _rounded(weight, interpret)


def _grouped_int8_kernel(x_ref, weight_ref, scale_ref, layer_ref, out_ref, *, tiling, interpret):
    tokens, inputs = x_ref.shape
    rows, layer = weight_ref.shape[1], layer_ref[0]
    group = inputs // scale_ref.shape[2]
    row, token = pl.program_id(0) * tiling.rows, pl.program_id(1) * tiling.tokens

    def step(i, sums):
        column = i * tiling.depth
        size = tiling.rows, tiling.depth
        integers = _load(weight_ref, (layer, row, column), size, (rows, inputs))
        own, inside = row + iota(size, 0), column + iota(size, 1)
        there = (own < rows) & (inside < inputs)
        at = scale_ref.at[layer, own, lax.div(inside, jnp.int32(group))]
        scale = access.load(at, mask=there, other=0.0)
        weight = integers.astype(jnp.float32) * scale.astype(jnp.float32)
        size = tiling.tokens, tiling.depth
        x = _load(x_ref, (token, column), size, (tokens, inputs))
        return sums + _dot(_rounded(weight, interpret), x, interpret)

    sums = jnp.zeros((tiling.rows, tiling.tokens), jnp.float32)
    steps = ceil_div(inputs, tiling.depth)
    sums = lax.fori_loop(jnp.int32(0), jnp.int32(steps), step, sums)
    _store(out_ref, sums, row, token)


def _int4_kernel(x_ref, weight_ref, scale_ref, layer_ref, out_ref, *, offset, tiling, interpret):
    places, tokens, words = x_ref.shape
    rows, layer = weight_ref.shape[1], layer_ref[0]
    words_a_group = words // scale_ref.shape[2]
    row, token = pl.program_id(0) * tiling.rows, pl.program_id(1) * tiling.tokens

    def step(i, sums):
        column = i * tiling.depth
        size = tiling.rows, tiling.depth
        tile = _load(weight_ref, (layer, row, column), size, (rows, words))
        own, group = row + iota(size, 0), lax.div(column + iota(size, 1), jnp.int32(words_a_group))
        there = (own < rows) & (column + iota(size, 1) < words)
        first = () if offset is None else (jnp.zeros_like(own),)
        scale = access.load(scale_ref.at[(layer, own, group, *first)], mask=there, other=0.0)
        second = None
        if offset is not None:
            at = scale_ref.at[layer, own, group, jnp.ones_like(own)]
            second = access.load(at, mask=there, other=0.0)
        for place in range(places):
            bits = lax.shift_right_logical(tile, jnp.int32(WORD_SHIFTS[place])) & 0xF
            weight = _weight(bits, scale, second, offset, interpret)
            x = _load(x_ref, (place, token, column), (tiling.tokens, tiling.depth), (tokens, words))
            sums = sums + _dot(weight, x, interpret)
        return sums

    sums = jnp.zeros((tiling.rows, tiling.tokens), jnp.float32)
    steps = ceil_div(words, tiling.depth)
    sums = lax.fori_loop(jnp.int32(0), jnp.int32(steps), step, sums)
    _store(out_ref, sums, row, token)
