"""Operations on single numbers, by the names of JAX's primitives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jax._src.lib.mlir.dialects import arith, math

from pallas_kernels.asm import Block, Register
from pallas_kernels.mosaic_gpu.ir import constant, element_type, is_float, width, written

__all__ = ["BINARY", "UNARY", "binary", "bitcast", "convert", "integer_pow"]

_LOG2_E = 1.4426950408889634


def _either(of_floats: Any, of_integers: Any) -> Callable[[Any, Any], Any]:
    return lambda a, b: (of_floats if is_float(a.type) else of_integers)(a, b)


def _compare(of_floats: Any, of_integers: Any) -> Callable[[Any, Any], Any]:
    return lambda a, b: (
        arith.cmpf(of_floats, a, b) if is_float(a.type) else arith.cmpi(of_integers, a, b)
    )


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of float32, which PTX has alone, for floats of 16 bits too."""

    def call(*args: Any) -> Any:
        kind, wide = args[0].type, element_type(np.float32)
        if kind == wide:
            return function(*args)
        return arith.truncf(kind, function(*(arith.extf(wide, x) for x in args)))

    return call


@_in_float32
def _divided(a: Any, b: Any) -> Any:
    # As Triton divides: within 2 units in the last place.
    text = Block()
    [out] = text.results("f32", early=False)
    [over, under] = text.operands(over="f32", under="f32")
    text.div_full(out, over, under)
    return written(text, [a, b], effects=False)[0]


_F, _I = arith.CmpFPredicate, arith.CmpIPredicate
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": _either(arith.addf, arith.addi),
    "sub": _either(arith.subf, arith.subi),
    "mul": _either(arith.mulf, arith.muli),
    "div": _either(_divided, arith.divsi),
    "rem": _either(arith.remf, arith.remsi),
    "and": arith.andi,
    "or": arith.ori,
    "xor": arith.xori,
    "max": _either(arith.maximumf, arith.maxsi),
    "min": _either(arith.minimumf, arith.minsi),
    "shift_left": arith.shli,
    "shift_right_logical": arith.shrui,
    "shift_right_arithmetic": arith.shrsi,
    "eq": _compare(_F.OEQ, _I.eq),
    "ne": _compare(_F.UNE, _I.ne),
    "lt": _compare(_F.OLT, _I.slt),
    "le": _compare(_F.OLE, _I.sle),
    "gt": _compare(_F.OGT, _I.sgt),
    "ge": _compare(_F.OGE, _I.sge),
}
# What is otherwise where no number is negative.
_UNSIGNED: dict[str, Callable[[Any, Any], Any]] = {
    "div": arith.divui,
    "rem": arith.remui,
    "max": arith.maxui,
    "min": arith.minui,
    "lt": _compare(None, _I.ult),
    "le": _compare(None, _I.ule),
    "gt": _compare(None, _I.ugt),
    "ge": _compare(None, _I.uge),
}


def _is_unsigned(dtype: Any) -> bool:
    return np.dtype(dtype).name.startswith(("u", "bool"))


def binary(name: str, dtype: Any) -> Callable[[Any, Any], Any]:
    """What is done to two numbers of a dtype."""
    return (_UNSIGNED if _is_unsigned(dtype) and name in _UNSIGNED else BINARY)[name]


def _approximate(instruction: Callable[[Block, Register, Register], None]) -> Callable[[Any], Any]:
    """What is done to a number by an instruction of `Block`."""

    @_in_float32
    def call(a: Any) -> Any:
        b = Block()
        [out] = b.results("f32", early=False)
        [number] = b.operands(number="f32")
        instruction(b, out, number)
        return written(b, [a], effects=False)[0]

    return call


_exp2 = _approximate(Block.ex2)


@_in_float32
def _exp(a: Any) -> Any:
    return _scaled_exp2(a, _LOG2_E)


def _scaled_exp2(a: Any, by: float) -> Any:
    return _exp2(arith.mulf(a, constant(a.type, by)))


@_in_float32
def _logistic(a: Any) -> Any:
    one = constant(a.type, 1)
    return _divided(one, arith.addf(one, _scaled_exp2(a, -_LOG2_E)))


UNARY: dict[str, Callable[[Any], Any]] = {
    "abs": lambda a: math.absf(a) if is_float(a.type) else math.absi(a),
    "neg": lambda a: arith.negf(a) if is_float(a.type) else arith.subi(constant(a.type, 0), a),
    "not": lambda a: arith.xori(a, constant(a.type, -1 if width(a.type) > 1 else 1)),
    "exp": _exp,
    "exp2": _exp2,
    "rsqrt": _approximate(Block.rsqrt),
    "sqrt": _approximate(Block.sqrt),
    "cos": math.cos,
    "sin": math.sin,
    "tanh": math.tanh,
    "logistic": _logistic,
}


def integer_pow(a: Any, power: int) -> Any:
    """A power from 1 on."""
    out = a
    for _ in range(power - 1):
        out = BINARY["mul"](out, a)
    return out


def bitcast(a: Any, dtype: Any) -> Any:
    """The same bits as a number of another dtype."""
    to = element_type(dtype)
    return a if a.type == to else arith.bitcast(to, a)


def convert(a: Any, from_dtype: Any, to_dtype: Any) -> Any:
    """A number in another dtype, rounded to nearest; floats to integers towards 0."""
    source, target = np.dtype(from_dtype).name, np.dtype(to_dtype).name
    to, signed = element_type(to_dtype), not _is_unsigned(from_dtype)
    if source == target:
        return a
    if is_float(a.type) and is_float(to):
        if width(to) == width(a.type):  # the two of 16 bits
            return arith.truncf(to, arith.extf(element_type(np.float32), a))
        return (arith.extf if width(to) > width(a.type) else arith.truncf)(to, a)
    if is_float(a.type):
        if target == "bool":
            return arith.cmpf(_F.UNE, a, constant(a.type, 0))
        return (arith.fptoui if _is_unsigned(to_dtype) else arith.fptosi)(to, a)
    if is_float(to):
        return (arith.sitofp if signed else arith.uitofp)(to, a)
    if target == "bool":
        return arith.cmpi(_I.ne, a, constant(a.type, 0))
    if width(to) > width(a.type):
        return (arith.extsi if signed else arith.extui)(to, a)
    return a if width(to) == width(a.type) else arith.trunci(to, a)
