"""What the operations of this package are lowered with: JAX's private interface to Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.pallas.triton import lowering, primitives
from jax._src.pallas.triton.lowering import tt_dialect

__all__ = [
    "MEET",
    "ORDERED",
    "REJOIN",
    "addresses",
    "assembly",
    "i32",
    "i64",
    "like",
    "one_program_a_multiprocessor",
    "values",
]

# Nothing with this effect is dropped, merged or moved across another that has it.
ORDERED = primitives.barrier_effect
# The threads of a warp wait for each other.
REJOIN = "bar.warp.sync 0xffffffff;"
# The threads of a program do.
MEET = f"{REJOIN} bar.sync 0;"


def i32() -> ir.Type:
    """32-bit integers."""
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    """64-bit integers."""
    return ir.IntegerType.get_signless(64)


def values(ctx: Any, args: Sequence[Any]) -> list[Any]:
    """IR values of the last operands."""
    return [
        lowering._ensure_ir_value(a, v)
        for a, v in zip(args, ctx.avals_in[-len(args) :], strict=True)
    ]


def like(shape: Sequence[int], element: ir.Type) -> ir.Type:
    """Arrays of a shape."""
    return ir.RankedTensorType.get(list(shape), element)


def addresses(ptr: Any, offsets: Any, shape: Sequence[int]) -> Any:
    """64-bit addresses of an array's elements."""
    pointers = lowering._add(lowering._bcast_to(ptr, list(shape)), offsets)
    return tt_dialect.ptr_to_int(like(shape, i64()), pointers)


def one_program_a_multiprocessor() -> None:
    """Says that no second program need find room beside one: `.minnctapersm 1` in PTX.

    Of 128 threads ptxas else saves registers for two more programs, and spills what it has saved;
    the ring leaves no shared memory for them. To be called while lowering.
    """
    op: Any = ir.InsertionPoint.current.block.owner
    while op.name != "tt.func":
        op = op.parent
    op.attributes["nvvm.minctasm"] = ir.IntegerAttr.get(i32(), 1)


def assembly(
    results: list[Any],
    text: str,
    constraints: str,
    args: list[Any],
    together: int = 1,
    by_warps: bool = False,
) -> list[Any]:
    """Inline PTX, run by every thread for each of its elements, or for some together.

    Of several elements, an operand's and a result's registers follow each other. Has effects.

    All threads of a program come here, and where some have jumped, each warp's are together again
    at the end; unless only whole warps jump. The compiler's barriers count on it: a warp of which
    some threads still wait for words, while the others are at the barrier, was seen to pass it as
    if all had come.
    """
    if "bra " in text and not by_warps:
        text = f"{{ {text} {REJOIN} }}"
    out = tt_dialect.elementwise_inline_asm(
        results, text, constraints=constraints, pure=False, packed_element=together, args=args
    )
    return [out] if len(results) == 1 else list(out)
