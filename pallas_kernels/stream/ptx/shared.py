"""Shared memory that the compiler does not know is used."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.asm import TID, Block, Register
from pallas_kernels.inline_ptx import lowered
from pallas_kernels.inline_ptx.operation import Operation
from pallas_kernels.primitives import ORDERED, effectful, made

__all__ = ["clear_shared", "read_row", "ring_base", "write_halves", "write_row"]

_ring_base_p = effectful(
    "ffjax_ring_base", lambda *_, **__: (made((1,), jnp.int32), {ORDERED}), results=False
)


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


def _write_clear(b: Block, address: Register, *, size: int, threads: int) -> None:
    offset, place, is_within = b.u32("offset"), b.u32("place"), b.pred("is_within")
    done = b.label("done")
    b.mov(offset, TID)
    b.shl(offset, offset, 4)
    again = b.marked("again")
    b.setp("lt", is_within, offset, size)
    b.bra_unless(is_within, done)
    b.add(place, offset, address)
    b.st_shared(place, [0] * 4)
    b.add(offset, offset, 16 * threads)
    b.bra(again)
    b.mark(done)


_clear_shared = Operation("ffjax_clear_shared", _write_clear)


def clear_shared(address: Array, size: int, threads: int) -> None:
    """Sets shared memory to zeros, 16 bytes a thread in turn.

    Args:
        address: int32 scalar, a multiple of 16.
        size: bytes.
        threads: of a program.
    """
    _clear_shared(address, size=size, threads=threads)


def _write_words(b: Block, address: Register, mask: Register, *words: Register) -> None:
    wanted = b.pred("wanted")
    b.setp("ne", wanted, mask, 0)
    with b.when(wanted):
        b.st_shared(address, words[:4])
        b.st_shared(address + 16, words[4:])


_write_row = Operation("ffjax_write_row", _write_words)


def write_row(address: Array, words: Sequence[Array], mask: Array) -> None:
    """Writes rows of 8 words to shared memory.

    Args:
        address: int32 `[E]`, multiples of 16.
        words: 8 of int32 `[E]`.
        mask: bool `[E]`.
    """
    _write_row(address, mask, *words)


def _write_loads(b: Block, *registers: Register) -> None:
    *words, address = registers
    b.ld_shared(words[:4], address)
    b.ld_shared(words[4:], address + 16)


_read_row = Operation("ffjax_read_row", _write_loads)


def read_row(address: Array) -> list[Array]:
    """Reads a row of 8 words from shared memory.

    Args:
        address: int32 scalar, a multiple of 16.

    Returns:
        8 of int32 scalar.
    """
    return [jnp.sum(word) for word in _read_row(address, results=["int32"] * 8)]


def _write_half(b: Block, address: Register, value: Register, mask: Register) -> None:
    wanted, low, high = b.pred("wanted"), b.u16("low"), b.u16("high")
    b.setp("ne", wanted, mask, 0)
    b.unpack(low, high, value)
    with b.when(wanted):
        b.st_shared(address, low)


_write_halves = Operation("ffjax_write_halves", _write_half)


def write_halves(address: Array, value: Array, mask: Array) -> None:
    """Writes numbers of two bytes to shared memory.

    Args:
        address: int32, multiples of 2.
        value: bfloat16, the same shape.
        mask: bool, the same shape.
    """
    bits = lax.bitcast_convert_type(value, jnp.int16).astype(jnp.int32)
    _write_halves(address, bits, mask)
