"""Shared memory that the compiler does not know is used."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax._src import core

from pallas_kernels.stream.ptx import lowered

__all__ = ["clear_shared", "read_row", "ring_base", "write_halves", "write_row"]

_ring_base_p = core.Primitive("ffjax_ring_base")


@_ring_base_p.def_effectful_abstract_eval
def _(zero, *, size, alignment):
    return core.ShapedArray((1,), jnp.int32), {lowered.ORDERED}


@lowered.rule(_ring_base_p)
def _(ctx, zero, *, size, alignment):
    [zero] = lowered.values(ctx, [zero])
    return lowered.ring_base(zero, size, alignment)


def ring_base(size: int, alignment: int) -> Array:
    """Address in shared memory of the last `size` bytes that the kernel has, rounded up.

    Args:
        size: bytes.
        alignment: a power of two.

    Returns:
        int32 scalar.
    """
    zero = jnp.zeros((1,), jnp.int32)  # inline assembly takes arrays only
    return jnp.sum(_ring_base_p.bind(zero, size=size, alignment=alignment))


_clear_shared_p = core.Primitive("ffjax_clear_shared")


@_clear_shared_p.def_effectful_abstract_eval
def _(address, *, size, threads):
    return core.ShapedArray((1,), jnp.int32), {lowered.ORDERED}


@lowered.rule(_clear_shared_p)
def _(ctx, address, *, size, threads):
    [address] = lowered.values(ctx, [address])
    text = (
        "{ .reg .pred %p; .reg .b32 %o, %a; mov.u32 %o, %tid.x; shl.b32 %o, %o, 4; again: "
        f"setp.lt.u32 %p, %o, {size}; @!%p bra done; add.u32 %a, %o, $1; "
        f"st.shared.v4.b32 [%a], {{0, 0, 0, 0}}; add.u32 %o, %o, {16 * threads}; bra again; "
        "done: mov.u32 $0, 0; }"
    )
    return lowered.assembly([lowered.like((1,), lowered.i32())], text, "=r,r", [address])[0]


def clear_shared(address: Array, size: int, threads: int) -> None:
    """Sets shared memory to zeros, 16 bytes a thread in turn.

    Args:
        address: int32 scalar, a multiple of 16.
        size: bytes.
        threads: of a program.
    """
    _clear_shared_p.bind(jnp.full((1,), address), size=size, threads=threads)


_write_row_p = core.Primitive("ffjax_write_row")


@_write_row_p.def_effectful_abstract_eval
def _(address, mask, *words):
    return core.ShapedArray(address.shape, jnp.int32), {lowered.ORDERED}


@lowered.rule(_write_row_p)
def _(ctx, *args):
    address, mask, *words = lowered.values(ctx, args)
    shape = ctx.avals_out[0].shape
    mask = lowered.arith.extui(lowered.like(shape, lowered.i32()), mask)
    text = (
        "{ .reg .pred %p; setp.ne.s32 %p, $2, 0; "
        "@%p st.shared.v4.b32 [$1], {$3, $4, $5, $6}; "
        "@%p st.shared.v4.b32 [$1+16], {$7, $8, $9, $10}; mov.u32 $0, 0; }"
    )
    arguments = [address, mask, *words]
    return lowered.assembly(
        [lowered.like(shape, lowered.i32())], text, "=r" + ",r" * 10, arguments
    )[0]


def write_row(address: Array, words: Sequence[Array], mask: Array) -> None:
    """Writes rows of 8 words to shared memory.

    Args:
        address: int32 `[E]`, multiples of 16.
        words: 8 of int32 `[E]`.
        mask: bool `[E]`.
    """
    _write_row_p.bind(address, mask, *words)


_read_row_p = core.Primitive("ffjax_read_row")
_read_row_p.multiple_results = True


@_read_row_p.def_effectful_abstract_eval
def _(address):
    return [core.ShapedArray((1,), jnp.int32)] * 8, {lowered.ORDERED}


@lowered.rule(_read_row_p)
def _(ctx, address):
    [address] = lowered.values(ctx, [address])
    text = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$8]; ld.shared.v4.b32 {$4, $5, $6, $7}, [$8+16];"
    constraints = ",".join(["=&r"] * 8 + ["r"])
    return lowered.assembly([lowered.like((1,), lowered.i32())] * 8, text, constraints, [address])


def read_row(address: Array) -> list[Array]:
    """Reads a row of 8 words from shared memory.

    Args:
        address: int32 scalar, a multiple of 16.

    Returns:
        8 of int32 scalar.
    """
    return [jnp.sum(word) for word in _read_row_p.bind(jnp.full((1,), address))]


_write_halves_p = core.Primitive("ffjax_write_halves")


@_write_halves_p.def_effectful_abstract_eval
def _(address, value, mask):
    return core.ShapedArray(address.shape, jnp.int32), {lowered.ORDERED}


@lowered.rule(_write_halves_p)
def _(ctx, *args):
    address, value, mask = lowered.values(ctx, args)
    shape = ctx.avals_out[0].shape
    mask = lowered.arith.extui(lowered.like(shape, lowered.i32()), mask)
    text = (
        "{ .reg .pred %p; .reg .b16 %x, %y; setp.ne.s32 %p, $3, 0; mov.b32 {%x, %y}, $2; "
        "@%p st.shared.b16 [$1], %x; mov.u32 $0, 0; }"
    )
    result = lowered.like(shape, lowered.i32())
    return lowered.assembly([result], text, "=r,r,r,r", [address, value, mask])[0]


def write_halves(address: Array, value: Array, mask: Array) -> None:
    """Writes numbers of two bytes to shared memory.

    Args:
        address: int32, multiples of 2.
        value: bfloat16, the same shape.
        mask: bool, the same shape.
    """
    bits = lax.bitcast_convert_type(value, jnp.int16).astype(jnp.int32)
    _write_halves_p.bind(address, bits, mask)
