"""Lowers the kernel's traced body, operation by operation, to what each thread does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from jax import tree_util
from jax._src import core
from jax._src.lib.mlir.dialects import arith, gpu, scf

from pallas_kernels.inline_ptx import lowered
from pallas_kernels.inline_ptx.anew import ANEW
from pallas_kernels.mosaic_gpu import arithmetic
from pallas_kernels.mosaic_gpu.ir import constant, element_type, i32
from pallas_kernels.mosaic_gpu.layout import Layout, bits_of_axes
from pallas_kernels.mosaic_gpu.memory import Memory
from pallas_kernels.mosaic_gpu.threads import Threads
from pallas_kernels.mosaic_gpu.values import Lazy, Pointer, Registers, Value, uniform

__all__ = ["Body"]

_Numbers = Registers | Lazy
_CALLS = {"jit", "pjit", "closed_call", "core_call"}
_REDUCTIONS = {
    "reduce_sum": "add",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_or": "or",
    "reduce_and": "and",
}
# A program of one device has nothing to shard.
_SAME_ORDER = {"reshape", "squeeze", "expand_dims", "reshard", "sharding_constraint"}


class Body:
    """The body of a kernel, while it is lowered."""

    def __init__(self, threads: Threads):
        """Takes the program's threads."""
        self._threads = threads
        self._memory = Memory(threads, self._spread)

    def run(self, jaxpr: Any, args: Sequence[Value]) -> list[Any]:
        """Lowers a jaxpr without constants.

        Args:
            jaxpr: of the body, or of a part of it.
            args: what stands for its arguments.

        Returns:
            What stands for its results.

        Raises:
            NotImplementedError: there is an operation that is not lowered so far.
        """
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        known: dict[Any, Value] = dict(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Value:
            if not isinstance(atom, core.Literal):
                return known[atom]
            aval: Any = atom.aval
            kind = element_type(aval.dtype)
            return uniform(aval.shape, constant(kind, np.asarray(atom.val).item()))

        for eqn in jaxpr.eqns:
            outs = self._lower(eqn, [read(x) for x in eqn.invars])
            known.update(zip(eqn.outvars, outs, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def _lower(self, eqn: Any, ins: list[Any]) -> list[Any]:
        name, avals = eqn.primitive.name, [x.aval for x in eqn.outvars]
        if name == ANEW and isinstance(ins[0], Lazy):
            return [ins[0].anew(self._threads.number_anew)]
        if eqn.primitive in lowered.RULES:
            return self._by_rule(eqn, ins)
        if name in _CALLS:
            inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
            return self.run(inner, ins)
        if name == "cond":
            return self._cond(eqn, *ins)
        if name == "while":
            return self._while(eqn, ins)
        if name in ("get", "masked_load"):
            return [self._load(eqn, ins)]
        if name in ("swap", "masked_swap"):
            return [self._swap(eqn, ins)]
        if name == "program_id":
            number = arith.index_cast(i32(), gpu.block_id(gpu.Dimension.x))
            return [Registers((), Layout(()), [number])]
        [aval] = avals
        if name in _SAME_ORDER:
            return [_with_shape(ins[0], aval.shape)]
        if name in ("broadcast_in_dim", "broadcast_to"):
            axes = eqn.params.get("broadcast_dimensions")
            return [self._broadcast(ins[0], aval.shape, axes)]
        if name == "iota":
            return [self._iota(aval.shape, eqn.params["dimension"])]
        if name in _REDUCTIONS:
            combine = arithmetic.binary(_REDUCTIONS[name], aval.dtype)
            return [self._threads.reduced(ins[0], eqn.params["axes"], combine)]
        operation = self._operation(eqn)
        return [self._each(operation, [self._spread(x, aval.shape) for x in ins], aval.shape)]

    def _operation(self, eqn: Any) -> Callable[..., Any]:
        """What is done to each element."""
        name, params = eqn.primitive.name, eqn.params
        if name in arithmetic.BINARY:
            return arithmetic.binary(name, eqn.invars[0].aval.dtype)
        if name in arithmetic.UNARY:
            return arithmetic.UNARY[name]
        if name == "integer_pow" and params["y"] >= 1:
            return lambda a: arithmetic.integer_pow(a, params["y"])
        if name == "convert_element_type":
            dtypes = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
            return lambda a: arithmetic.convert(a, *dtypes)
        if name == "bitcast_convert_type":
            return lambda a: arithmetic.bitcast(a, eqn.outvars[0].aval.dtype)
        if name == "select_n" and len(eqn.invars) == 3:
            return lambda which, no, yes: arith.select(which, yes, no)
        if name == "clamp":
            bound = [arithmetic.binary(x, eqn.invars[1].aval.dtype) for x in ("max", "min")]
            return lambda low, x, high: bound[1](bound[0](low, x), high)
        raise NotImplementedError(
            f"The kernel's operation {name} is not lowered for Mosaic GPU; use the Triton backend."
        )

    # Arrays

    def _each(
        self, operation: Callable[..., Any], ins: list[_Numbers], shape: tuple[int, ...]
    ) -> _Numbers:
        held = [x for x in ins if isinstance(x, Registers)]
        if math.prod(shape) > 1:
            held = [x for x in held if x.size > 1]
        if not held:
            return Lazy(shape, lambda layout: self._applied(operation, ins, layout))
        layout = self._threads.plain(shape)
        if all(x.layout != layout for x in held):
            layout = held[0].layout
        return Registers(shape, layout, self._applied(operation, ins, layout))

    def _applied(
        self, operation: Callable[..., Any], ins: list[_Numbers], layout: Layout
    ) -> list[Any]:
        rows = zip(*(self._threads.at(x, layout) for x in ins), strict=True)
        return [operation(*row) for row in rows]

    def _iota(self, shape: tuple[int, ...], axis: int) -> Lazy:
        bits = bits_of_axes(shape)[axis]

        def make(layout: Layout) -> list[Any]:
            own, which = layout.restricted(bits)
            numbers = [self._threads.element(own, k) for k in range(own.registers)]
            return [numbers[k] for k in which]

        return Lazy(shape, make)

    def _broadcast(
        self, x: _Numbers, shape: tuple[int, ...], axes: Sequence[int] | None = None
    ) -> _Numbers:
        """An array along new or longer axes repeated.

        Args:
            x: the array.
            shape: of the result.
            axes: that of the result which each axis of `x` becomes; None: the last ones.
        """
        if x.size == 1:
            return uniform(shape, self._threads.at(x, Layout(()))[0])
        if axes is None:
            axes = range(len(shape) - len(x.shape), len(shape))
        of_result = bits_of_axes(shape)
        bits = [
            bit
            for axis, size in reversed([*zip(axes, x.shape, strict=True)])
            if size > 1
            for bit in of_result[axis]
        ]

        def make(layout: Layout) -> list[Any]:
            own, which = layout.restricted(bits)
            regs = self._threads.at(x, own)
            return [regs[k] for k in which]

        return Lazy(shape, make)

    def _spread(self, x: _Numbers, shape: tuple[int, ...]) -> _Numbers:
        if x.shape == tuple(shape):
            return x
        if x.size == math.prod(shape):  # axes of 1 apart
            return _with_shape(x, shape)
        return self._broadcast(x, tuple(shape))

    # Device memory

    def _load(self, eqn: Any, ins: list[Any]) -> Registers:
        ref, indices, mask, other = _taken_apart(eqn, ins, with_value=False)
        [aval] = [x.aval for x in eqn.outvars]
        sizes = eqn.invars[0].aval.shape
        if other is not None:
            others = eqn.params["args_tree"].unflatten([x.aval for x in eqn.invars])[3]
            other = self._each(
                lambda a: arithmetic.convert(a, others.dtype, aval.dtype), [other], other.shape
            )
        return self._memory.load(ref, sizes, indices, aval.shape, aval.dtype, mask, other)

    def _swap(self, eqn: Any, ins: list[Any]) -> None:
        ref, indices, mask, value = _taken_apart(eqn, ins, with_value=True)
        [aval] = [x.aval for x in eqn.outvars]
        self._memory.store(ref, eqn.invars[0].aval.shape, indices, aval.shape, value, mask)
        return None  # what was there before: no kernel asks for it

    # Control flow: all threads of a program go the same way

    def _by_rule(self, eqn: Any, ins: list[Any]) -> list[Any]:
        context = SimpleNamespace(
            avals_in=[x.aval for x in eqn.invars], avals_out=[x.aval for x in eqn.outvars]
        )
        layout = self._layout_of(ins) if eqn.primitive in lowered.ANYWHERE else None
        args = [x if isinstance(x, Pointer) else self._held(x, layout) for x in ins]
        outs = lowered.RULES[eqn.primitive](context, *args, **eqn.params)
        return list(outs) if isinstance(outs, list | tuple) else [outs]

    def _layout_of(self, ins: Sequence[Value]) -> Layout | None:
        """The first one of those that arrays have, where threads hold as many registers by it."""
        for x in ins:
            if isinstance(x, Registers) and x.size > 1:
                return x.layout if self._is_as_large(x) else None
        return None

    def _is_as_large(self, x: Registers) -> bool:
        return x.layout.registers == self._threads.plain(x.shape).registers

    def _held(self, x: _Numbers, layout: Layout | None = None) -> Registers:
        """An array in a layout; None: in the plain one."""
        layout = layout or self._threads.plain(x.shape)
        return Registers(x.shape, layout, self._threads.at(x, layout))

    def _flat(
        self, values: Sequence[Value], layouts: Sequence[Layout | None] | None = None
    ) -> list[Any]:
        arrays = [x for x in values if not isinstance(x, Pointer)]
        wanted = layouts or [None] * len(arrays)
        return [v for x, at in zip(arrays, wanted, strict=True) for v in self._held(x, at).regs]

    def _unflat(
        self,
        flat: Sequence[Any],
        shapes: Sequence[tuple[int, ...]],
        layouts: Sequence[Layout | None] | None = None,
    ) -> list[Registers]:
        out, rest = [], list(flat)
        for shape, given in zip(shapes, layouts or [None] * len(shapes), strict=True):
            layout = given or self._threads.plain(shape)
            out.append(Registers(shape, layout, rest[: layout.registers]))
            rest = rest[layout.registers :]
        return out

    def _cond(self, eqn: Any, index: _Numbers, *operands: Value) -> list[Any]:
        branches = eqn.params["branches"]
        avals = [x.aval for x in eqn.outvars]
        shapes = [aval.shape for aval in avals]
        types = [
            element_type(aval.dtype)
            for aval in avals
            for _ in range(self._threads.plain(aval.shape).registers)
        ]
        [number] = self._threads.at(index, Layout(()))
        if number.type.width == 1:
            number = arith.extui(i32(), number)

        # Where the first branch leaves its results, the others bring theirs.
        layouts: list[Layout | None] = []

        def run(branch: int) -> list[Any]:
            results = self.run(branches[branch], operands)
            if not layouts:
                layouts.extend(
                    x.layout if isinstance(x, Registers) and self._is_as_large(x) else None
                    for x in results
                )
            return self._flat(results, layouts)

        def choose(first: int) -> list[Any]:
            if first == len(branches) - 1:
                return run(first)
            # An index beyond the branches is the nearest one's.
            kind = arith.CmpIPredicate.sle if first == 0 else arith.CmpIPredicate.eq
            test = arith.cmpi(kind, number, constant(number.type, first))
            op: Any = scf.IfOp(test, types, has_else=True)

            def one() -> None:
                scf.yield_(run(first))

            def another() -> None:
                scf.yield_(choose(first + 1))

            self._threads.within(op.then_block, one)
            self._threads.within(op.else_block, another)
            return list(op.results)

        return self._unflat(choose(0), shapes, layouts)

    def _while(self, eqn: Any, ins: list[Any]) -> list[Any]:
        params = eqn.params
        of_test, of_body = params["cond_nconsts"], params["body_nconsts"]
        test_consts, body_consts = ins[:of_test], ins[of_test : of_test + of_body]
        first = ins[of_test + of_body :]
        shapes = [x.shape for x in first]
        flat = self._flat(first)
        types = [x.type for x in flat]
        op: Any = scf.WhileOp(types, flat)
        before, after = op.before.blocks.append(*types), op.after.blocks.append(*types)

        def test() -> None:
            carried = self._unflat(list(before.arguments), shapes)
            [go_on] = self.run(params["cond_jaxpr"], [*test_consts, *carried])
            scf.condition(self._threads.at(go_on, Layout(()))[0], list(before.arguments))

        def body() -> None:
            carried = self._unflat(list(after.arguments), shapes)
            scf.yield_(self._flat(self.run(params["body_jaxpr"], [*body_consts, *carried])))

        self._threads.within(before, test, again=True)
        self._threads.within(after, body, again=True)
        return self._unflat(list(op.results), shapes)


def _with_shape(x: _Numbers, shape: Sequence[int]) -> _Numbers:
    """The same elements in the same order."""
    if isinstance(x, Registers):
        return Registers(tuple(shape), x.layout, x.regs)
    return x.reshaped(tuple(shape))


def _taken_apart(eqn: Any, ins: list[Any], *, with_value: bool) -> tuple[Any, Any, Any, Any]:
    """Of a load or store: the array, an index for each axis, the mask, and the value or `other`."""
    if "args_tree" in eqn.params:
        ref, transforms, third, fourth = eqn.params["args_tree"].unflatten(ins)
        value, mask = (third, fourth) if with_value else (fourth, third)
    else:
        ref, *rest = ins
        value = rest.pop(0) if with_value else None
        transforms, mask = tree_util.tree_unflatten(eqn.params["tree"], rest), None
    [indexer] = transforms
    for index in indexer.indices:
        if not isinstance(index, int | Registers | Lazy | np.integer):
            raise NotImplementedError(f"The index {index} of an array is not lowered.")
    indices = [int(x) if isinstance(x, np.integer) else x for x in indexer.indices]
    return ref, indices, mask, value
