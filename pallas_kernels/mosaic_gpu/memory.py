"""Loads and stores of device memory, each thread its own elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from jax._src.lib.mlir.dialects import arith

from pallas_kernels.asm import Block
from pallas_kernels.mosaic_gpu.ir import (
    constant,
    element_address,
    element_type,
    i32,
    integer,
    is_float,
    width,
    written,
)
from pallas_kernels.mosaic_gpu.layout import Layout
from pallas_kernels.mosaic_gpu.threads import Threads
from pallas_kernels.mosaic_gpu.values import Lazy, Pointer, Registers

__all__ = ["Memory"]

_Numbers = Registers | Lazy


class Memory:
    """What a program does to arrays in device memory."""

    def __init__(self, threads: Threads, spread: Callable[[_Numbers, tuple[int, ...]], _Numbers]):
        """Takes how an array is spread to a larger shape."""
        self._threads, self._spread = threads, spread

    def load(
        self,
        ref: Pointer,
        sizes: Sequence[int],
        indices: Sequence[Any],
        shape: tuple[int, ...],
        dtype: Any,
        mask: _Numbers | None = None,
        other: _Numbers | None = None,
    ) -> Registers:
        """Elements of an array.

        Args:
            ref: the array.
            sizes: its shape.
            indices: one for each of its axes, int32, whose shapes broadcast to `shape`; or int.
            shape: of the result.
            dtype: of the elements.
            mask: which are loaded; None: all.
            other: what stands for the others; None: 0.
        """
        layout, addresses = self._addresses(ref, sizes, indices, shape, [mask, other])
        kind = element_type(dtype)
        masks = None if mask is None else self._at(mask, shape, layout)
        others = [constant(kind, 0)] * layout.registers
        if other is not None:
            others = self._at(other, shape, layout)
        regs = [
            _load(kind, address, None if masks is None else masks[k], others[k])
            for k, address in enumerate(addresses)
        ]
        return Registers(shape, layout, regs)

    def store(
        self,
        ref: Pointer,
        sizes: Sequence[int],
        indices: Sequence[Any],
        shape: tuple[int, ...],
        value: _Numbers,
        mask: _Numbers | None = None,
    ) -> None:
        """Stores elements of an array, each by one thread. See `load`."""
        layout, addresses = self._addresses(ref, sizes, indices, shape, [value, mask])
        masks = None if mask is None else self._at(mask, shape, layout)
        free = layout.free(self._threads.count)
        mine = self._threads.where_not(free) if free else None
        for k, (address, number) in enumerate(
            zip(addresses, self._at(value, shape, layout), strict=True)
        ):
            guard = mine if masks is None else masks[k]
            if masks is not None and mine is not None:
                guard = arith.andi(guard, mine)
            _store(address, number, guard)

    def _at(self, x: _Numbers, shape: tuple[int, ...], layout: Layout) -> list[Any]:
        return self._threads.at(self._spread(x, shape), layout)

    def _addresses(
        self,
        ref: Pointer,
        sizes: Sequence[int],
        indices: Sequence[Any],
        shape: tuple[int, ...],
        others: Sequence[_Numbers | None],
    ) -> tuple[Layout, list[Any]]:
        size = math.prod(shape)
        known = [x for x in (*indices, *others) if isinstance(x, Registers) and x.size == size > 1]
        layout = known[0].layout if known else self._threads.plain(shape)
        # In 32 bits where the array's elements can be counted so.
        wide = math.prod(sizes) >= 1 << 31
        totals: list[Any] = [None] * layout.registers
        for axis, index in enumerate(indices):
            stride = math.prod(sizes[axis + 1 :])
            if isinstance(index, int):
                regs = [constant(i32(), index)] * layout.registers
            else:
                regs = self._at(index, shape, layout)
            for k, value in enumerate(regs):
                part = arith.extsi(integer(64), value) if wide else value
                part = part if stride == 1 else arith.muli(part, constant(part.type, stride))
                before = totals[k]
                totals[k] = part if before is None else arith.addi(before, part)
        return layout, [self._address(ref, total) for total in totals]

    def _address(self, ref: Pointer, element: Any) -> Any:
        if element is None:
            return ref.base
        if width(element.type) == 32:
            return element_address(ref.base, element, ref.item)
        return arith.addi(ref.base, arith.muli(element, constant(integer(64), ref.item)))


def _register(kind: Any) -> tuple[str, Any]:
    """The type of a number's register in PTX, and as what it is bound."""
    if is_float(kind) and width(kind) == 32:
        return "f32", kind
    return ("u32", integer(32)) if width(kind) == 32 else ("u16", integer(16))


def _load(kind: Any, address: Any, mask: Any, other: Any) -> Any:
    register, bound = _register(kind)
    b, args, there = Block(), [address], None
    [out] = b.results(register, early=mask is not None)
    [place] = b.operands(place="u64")
    if mask is not None:
        wanted, instead = b.operands(wanted="u32", instead=register)
        args += [arith.extui(i32(), mask), _to_bound(other, bound)]
        there = b.pred("there")
        b.setp("ne", there, wanted, 0)
        b.mov(out, instead)
    with b.when(there):
        (b.ld_global if width(kind) > 8 else b.ld_global_s8)(out, place)
    return _from_bound(written(b, args)[0], kind)


def _store(address: Any, value: Any, mask: Any) -> None:
    register, bound = _register(value.type)
    b, args, there = Block(), [address, _to_bound(value, bound)], None
    [nothing] = b.results("u32", early=False)
    place, number = b.operands(place="u64", number=register)
    if mask is not None:
        [wanted] = b.operands(wanted="u32")
        args.append(arith.extui(i32(), mask))
        there = b.pred("there")
        b.setp("ne", there, wanted, 0)
    with b.when(there):
        (b.st_global if width(value.type) > 8 else b.st_global_b8)(place, number)
    b.mov(nothing, 0)
    written(b, args)


def _to_bound(value: Any, bound: Any) -> Any:
    if is_float(value.type) and value.type != bound:
        value = arith.bitcast(integer(width(value.type)), value)
    if value.type == bound:
        return value
    # A bit has a byte of its own, 0 or 1.
    return (arith.extui if width(value.type) == 1 else arith.extsi)(bound, value)


def _from_bound(value: Any, kind: Any) -> Any:
    if value.type == kind:
        return value
    if width(kind) < width(value.type):
        value = arith.trunci(integer(width(kind)), value)
    return arith.bitcast(kind, value) if is_float(kind) else value
