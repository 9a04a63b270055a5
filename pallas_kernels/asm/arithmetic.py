"""Instructions that move, compute, convert and compare.

The destination comes first, as in PTX, and its type is the instruction's, unless said otherwise.
Bits are compared and moved as they are, whatever the type of their register.
"""

from __future__ import annotations

from typing import Literal

from pallas_kernels.asm.registers import AsmError, Register, Special, Value, immediate
from pallas_kernels.asm.writer import Writer

__all__ = ["Arithmetic", "Relation"]

Relation = Literal["eq", "ne", "lt", "le", "gt", "ge"]
_DOUBLE = {"u32": "u64", "s32": "s64", "u16": "u32"}


class Arithmetic(Writer):
    """What a thread does with its own registers."""

    # Moves

    def mov(self, to: Register, value: Value) -> None:
        """`mov`: sets a register to a value, or to bits of any type of its size."""
        if isinstance(value, Special):
            self.emit("mov.u32", self.read(to, "u32"), value.name)
            return
        kind = "pred" if to.kind == "pred" else to.bits
        if isinstance(value, Register):
            self.emit(f"mov.{kind}", self.read(to, kind), self.read(value, kind))
        else:
            self.emit(f"mov.{kind}", to.name, immediate(value, to.kind))

    def pack(self, to: Register, low: Value, high: Value) -> None:
        """`mov.b64 d, {a, b}`: two halves as one number, the lower one first."""
        half = f"b{4 * to.bytes}"
        self.emit(f"mov.{to.bits}", to.name, f"{{{self.read(low, half)}, {self.read(high, half)}}}")

    def unpack(self, low: Register | None, high: Register | None, value: Value) -> None:
        """`mov.b64 {a, b}, d`: a number's halves; None: that one is of no use."""
        made = low or high
        assert made is not None, "One of the halves is wanted."
        bits, half = f"b{16 * made.bytes}", made.bits
        names = (self.read(x, half) if x else "_" for x in (low, high))
        self.emit(f"mov.{bits}", f"{{{', '.join(names)}}}", self.read(value, bits))

    def selp(self, to: Register, yes: Value, no: Value, chosen: Register) -> None:
        """`selp`: one of two values, the first where a predicate holds."""
        kind = to.kind if to.kind == "f32" else to.bits
        values = self.read(yes, kind), self.read(no, kind)
        self.emit(f"selp.{kind}", to.name, *values, self.read(chosen, "pred"))

    # Whole numbers and floats

    def _same(self, name: str, to: Register, *values: Value) -> None:
        self.emit(f"{name}.{to.kind}", to.name, *(self.read(x, to.kind) for x in values))

    def add(self, to: Register, a: Value, b: Value) -> None:
        """`add`: a + b; of floats it may be fused with a product before."""
        self._same("add", to, a, b)

    def add_rn(self, to: Register, a: Value, b: Value) -> None:
        """`add.rn`: a + b of floats, rounded to nearest by itself."""
        self._same("add.rn", to, a, b)

    def sub(self, to: Register, a: Value, b: Value) -> None:
        """`sub`: a - b."""
        self._same("sub", to, a, b)

    def sub_rn(self, to: Register, a: Value, b: Value) -> None:
        """`sub.rn`: a - b of floats, rounded to nearest by itself."""
        self._same("sub.rn", to, a, b)

    def mul(self, to: Register, a: Value, b: Value) -> None:
        """`mul.f32`: a * b of floats; it may be fused with a sum after."""
        self._floats("mul", to, a, b)

    def mul_rn(self, to: Register, a: Value, b: Value) -> None:
        """`mul.rn.f32`: a * b of floats, rounded to nearest by itself."""
        self._floats("mul.rn", to, a, b)

    def fma(self, to: Register, a: Value, b: Value, c: Value) -> None:
        """`fma.rn.f32`: a * b + c, rounded once."""
        self._floats("fma.rn", to, a, b, c)

    def mul_lo(self, to: Register, a: Value, b: Value) -> None:
        """`mul.lo`: the lower half of a * b, whole numbers."""
        self._same("mul.lo", to, a, b)

    def mul_wide(self, to: Register, a: Register, b: Value) -> None:
        """`mul.wide`: all of a * b, whole numbers of half the size, of a's type."""
        self._wide("mul.wide", to, a, b)

    def mad_lo(self, to: Register, a: Value, b: Value, c: Value) -> None:
        """`mad.lo`: the lower half of a * b, plus c, whole numbers."""
        self._same("mad.lo", to, a, b, c)

    def mad_wide(self, to: Register, a: Register, b: Value, c: Value) -> None:
        """`mad.wide`: all of a * b, plus c: a and b of half the size, of a's type."""
        self._wide("mad.wide", to, a, b, self.read(c, to.kind))

    def _wide(self, name: str, to: Register, a: Register, b: Value, *more: str) -> None:
        if to.bytes != 2 * a.bytes:
            raise AsmError(f"{name} makes a number twice as long as {a}, not {to}.")
        self.emit(f"{name}.{a.kind}", to.name, self.read(a, a.kind), self.read(b, a.kind), *more)

    def div(self, to: Register, a: Value, b: Value) -> None:
        """`div`: a / b of whole numbers, towards zero."""
        self._same("div", to, a, b)

    def min(self, to: Register, a: Value, b: Value) -> None:
        """`min`: the smaller one; of a float and a NaN the float."""
        self._same("min", to, a, b)

    def max(self, to: Register, a: Value, b: Value) -> None:
        """`max`: the larger one; of a float and a NaN the float."""
        self._same("max", to, a, b)

    def max_nan(self, to: Register, a: Value, b: Value) -> None:
        """`max.NaN.f32`: the larger one, or NaN where one of them is."""
        self._floats("max.NaN", to, a, b)

    def max_nan_halves(self, to: Register, a: Value, b: Value) -> None:
        """`max.NaN.f16x2`: of two float16 a word, the larger ones, or NaN where one of them is."""
        words = (self.read(x, "b32") for x in (to, a, b))
        self.emit("max.NaN.f16x2", *words)

    def _floats(self, name: str, to: Register, *values: Value) -> None:
        self.emit(f"{name}.f32", *(self.read(x, "f32") for x in (to, *values)))

    def neg(self, to: Register, a: Value) -> None:
        """`neg.f32`: -a."""
        self._floats("neg", to, a)

    def abs(self, to: Register, a: Value) -> None:
        """`abs.f32`: the magnitude."""
        self._floats("abs", to, a)

    def ex2(self, to: Register, a: Value) -> None:
        """`ex2.approx.ftz.f32`: 2 to the power a, within 2^-22; denormals are 0."""
        self._floats("ex2.approx.ftz", to, a)

    def rsqrt(self, to: Register, a: Value) -> None:
        """`rsqrt.approx.ftz.f32`: 1 / the square root of a, within 2^-22.4; denormals are 0."""
        self._floats("rsqrt.approx.ftz", to, a)

    def sqrt(self, to: Register, a: Value) -> None:
        """`sqrt.approx.ftz.f32`: the square root of a, within 2^-23; denormals are 0."""
        self._floats("sqrt.approx.ftz", to, a)

    def rcp(self, to: Register, a: Value) -> None:
        """`rcp.approx.ftz.f32`: 1 / a, within an ulp; denormals are 0."""
        self._floats("rcp.approx.ftz", to, a)

    def div_full(self, to: Register, a: Value, b: Value) -> None:
        """`div.full.f32`: a / b, within 2 ulp, of all magnitudes."""
        self._floats("div.full", to, a, b)

    # Bits

    def _of_bits(self, name: str, to: Register, *values: Value) -> None:
        kind = "pred" if to.kind == "pred" else to.bits
        self.emit(f"{name}.{kind}", to.name, *(self.read(x, kind) for x in values))

    def and_(self, to: Register, a: Value, b: Value) -> None:
        """`and`: of bits, or of predicates."""
        self._of_bits("and", to, a, b)

    def or_(self, to: Register, a: Value, b: Value) -> None:
        """`or`: of bits, or of predicates."""
        self._of_bits("or", to, a, b)

    def xor(self, to: Register, a: Value, b: Value) -> None:
        """`xor`: of bits, or of predicates."""
        self._of_bits("xor", to, a, b)

    def not_(self, to: Register, a: Value) -> None:
        """`not`: every bit the other way."""
        self._of_bits("not", to, a)

    def shl(self, to: Register, a: Value, by: Value) -> None:
        """`shl`: bits moved up; 0 from the type's size on."""
        self.emit(f"shl.{to.bits}", to.name, self.read(a, to.bits), self.read(by, "u32"))

    def shr(self, to: Register, a: Value, by: Value) -> None:
        """`shr`: bits moved down; the sign comes after, if the destination's type has one."""
        self.emit(f"shr.{to.kind}", to.name, self.read(a, to.kind), self.read(by, "u32"))

    def shf_left(self, to: Register, low: Value, high: Value, by: Value) -> None:
        """`shf.l.wrap.b32`: the upper word of two, moved up; of one word twice, it is turned."""
        words = (self.read(x, "b32") for x in (to, low, high))
        self.emit("shf.l.wrap.b32", *words, self.read(by, "u32"))

    def lop3(self, to: Register, a: Value, b: Value, c: Value, table: int) -> None:
        """`lop3.b32`: each bit by a table of 8: entry 4a + 2b + c."""
        words = (self.read(x, "b32") for x in (to, a, b, c))
        self.emit("lop3.b32", *words, f"{table:#x}")

    def prmt(self, to: Register, a: Value, b: Value, order: int) -> None:
        """`prmt.b32`: four of the eight bytes of a and b: a hex digit each, the lowest last."""
        words = (self.read(x, "b32") for x in (to, a, b))
        self.emit("prmt.b32", *words, f"{order:#06x}")

    def dp4a(self, to: Register, a: Value, b: Value, c: Value) -> None:
        """`dp4a.s32.s32`: c plus the products of four pairs of bytes with signs."""
        self.emit("dp4a.s32.s32", *(self.read(x, "b32") for x in (to, a, b, c)))

    # Conversions

    def widen(self, to: Register, value: Register) -> None:
        """`cvt.u64.u32`: the same whole number in 64 bits, or with its sign."""
        if to.kind != _DOUBLE.get(value.kind):
            raise AsmError(f"{value} of type {value.kind} is not widened to {to.kind}.")
        self.emit(f"cvt.{to.kind}.{value.kind}", to.name, value.name)

    def narrow(self, to: Register, value: Register) -> None:
        """`cvt.u32.u64`: the lower bits."""
        if to.bytes >= value.bytes or "f" in to.kind + value.kind:
            raise AsmError(f"{value} of type {value.kind} is not narrowed to {to.kind}.")
        self.emit(f"cvt.{to.kind}.{value.kind}", to.name, value.name)

    def to_float(self, to: Register, value: Register) -> None:
        """`cvt.rn.f32.s32`: a whole number as a float32, rounded to nearest."""
        if to.kind != "f32" or value.kind not in ("u32", "s32", "u64", "s64"):
            raise AsmError(f"{value} of type {value.kind} is no whole number to convert.")
        self.emit(f"cvt.rn.f32.{value.kind}", to.name, value.name)

    def from_half(self, to: Register, value: Register) -> None:
        """`cvt.f32.f16`: a float16, held in 16 bits, as a float32."""
        self.emit("cvt.f32.f16", self.read(to, "f32"), self.read(value, "b16"))

    def to_bf16x2(self, to: Register, high: Value, low: Value) -> None:
        """`cvt.rn.bf16x2.f32`: two float32 as bfloat16 of one word, rounded to nearest."""
        floats = self.read(high, "f32"), self.read(low, "f32")
        self.emit("cvt.rn.bf16x2.f32", self.read(to, "b32"), *floats)

    # Comparisons

    def setp(
        self,
        relation: Relation,
        to: Register,
        a: Register,
        b: Value,
        *,
        also: Register | None = None,
        either: Register | None = None,
    ) -> None:
        """`setp`: whether a relation holds between a and b, of a's type.

        Args:
            relation: "eq", "ne", "lt", "le", "gt" or "ge".
            to: the predicate.
            a: a register.
            b: a register or a number.
            also: `setp.lt.and`: and this predicate holds.
            either: `setp.lt.or`: or this one does.
        """
        joined = "" if also is either else ".and" if also else ".or"
        values = self.read(to, "pred"), self.read(a, a.kind), self.read(b, a.kind)
        more = (self.read(x, "pred") for x in (also, either) if x)
        self.emit(f"setp.{relation}{joined}.{a.kind}", *values, *more)
