"""How rules of inline PTX meet arrays that threads hold: see `inline_ptx.lowered`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax._src.lib.mlir.dialects import arith

from pallas_kernels.mosaic_gpu.ir import constant, element_address, f32, i32, inline, integer
from pallas_kernels.mosaic_gpu.threads import Threads
from pallas_kernels.mosaic_gpu.values import Pointer, Registers

__all__ = ["MosaicGpu"]


class _Arithmetic:
    """MLIR's arithmetic, for single numbers and for each register of arrays.

    Where MLIR wants the type of a result first, it is what `MosaicGpu.like` gives.
    """

    def constant(self, element: Any, value: Any) -> Any:
        return constant(element, value)

    def __getattr__(self, name: str) -> Any:
        function = getattr(arith, name)

        def call(*args: Any) -> Any:
            to = (
                [args[0][1] if isinstance(args[0], tuple) else args[0]] if _is_type(args[0]) else []
            )
            operands = args[len(to) :]
            arrays = [x for x in operands if isinstance(x, Registers)]
            if not arrays:
                return function(*to, *operands)
            rows = zip(*(x.regs for x in operands), strict=True)
            regs = [function(*to, *row) for row in rows]
            return Registers(arrays[0].shape, arrays[0].layout, regs)

        return call


def _is_type(x: Any) -> bool:
    return isinstance(x, tuple) or not (isinstance(x, Registers) or hasattr(x, "type"))


class MosaicGpu:
    """Arrays are registers in the plain layout; single numbers are MLIR's values."""

    def __init__(self, threads: Threads, ring: Any):
        """Takes the threads, and where the ring's shared memory begins: int32."""
        self.arith: Any = _Arithmetic()
        self._threads, self._ring = threads, ring

    def integer(self, bits: int) -> Any:
        """The type of integers of so many bits."""
        return integer(bits)

    def float32(self) -> Any:
        """The type of float32."""
        return f32()

    def values(self, ctx: Any, args: Sequence[Any]) -> list[Any]:
        """What the operands are already."""
        return list(args)

    def like(self, shape: Sequence[int], element: Any) -> Any:
        """Shape and type of a number."""
        return tuple(shape), element

    def spread(self, value: Any, shape: Sequence[int]) -> Any:
        """An array of one value."""
        layout = self._threads.plain(shape)
        return Registers(tuple(shape), layout, [value] * layout.registers)

    def pointer(self, ref: Pointer) -> Any:
        """Address of an array, 64 bits."""
        return ref.base

    def addresses(self, ref: Pointer, offsets: Registers, shape: Sequence[int]) -> Any:
        """64-bit addresses of an array's elements."""
        regs = [element_address(ref.base, offset, ref.item) for offset in offsets.regs]
        return Registers(tuple(shape), offsets.layout, regs)

    def assembly(
        self,
        results: list[Any],
        text: str,
        constraints: str,
        args: list[Any],
        together: int,
    ) -> list[Any]:
        """Inline PTX, run by every thread for each of its elements, or for `together` of them."""
        out: list[list[Any]] = [[] for _ in results]
        for first in range(0, args[0].layout.registers, together):
            some = range(first, first + together)
            operands = [x.regs[k] for x in args for k in some]
            kinds = [element for _, element in results for _ in some]
            got = inline(kinds, text, constraints, operands)
            for i, regs in enumerate(out):
                regs += got[i * together : (i + 1) * together]
        return [
            Registers(shape, self._threads.plain(shape), regs)
            for (shape, _), regs in zip(results, out, strict=True)
        ]

    def barrier(self) -> None:
        """Waits for the program's other threads."""
        self._threads.meet()

    def one_program_a_multiprocessor(self) -> None:
        """Is so: Mosaic GPU launches no second program beside one."""

    def ring_base(self, zero: Registers, size: int, alignment: int) -> Any:
        """Where `size` bytes of shared memory begin that are the ring's."""
        low = arith.addi(self._ring, constant(i32(), alignment - 1))
        base = arith.andi(low, constant(i32(), -alignment))
        return Registers(zero.shape, zero.layout, [base])
