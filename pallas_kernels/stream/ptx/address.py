"""Where in memory a tile begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax._src import core
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith
from jax._src.pallas.triton import lowering
from jax._src.pallas.triton.lowering import tt_dialect

from pallas_kernels.stream.ptx import lowered

__all__ = ["Begin", "begin_words"]


class Begin(NamedTuple):
    """Where a tile of the first layer begins: int32.

    An address: `low` and `high` are the halves of its distance from the first array's, and
    `stride` is a layer's length, all in units. Interpreted, arrays have no addresses: `low` is
    the distance in the array, and `high` the array's number.
    """

    low: Array
    high: Array
    stride: Array


_begin_words_p = core.Primitive("ffjax_begin_words")
_begin_words_p.multiple_results = True


@_begin_words_p.def_effectful_abstract_eval
def _(*args, strides, unit):
    return [core.ShapedArray(args[-1].shape, jnp.int32)] * 3, set()


@lowering.register_lowering(_begin_words_p)
def _(ctx, *args, strides, unit):
    *beyond, start = lowered.values(ctx, args[len(strides) :])
    shape = list(ctx.avals_out[0].shape)
    wide = lowered.like(shape, lowered.i64())

    def constant(value: int, element: ir.Type) -> Any:
        return lowering._bcast_to(arith.constant(element, value), shape)

    addresses = [tt_dialect.ptr_to_int(lowered.i64(), pointer) for pointer in args[: len(strides)]]
    chosen, stride = constant(0, lowered.i64()), constant(strides[0] // unit, lowered.i32())
    for condition, address, size in zip(beyond, addresses[1:], strides[1:], strict=True):
        distance = lowering._bcast_to(arith.subi(address, addresses[0]), shape)
        chosen = arith.select(condition, distance, chosen)
        stride = arith.select(condition, constant(size // unit, lowered.i32()), stride)
    # Arrays begin at multiples of a unit.
    chosen = arith.shrsi(chosen, constant((2 * unit).bit_length() - 1, lowered.i64()))
    chosen = arith.addi(chosen, arith.extsi(wide, start))
    low = arith.trunci(lowered.like(shape, lowered.i32()), chosen)
    high = arith.trunci(
        lowered.like(shape, lowered.i32()), arith.shrsi(chosen, constant(32, lowered.i64()))
    )
    return [low, high, stride]


def _layer_strides(refs: Sequence[Any]) -> tuple[int, ...]:
    """Elements of a layer of each array; 0 where there are no layers."""
    return tuple(ref.shape[-2] * ref.shape[-1] if len(ref.shape) == 3 else 0 for ref in refs)


def begin_words(
    refs: Sequence[Any], beyond: Sequence[Array], start: Array, unit: int, *, interpret: bool
) -> list[Array]:
    """The first three fields of the `Begin` of some tiles, int32 `[T]` each.

    Args:
        refs: weights `[L, out, in]` or `[out, in]`, bfloat16.
        beyond: bool `[T]`, one for each array but the first: the last array whose condition
            holds is the tile's, or the first.
        start: int32 `[T]`, where in a layer's matrix the tiles begin, in units.
        unit: elements, a power of two up to 8 that divides every matrix's rows.
        interpret: whether the kernel is interpreted.
    """
    strides = _layer_strides(refs)
    if interpret:
        which, stride = jnp.zeros_like(start), jnp.full_like(start, strides[0] // unit)
        for number, condition in enumerate(beyond, start=1):
            which = jnp.where(condition, number, which)
            stride = jnp.where(condition, strides[number] // unit, stride)
        return [start, which, stride]
    return _begin_words_p.bind(*refs, *beyond, start, strides=strides, unit=unit)
