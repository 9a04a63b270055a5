"""Memory accesses that Pallas does not offer: written in PTX, or on a choice of arrays.

This is the one file that touches JAX's private interface to Triton. Each operation has a
plain twin for interpret mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax._src import core, state
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith
from jax._src.pallas.triton import lowering, primitives
from jax._src.pallas.triton.lowering import tt_dialect
from jax.experimental.pallas import triton as plgpu

__all__ = ["load_pair", "load_tile", "prefetch_rows", "store_pair", "store_word"]

# Nothing with this effect is dropped, merged or moved across another that has it.
_ORDERED = primitives.barrier_effect


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def _values(ctx: Any, args: Sequence[Any]) -> list[Any]:
    """IR values of the last operands."""
    return [
        lowering._ensure_ir_value(a, v)
        for a, v in zip(args, ctx.avals_in[-len(args) :], strict=True)
    ]


def _like(shape: Sequence[int], element: ir.Type) -> ir.Type:
    return ir.RankedTensorType.get(list(shape), element)


def _addresses(ptr: Any, offsets: Any, shape: Sequence[int]) -> Any:
    pointers = lowering._add(lowering._bcast_to(ptr, list(shape)), offsets)
    return tt_dialect.ptr_to_int(_like(shape, _i64()), pointers)


def _assembly(results: list[Any], text: str, constraints: str, args: list[Any]) -> list[Any]:
    out = tt_dialect.elementwise_inline_asm(
        results, text, constraints=constraints, pure=False, packed_element=1, args=args
    )
    return [out] if len(results) == 1 else list(out)


# A tile of one of several weight arrays

_load_tile_p = core.Primitive("ffjax_load_tile")
_load_tile_p.multiple_results = True


@_load_tile_p.def_effectful_abstract_eval
def _(*args, strides):
    refs, offsets = args[: len(strides)], args[-2]
    effects = {state.ReadEffect(i) for i in range(len(refs))}
    return [core.ShapedArray(offsets.shape, refs[0].dtype)], effects


def _choose(pointers: Sequence[Any], strides: Sequence[int], which: Any, layer: Any) -> Any:
    """Where the `which`-th array's `layer` begins."""
    layer = arith.extsi(_i64(), layer)  # a stacked array may hold 2^31 weights and more
    chosen: Any = None
    for number, (pointer, stride) in enumerate(zip(pointers, strides, strict=True)):
        if stride:
            pointer = lowering._add(pointer, arith.muli(layer, arith.constant(_i64(), stride)))
        if chosen is None:
            chosen = pointer
        else:
            here = arith.cmpi(arith.CmpIPredicate.eq, which, arith.constant(_i32(), number))
            chosen = arith.select(here, pointer, chosen)
    return chosen


@lowering.register_lowering(_load_tile_p)
def _(ctx, *args, strides):
    which, layer, offsets, mask = _values(ctx, args[len(strides) :])
    shape = list(ctx.avals_out[0].shape)
    chosen = _choose(args[: len(strides)], strides, which, layer)
    zero = arith.constant(lowering._dtype_to_ir_type(ctx.avals_out[0].dtype), 0.0)
    view = lowering._add(lowering._bcast_to(chosen, shape), offsets)
    return [lowering._load(view, mask=mask, other=lowering._bcast_to(zero, shape))]


def _layer_strides(refs: Sequence[Any]) -> tuple[int, ...]:
    """Elements of a layer of each array; 0 where there are no layers."""
    return tuple(ref.shape[-2] * ref.shape[-1] if len(ref.shape) == 3 else 0 for ref in refs)


def load_tile(
    refs: Sequence[Any],
    which: Array,
    layer: Array,
    rows: Array,
    columns: Array,
    inner: Array,
    mask: Array,
    *,
    interpret: bool,
) -> Array:
    """A tile of the `which`-th array at its `layer`; 0 where the mask is false.

    One load whatever the array, so that the compiler pipelines it over the whole stream.

    Args:
        refs: weights `[L, out, in]` or `[out, in]`, of one dtype.
        which: int32 scalar.
        layer: int32 scalar; arrays without layers ignore it.
        rows: int32, the tile's shape.
        columns: int32, the same shape.
        inner: int32 scalar, columns of the array chosen.
        mask: bool, the same shape.
        interpret: whether the kernel is interpreted.
    """
    if interpret:

        def reader(ref):
            def read():
                rows_in = jnp.minimum(rows, ref.shape[-2] - 1)
                columns_in = jnp.minimum(columns, ref.shape[-1] - 1)
                at = (rows_in, columns_in)
                if len(ref.shape) == 3:
                    at = (jnp.minimum(layer, ref.shape[0] - 1), *at)
                return plgpu.load(ref.at[at], mask=mask, other=0.0)

            return read

        return lax.switch(which, [reader(ref) for ref in refs])
    offsets = rows * inner + columns
    strides = _layer_strides(refs)
    return _load_tile_p.bind(*refs, which, layer, offsets, mask, strides=strides)[0]


# Rows of a tile that will be loaded later, into the L2 cache

_prefetch_p = core.Primitive("ffjax_prefetch")
_prefetch_p.multiple_results = True


@_prefetch_p.def_effectful_abstract_eval
def _(*args, strides):
    return [core.ShapedArray(args[-3].shape, jnp.int32)], {_ORDERED}


@lowering.register_lowering(_prefetch_p)
def _(ctx, *args, strides):
    which, layer, offsets, size, mask = _values(ctx, args[len(strides) :])
    shape = ctx.avals_out[0].shape
    chosen = _choose(args[: len(strides)], strides, which, layer)
    mask = arith.extui(_like(shape, _i32()), mask)
    size = lowering._bcast_to(size, list(shape))
    # Every row lies in several threads' registers; the first ones ask for it.
    text = (
        "{ .reg .pred %p; .reg .b32 %t; mov.u32 %t, %tid.x; "
        f"setp.lt.u32 %p, %t, {shape[0]}; setp.ne.and.s32 %p, $3, 0, %p; "
        "@%p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }"
    )
    addresses = _addresses(chosen, offsets, shape)
    return _assembly([_like(shape, _i32())], text, "=r,l,r,r", [addresses, size, mask])


def prefetch_rows(
    refs: Sequence[Any],
    which: Array,
    layer: Array,
    rows: Array,
    column: Array,
    inner: Array,
    width: Array,
    mask: Array,
    *,
    interpret: bool,
) -> None:
    """Asks for rows of the `which`-th array, so that a later load finds them in the L2 cache.

    Needs compute capability 9.0.

    Args:
        refs: weights, as in `load_tile`; bfloat16.
        which: int32 scalar.
        layer: int32 scalar.
        rows: int32 `[R]`.
        column: int32 scalar, where in a row to begin: a multiple of 8.
        inner: int32 scalar, columns of the array chosen.
        width: int32 scalar, columns to ask for: a multiple of 8.
        mask: bool `[R]`.
        interpret: whether the kernel is interpreted: then nothing is done.
    """
    if interpret:
        return
    strides = _layer_strides(refs)
    offsets = rows * inner + column
    _prefetch_p.bind(*refs, which, layer, offsets, 2 * width, mask, strides=strides)


# Words that other programs read in the same launch


def _spared(ref: Any, offsets: Array, mask: Array) -> Array:
    """Offsets, those the mask hides moved to the array's last words, which nobody uses.

    An interpreted store writes what was there before where the mask is false: there it must
    not meet what the same store writes elsewhere.
    """
    return jnp.where(mask, offsets, ref.shape[0] - 2)


_store_word_p = core.Primitive("ffjax_store_word")
_store_word_p.multiple_results = True


@_store_word_p.def_effectful_abstract_eval
def _(ref, offsets, word, mask):
    return [core.ShapedArray(offsets.shape, jnp.int32)], {_ORDERED, state.WriteEffect(0)}


@lowering.register_lowering(_store_word_p)
def _(ctx, ref, *args):
    offsets, word, mask = _values(ctx, args)
    shape = ctx.avals_out[0].shape
    mask = arith.extui(_like(shape, _i32()), mask)
    return _assembly(
        [_like(shape, _i32())],
        "{ .reg .pred %p; setp.ne.s32 %p, $3, 0; "
        "@%p st.relaxed.gpu.global.b32 [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r,r",
        [_addresses(ref, offsets, shape), word, mask],
    )


def store_word(ref: Any, offsets: Array, word: Array, mask: Array, *, interpret: bool) -> None:
    """Stores 32-bit words so that another program's poll may read them at any time.

    Args:
        ref: int32 array.
        offsets: int32, any shape.
        word: int32, the same shape.
        mask: bool, the same shape.
        interpret: whether the kernel is interpreted.
    """
    if interpret:
        plgpu.store(ref.at[_spared(ref, offsets, mask)], word, mask=mask)
    else:
        _store_word_p.bind(ref, offsets, word, mask)


_store_pair_p = core.Primitive("ffjax_store_pair")
_store_pair_p.multiple_results = True


@_store_pair_p.def_effectful_abstract_eval
def _(ref, offsets, first, second, mask):
    return [core.ShapedArray(offsets.shape, jnp.int32)], {_ORDERED, state.WriteEffect(0)}


@lowering.register_lowering(_store_pair_p)
def _(ctx, ref, *args):
    offsets, first, second, mask = _values(ctx, args)
    shape = ctx.avals_out[0].shape
    mask = arith.extui(_like(shape, _i32()), mask)
    return _assembly(
        [_like(shape, _i32())],
        "{ .reg .pred %p; .reg .b64 %w; setp.ne.s32 %p, $4, 0; mov.b64 %w, {$2, $3}; "
        "@%p st.relaxed.gpu.global.b64 [$1], %w; mov.u32 $0, 0; }",
        "=r,l,r,r,r",
        [_addresses(ref, offsets, shape), first, second, mask],
    )


def store_pair(
    ref: Any, offsets: Array, first: Array, second: Array, mask: Array, *, interpret: bool
) -> None:
    """Stores two neighbouring words as one: a reader sees both or neither.

    Args:
        ref: int32 array.
        offsets: int32, even numbers.
        first: int32, the same shape, stored at the offset.
        second: int32, the same shape, stored behind it.
        mask: bool, the same shape.
        interpret: whether the kernel is interpreted.
    """
    if interpret:
        offsets = _spared(ref, offsets, mask)
        plgpu.store(ref.at[offsets], first, mask=mask)
        plgpu.store(ref.at[offsets + 1], second, mask=mask)
    else:
        _store_pair_p.bind(ref, offsets, first, second, mask)


_load_pair_p = core.Primitive("ffjax_load_pair")
_load_pair_p.multiple_results = True


@_load_pair_p.def_effectful_abstract_eval
def _(ref, offsets):
    words = core.ShapedArray(offsets.shape, jnp.int32)
    return [words, words], {_ORDERED, state.ReadEffect(0)}


@lowering.register_lowering(_load_pair_p)
def _(ctx, ref, *args):
    [offsets] = _values(ctx, args)
    shape = ctx.avals_out[0].shape
    words = _like(shape, _i32())
    return _assembly(
        [words, words],
        "{ .reg .b64 %w; ld.relaxed.gpu.global.b64 %w, [$2]; mov.b64 {$0, $1}, %w; }",
        "=r,=r,l",
        [_addresses(ref, offsets, shape)],
    )


def load_pair(ref: Any, offsets: Array, *, interpret: bool) -> tuple[Array, Array]:
    """Loads two neighbouring words as one.

    Args:
        ref: int32 array.
        offsets: int32, even numbers.
        interpret: whether the kernel is interpreted.

    Returns:
        The words at the offsets and those behind them, int32.
    """
    if interpret:
        return plgpu.load(ref.at[offsets]), plgpu.load(ref.at[offsets + 1])
    first, second = _load_pair_p.bind(ref, offsets)
    return first, second
