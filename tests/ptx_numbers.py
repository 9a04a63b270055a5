"""PTX instructions that compute, move, convert and compare."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ptx_table import DTYPES, Threads, instruction
from ptx_text import SIZES, PtxError


def _flushed(t: Threads, values: np.ndarray) -> np.ndarray:
    """Zeros in place of denormals, if the instruction says so."""
    if not t.has("ftz") or values.dtype.kind != "f":
        return values
    tiny = np.abs(values) < np.finfo(values.dtype).tiny
    return np.where(tiny, np.copysign(values.dtype.type(0), values), values)


def _compute(*names: str, also: str = "", only: str = "busf") -> Callable[..., None]:
    """Enters a function of all operands but the first, which it is put into."""

    def enter(function: Callable[..., np.ndarray]) -> None:
        def run(t: Threads) -> None:
            if t.kind != "pred" and t.kind[0] not in only:
                raise PtxError(f"There is none of .{t.kind}.")
            values = [_flushed(t, t[i]) for i in range(1, len(t.operands))]
            t[0] = _flushed(t, function(*values).astype(DTYPES[t.kind], copy=False))

        instruction(*names, also=also)(run)

    return enter


def _divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero."""
    if a.dtype.kind == "f":
        return a / b
    if (b == 0).any():
        raise PtxError("A whole number is divided by 0.")
    quotient = np.abs(a.astype(object)) // np.abs(b.astype(object))
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


_compute("add", also="rn ftz", only="usf")(np.add)
_compute("sub", also="rn ftz", only="usf")(np.subtract)
_compute("neg", also="ftz", only="sf")(np.negative)
_compute("abs", also="ftz", only="sf")(np.abs)
_compute("and", only="b")(np.bitwise_and)
_compute("or", only="b")(np.bitwise_or)
_compute("xor", only="b")(np.bitwise_xor)
_compute("not", only="b")(np.invert)
_compute("div", also="rn full approx ftz", only="usf")(_divided)
_compute("rem", only="us")(lambda a, b: a - b * _divided(a, b))
_compute("ex2", also="approx ftz", only="f")(lambda x: np.exp2(x.astype(np.float64)))
_compute("lg2", also="approx ftz", only="f")(lambda x: np.log2(x.astype(np.float64)))
_compute("rcp", also="approx rn ftz", only="f")(lambda x: 1 / x)
_compute("rsqrt", also="approx ftz", only="f")(lambda x: 1 / np.sqrt(x.astype(np.float64)))
_compute("sqrt", also="approx rn ftz", only="f")(np.sqrt)


# The product of two float32 is exact in float64; a sum rounded twice is almost never another.
@_compute("fma", also="rn ftz", only="f")
def _(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) * b + c


def _extreme(name: str, quiet: Callable[..., np.ndarray], loud: Callable[..., np.ndarray]) -> None:
    """Enters min or max: of a number and a NaN the number, and with .NaN the NaN."""

    @instruction(name, also="ftz NaN")
    def _(t: Threads) -> None:
        if t.kind == "f16x2":  # each half by itself
            halves = (np.ascontiguousarray(t[i])[:, None].view(np.float16) for i in (1, 2))
            made = (loud if t.has("NaN") else quiet)(*halves)
            made = np.where(np.isnan(made), np.uint16(0x7FFF).view(np.float16), made)
            t[0] = made.astype(np.float16).view(np.uint32)[:, 0]
            return
        if t.kind[0] not in "usf" or (t.has("NaN") and t.kind[0] != "f"):
            raise PtxError(f"There is none of {'.NaN' * t.has('NaN')}.{t.kind}.")
        made = (loud if t.has("NaN") else quiet)(_flushed(t, t[1]), _flushed(t, t[2]))
        if t.kind == "f32":  # a NaN that comes out is the canonical one
            made = np.where(np.isnan(made), np.uint32(0x7FFFFFFF).view(np.float32), made)
        t[0] = made


_extreme("min", np.fmin, np.minimum)
_extreme("max", np.fmax, np.maximum)


def _product(t: Threads) -> tuple[np.ndarray, str]:
    """Of the second and third operand, and its type: the same one's half, or the double."""
    if t.kind[0] not in "us":
        raise PtxError(f"There is none of .{t.kind}.")
    if t.has("lo"):
        return t[1] * t[2], t.kind
    bits = 8 * SIZES[t.kind]
    if bits > 32 or not t.has("wide", "hi"):
        raise PtxError("Of which half of the product?")
    wide = f"{t.kind[0]}{2 * bits}"
    product = t[1].astype(DTYPES[wide]) * t[2].astype(DTYPES[wide])
    return (product, wide) if t.has("wide") else ((product >> bits).astype(DTYPES[t.kind]), t.kind)


@instruction("mul", also="lo hi wide rn ftz")
def _(t: Threads) -> None:
    if t.kind[0] == "f":
        t[0] = _flushed(t, _flushed(t, t[1]) * _flushed(t, t[2]))
    else:
        product, kind = _product(t)
        t.put(t.operands[0], kind, product)


@instruction("mad", also="lo hi wide")
def _(t: Threads) -> None:
    product, kind = _product(t)
    t.put(t.operands[0], kind, product + t.get(t.operands[3], kind))


@instruction("shl", "shr")
def _(t: Threads) -> None:
    bits = 8 * SIZES[t.kind]
    amount = t.get(t.operands[2], "u32")
    most, values = np.minimum(amount, bits - 1).astype(DTYPES[t.kind]), t[1]
    if t.instruction.name == "shl":
        if t.kind[0] != "b":
            raise PtxError("shl is of bits.")
        t[0] = np.where(amount < bits, values << most, 0).astype(values.dtype)
    else:
        beyond = values >> most if t.kind[0] == "s" else np.zeros_like(values)
        t[0] = np.where(amount < bits, values >> most, beyond)


@instruction("shf", also="l r wrap")
def _(t: Threads) -> None:
    if t.kind != "b32" or not t.has("wrap"):
        raise PtxError("The machine shifts 32 bits of two words, by the amount modulo 32.")
    both = t[1].astype(np.uint64) | t[2].astype(np.uint64) << np.uint64(32)
    amount = (t.get(t.operands[3], "u32") & 31).astype(np.uint64)
    moved = both << amount >> np.uint64(32) if t.has("l") else both >> amount
    t[0] = moved.astype(np.uint32)


@instruction("lop3")
def _(t: Threads) -> None:
    a, b, c = t[1], t[2], t[3]
    table, result = int(t[4][0]), np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    t[0] = result


@instruction("prmt")
def _(t: Threads) -> None:
    both = np.stack([t[1], t[2]], axis=1).view(np.uint8)  # [n, 8]
    nibble = t[3][:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15
    picked = np.take_along_axis(both, (nibble & 7).astype(np.int64), axis=1)
    signs = np.where(picked & 0x80, 0xFF, 0).astype(np.uint8)
    t[0] = np.where(nibble & 8, signs, picked).view(np.uint32)[:, 0]


@instruction("dp4a")
def _(t: Threads) -> None:
    _, first, second = (
        t.instruction.modifiers
        if len(t.instruction.modifiers) == 3
        else (
            "",
            *[m for m in t.instruction.modifiers if m in ("s32", "u32")],
        )
    )
    bytes_of = {"s32": np.int8, "u32": np.uint8}
    a, b = (
        np.ascontiguousarray(t.get(t.operands[i], kind))[:, None].view(bytes_of[kind])
        for i, kind in ((1, first), (2, second))
    )
    total = t.get(t.operands[3], "s32") + (a.astype(np.int64) * b).sum(axis=1)
    t.put(t.operands[0], "s32", total.astype(np.int32))


# Moves, conversions, comparisons


@instruction("mov")
def _(t: Threads) -> None:
    to, source = t.parts(0), t.parts(1)
    if len(to) == len(source) == 1:
        t[0] = t[1]
        return
    size = SIZES[t.kind] // max(len(to), len(source))
    bits = [t.get(x, t.kind if len(source) == 1 else f"b{8 * size}") for x in source]
    packed = np.stack(bits, axis=1)
    if len(to) == 1:
        t[0] = packed.view(DTYPES[t.kind])[:, 0]
        return
    for operand, column in zip(to, packed.view(f"u{size}").T, strict=True):
        t.put(operand, f"b{8 * size}", column)


@instruction("selp")
def _(t: Threads) -> None:
    t[0] = np.where(t.get(t.operands[3], "pred"), t[1], t[2])


def _to_bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, ties to even: its 16 bits, uint16."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


_NARROW = {
    "bf16": _to_bf16,
    "f16": lambda x: x.astype(np.float16).view(np.uint16),
}
WIDEN = {
    "bf16": _from_bf16,
    "f16": lambda bits: bits.view(np.float16).astype(np.float32),
}
_ROUND = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt", also="rn rzi rni rmi rpi ftz sat")
def _(t: Threads) -> None:
    to, source = [m for m in t.instruction.modifiers if m in SIZES]
    values = [_flushed(t, t.get(x, source)) for x in t.operands[1:]]
    if source in WIDEN:
        values = [WIDEN[source](x) for x in values]
        source = "f32"
    if to.endswith("x2"):  # the upper half comes first
        high, low = (_NARROW[to[:-2]](x).astype(np.uint32) for x in values)
        made = high << 16 | low
    elif to in _NARROW:
        made = _NARROW[to](*values)
    elif source[0] == "f" and to[0] in "us":
        rounding = [m for m in t.instruction.modifiers if m in _ROUND]
        if not rounding:
            raise PtxError("How is it rounded to a whole number?")
        limits = np.iinfo(DTYPES[to])
        exact = np.nan_to_num(_ROUND[rounding[0]](values[0].astype(np.float64)), nan=0.0)
        made = np.array([int(x) for x in np.clip(exact, limits.min, limits.max)]).astype(DTYPES[to])
    else:
        if to[0] == "f" and source[0] in "us" and not t.has("rn"):
            raise PtxError("How is it rounded to a float?")
        made = values[0].astype(DTYPES[to])
    t.put(t.operands[0], to, _flushed(t, made))


_COMPARE: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_UNORDERED = {f"{name}u": name for name in _COMPARE}
_COMPARISONS = [*_COMPARE, *_UNSIGNED_NAMES, *_UNORDERED, "num", "nan"]


@instruction("setp", also=" ".join([*_COMPARISONS, "and or xor ftz"]))
def _(t: Threads) -> None:
    name, kind = t.instruction.modifiers[0], t.kind
    a, b = _flushed(t, t[1]), _flushed(t, t[2])
    if kind[0] == "b" and name not in ("eq", "ne"):
        raise PtxError("Bits are equal or not, nothing else.")
    if name in _UNSIGNED_NAMES and kind[0] != "u":
        raise PtxError(f"{name} is of unsigned numbers.")
    if kind[0] != "f" and (name in _UNORDERED or name in ("num", "nan")):
        raise PtxError(f"{name} is of floats.")
    unordered = np.isnan(a) | np.isnan(b) if kind[0] == "f" else np.zeros(len(a), bool)
    if name in ("num", "nan"):
        result = unordered == (name == "nan")
    elif name in _UNORDERED:
        result = _COMPARE[_UNORDERED[name]](a, b) | unordered
    else:
        result = _COMPARE[_UNSIGNED_NAMES.get(name, name)](a, b) & ~unordered
    both = [result, ~result]
    joins = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    joined = [m for m in t.instruction.modifiers if m in joins]
    if len(t.operands) != 3 + len(joined):
        raise PtxError("A third predicate is joined by and, or, xor, and no other is there.")
    for join in joined:
        both = [joins[join](x, t.get(t.operands[3], "pred")) for x in both]
    for operand, value in zip(t.parts(0), both, strict=False):
        t.put(operand, "pred", value)
