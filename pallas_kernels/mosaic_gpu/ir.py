"""The few things of MLIR that lowering by threads writes: types, constants, inline PTX."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, llvm

from pallas_kernels.asm import Block

__all__ = [
    "constant",
    "element_address",
    "element_type",
    "f32",
    "i32",
    "inline",
    "integer",
    "is_float",
    "width",
    "written",
]

# What waits for other threads must neither be copied into branches nor moved there by LLVM.
# JAX before 0.11 cannot say so.
_CONVERGENT: dict[str, Any] = (
    {"convergent": True} if "convergent" in inspect.signature(llvm.inline_asm).parameters else {}
)


def integer(bits: int) -> ir.Type:
    """Integers of so many bits."""
    return ir.IntegerType.get_signless(bits)


def i32() -> ir.Type:
    """32-bit integers."""
    return integer(32)


def f32() -> ir.Type:
    """float32."""
    return ir.F32Type.get()


def element_type(dtype: Any) -> ir.Type:
    """The type of a number.

    Raises:
        NotImplementedError: the kernel's body had none of this dtype so far.
    """
    name = np.dtype(dtype).name
    floats = {"float32": ir.F32Type, "bfloat16": ir.BF16Type, "float16": ir.F16Type}
    if name in floats:
        return floats[name].get()
    if name == "bool":
        return integer(1)
    if name.removeprefix("u").startswith("int"):
        return integer(int(name.rpartition("int")[2]))
    raise NotImplementedError(f"The kernel is not lowered for numbers of dtype {name}.")


def is_float(element: Any) -> bool:
    """Whether a type is of floating point."""
    return not isinstance(element, ir.IntegerType)


def width(element: Any) -> int:
    """Bits of a number."""
    return element.width


def constant(element: Any, value: Any) -> Any:
    """A number."""
    if is_float(element):
        return arith.constant(element, ir.FloatAttr.get(element, float(value)))
    value = int(value)
    if element.width > 1:
        value = (value + (1 << (element.width - 1))) % (1 << element.width)
        value -= 1 << (element.width - 1)
    return arith.constant(element, ir.IntegerAttr.get(element, value))


def written(b: Block, args: Sequence[Any], *, effects: bool = True) -> list[Any]:
    """A block of inline PTX: one register each for results and operands.

    Args:
        b: the block, with results of 16 or 32 bits.
        args: the operands.
        effects: as of `inline`.
    """
    types = {"f32": f32(), "u16": integer(16), "u64": integer(64)}
    results = [types.get(kind, i32()) for kind in b.result_kinds]
    return inline(results, b.text(), b.constraints, args, effects=effects)


def element_address(base: Any, element: Any, item: int) -> Any:
    """The address of an array's element, 64 bits.

    LLVM sees no sum. It would add the part that does not change from layer to layer to the base,
    and keep what comes of it, an address for each element of a thread.

    Args:
        base: the array's address, 64 bits.
        element: its number, int32.
        item: bytes of an element.
    """
    b = Block()
    [place] = b.results("u64", early=False)
    start, number = b.operands(start="u64", number="s32")
    b.mad_wide(place, number, item, start)
    return written(b, [base, element], effects=False)[0]


def inline(
    results: Sequence[Any],
    text: str,
    constraints: str,
    args: Sequence[Any],
    *,
    effects: bool = True,
) -> list[Any]:
    """Inline PTX: one register each for results and operands.

    Args:
        results: their types.
        text: with $0 and so on, results first.
        constraints: one for each of them.
        args: the operands.
        effects: whether it does more than compute, or needs all threads of a warp; what does not
            may be moved and merged.
    """
    one = len(results) == 1
    inner = ", ".join(str(result) for result in results)
    kind = results[0] if one else ir.Type.parse(f"!llvm.struct<({inner})>")
    together: dict[str, Any] = _CONVERGENT if effects else {}
    out = llvm.inline_asm(
        kind, list(args), text, constraints, has_side_effects=effects, asm_dialect=0, **together
    )
    if one:
        return [out]
    return [llvm.extractvalue(result, out, [i]) for i, result in enumerate(results)]
