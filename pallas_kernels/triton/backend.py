"""How Triton holds arrays: see `pallas_kernels.inline_ptx.lowered`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, gpu
from jax._src.pallas.triton import lowering
from jax._src.pallas.triton.lowering import tt_dialect

from pallas_kernels.inline_ptx import lowered
from pallas_kernels.primitives import Primitive

__all__ = ["TRITON", "Triton", "know_rules"]

# Primitives whose rules Triton knows.
_known: set[Primitive] = set()


def know_rules() -> None:
    """Makes the rules of the kernels' operations known to Triton; to be called before a launch."""
    for primitive, rule in lowered.RULES.items():
        if primitive not in _known:
            lowering.register_lowering(primitive)(_for_triton(rule))
            _known.add(primitive)


def _for_triton(rule: lowered.Rule) -> lowered.Rule:
    @functools.wraps(rule)
    def lower(*args: Any, **params: Any) -> Any:
        with lowered.by_backend(TRITON):
            return rule(*args, **params)

    return lower


class Triton:
    """Values are tensors; Triton's compiler says which thread holds what."""

    arith: Any = arith

    def integer(self, bits: int) -> ir.Type:
        """The type of integers of so many bits."""
        return ir.IntegerType.get_signless(bits)

    def float32(self) -> ir.Type:
        """The type of float32."""
        return ir.F32Type.get()

    def values(self, ctx: Any, args: Sequence[Any]) -> list[Any]:
        """Tensors of the last operands."""
        return [
            lowering._ensure_ir_value(a, v)
            for a, v in zip(args, ctx.avals_in[-len(args) :], strict=True)
        ]

    def like(self, shape: Sequence[int], element: ir.Type) -> Any:
        """The type of tensors of a shape."""
        return ir.RankedTensorType.get(list(shape), element)

    def spread(self, value: Any, shape: Sequence[int]) -> Any:
        """A tensor of one value."""
        return lowering._bcast_to(value, list(shape))

    def pointer(self, ref: Any) -> Any:
        """Address of an array, 64 bits."""
        return tt_dialect.ptr_to_int(self.integer(64), ref)

    def addresses(self, ref: Any, offsets: Any, shape: Sequence[int]) -> Any:
        """64-bit addresses of an array's elements."""
        pointers = lowering._add(self.spread(ref, shape), offsets)
        return tt_dialect.ptr_to_int(self.like(shape, self.integer(64)), pointers)

    def assembly(
        self,
        results: list[Any],
        text: str,
        constraints: str,
        args: list[Any],
        together: int,
    ) -> list[Any]:
        """Inline PTX, run by every thread for each of its elements, or for `together` of them."""
        out = tt_dialect.elementwise_inline_asm(
            results, text, constraints=constraints, pure=False, packed_element=together, args=args
        )
        return [out] if len(results) == 1 else list(out)

    def barrier(self) -> None:
        """Waits for the program's other threads; Triton's own barriers count it."""
        gpu.barrier()

    def one_program_a_multiprocessor(self) -> None:
        """Becomes `.minnctapersm 1` in PTX."""
        op: Any = ir.InsertionPoint.current.block.owner
        while op.name != "tt.func":
            op = op.parent
        one = ir.IntegerAttr.get(self.integer(32), 1)
        op.attributes["nvvm.minctasm"] = one

    def ring_base(self, zero: Any, size: int, alignment: int) -> Any:
        """The last bytes of shared memory, after what Triton takes for itself."""
        text = (
            "{ .reg .b32 %s; mov.u32 %s, %dynamic_smem_size; mov.u32 $0, global_smem; "
            f"add.u32 $0, $0, %s; sub.u32 $0, $0, {size}; "
            f"add.u32 $0, $0, {alignment - 1}; and.b32 $0, $0, {-alignment}; }}"
        )
        word = self.like((1,), self.integer(32))
        return lowered.assembly([word], text, "=r,r", [zero])[0]


TRITON = Triton()
