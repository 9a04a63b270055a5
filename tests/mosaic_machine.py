"""A machine that runs what the lowering for Mosaic GPU writes, on a CPU: one program, in numpy.

A value of MLIR is an array with a number for each thread. Inline PTX goes to the machine of
`ptx_machine`, text by text. Beyond running, it looks for what a GPU does not report: threads of a
program that go different ways, words of shared memory that one thread writes and another reads or
writes without a barrier between, or that nobody has written, addresses outside of the arrays,
and elements that are stored more than once.

    [out], _ = run(kernel, threads=128, arrays=[x], out_shapes=[spec])
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import func
from ptx_machine import Machine

from pallas_kernels.inline_ptx import lowered
from pallas_kernels.mosaic_gpu.backend import MosaicGpu
from pallas_kernels.mosaic_gpu.body import Body
from pallas_kernels.mosaic_gpu.ir import i32, integer
from pallas_kernels.mosaic_gpu.launch import SCRATCH_BYTES, _trace
from pallas_kernels.mosaic_gpu.threads import Threads
from pallas_kernels.mosaic_gpu.values import Pointer

__all__ = [
    "MosaicError",
    "MosaicMachine",
    "Text",
    "lowered_function",
    "lowered_kernel",
    "run",
    "run_lowered",
    "traced",
]

# Between two arrays, so that no small error leads from one to the next.
_GAP = 512
_NOBODY, _SEVERAL = -1, -2


class MosaicError(Exception):
    """What a program's threads must not do."""


@dataclasses.dataclass(frozen=True)
class Text:
    """Inline PTX that was run: its text, its constraints, and its operands, `[threads]` each."""

    text: str
    constraints: str
    operands: tuple[np.ndarray, ...]


class MosaicMachine(Machine):
    """A program's threads and memories.

    Attributes:
        arrays: addresses of the arrays.
        texts: inline PTX so far, if it is recorded.
        scratch: address of the lowering's own shared memory.
        ring: of the kernel's own.
        barriers: how often all threads have met at a barrier of the compiler's.
    """

    def __init__(
        self,
        threads: int,
        arrays: Sequence[np.ndarray],
        *,
        ring_bytes: int = 0,
        scratch_bytes: int = SCRATCH_BYTES,
        blocks: tuple[int, int] = (0, 1),
        record: bool = False,
    ):
        """Powers it on.

        Args:
            threads: T, whole warps.
            arrays: in device memory.
            ring_bytes: of shared memory, the kernel's own.
            scratch_bytes: the lowering's.
            blocks: this program's number, and how many there are.
            record: whether `texts` are kept.
        """
        starts, size = [], _GAP
        for array in arrays:
            starts.append(size)
            size += -(-array.nbytes // 256) * 256 + _GAP
        super().__init__(threads, scratch_bytes + ring_bytes, size, blocks=blocks)
        self.is_within_kernel = True
        self.scratch, self.ring = self.shared_base, self.shared_base + scratch_bytes
        self.arrays = [self.memory_base + start for start in starts]
        self._allowed = np.zeros(size, bool)
        for start, array in zip(starts, arrays, strict=True):
            self.memory[start : start + array.nbytes] = (
                np.ascontiguousarray(array).view(np.uint8).ravel()
            )
            self._allowed[start : start + array.nbytes] = True
        self.stored = np.zeros(size, np.int32)
        self.record, self.texts, self.barriers = record, [], 0
        # Of each word of the scratch: whether it was ever written, who wrote it and who has read
        # it since the last barrier.
        words = scratch_bytes // 4
        self._known = np.zeros(words, bool)
        self._writer = np.full(words, _NOBODY)
        self._reader = np.full(words, _NOBODY)

    def array(self, number: int, like: Any) -> np.ndarray:
        """An array as it is now."""
        count = int(np.prod(like.shape, dtype=np.int64))
        found = self.view(self.arrays[number], count, like.dtype).reshape(like.shape).copy()
        if like.dtype == bool:
            bits = self.view(self.arrays[number], count, np.uint8)
            if (bits[self.is_stored(number, bits)] > 1).any():
                raise MosaicError("A bit is stored as another byte than 0 or 1.")
        return found

    def is_stored(self, number: int, like: np.ndarray) -> np.ndarray:
        """Which elements of an array the program has stored."""
        first, size = self.arrays[number] - self.memory_base, like.dtype.itemsize
        return (self.stored[first : first + like.nbytes : size] > 0).reshape(like.shape)

    def all_meet(self) -> None:
        """A barrier of the compiler's."""
        self.barriers += 1
        self._writer[:] = self._reader[:] = _NOBODY
        self.races.meet(np.arange(self.threads // 32))

    def load(
        self,
        name: str,
        at: np.ndarray,
        size: int,
        threads: np.ndarray,
        *,
        poisoned: bool = False,
    ) -> np.ndarray:
        """See `Machine`."""
        found = super().load(name, at, size, threads, poisoned=poisoned)
        if name == "global":
            self._must_be_in_arrays(at, size)
        elif (words := self._words(at, size, threads)) is not None:
            place, who = words
            if not self._known[place].all():
                raise MosaicError("Shared memory is read that nobody has written.")
            writer = self._writer[place]
            if ((writer != _NOBODY) & (writer != who)).any():
                raise MosaicError("A thread reads what another has written: no barrier is between.")
            known = self._reader[place]
            new = np.where((known == _NOBODY) | (known == who), who, _SEVERAL)
            self._reader[place] = new
            # Places that several threads read at once.
            order = np.argsort(place, kind="stable")
            same = place[order][1:] == place[order][:-1]
            differ = same & (who[order][1:] != who[order][:-1])
            self._reader[place[order][1:][differ]] = _SEVERAL
        return found

    def store(self, name: str, at: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        """See `Machine`."""
        super().store(name, at, values, threads)
        size = values.shape[1]
        if name == "global":
            self._must_be_in_arrays(at, size)
            np.add.at(self.stored, (at - self.memory_base)[:, None] + np.arange(size), 1)
        elif (words := self._words(at, size, threads)) is not None:
            place, who = words
            if len(np.unique(place)) != len(place):
                raise MosaicError("Two threads write one word of shared memory at once.")
            for before, what in ((self._writer[place], "written"), (self._reader[place], "read")):
                if ((before != _NOBODY) & (before != who)).any():
                    raise MosaicError(
                        f"A thread writes what another has {what}: no barrier is between."
                    )
            self._known[place], self._writer[place] = True, who

    def _words(
        self, at: np.ndarray, size: int, threads: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Numbers of the scratch's words that are accessed, and by whom."""
        place = at - self.scratch
        inside = place < 4 * len(self._known)
        if not inside.any():
            return None
        if not inside.all() or size != 4:
            raise MosaicError("The scratch is accessed in words, and never with other memory.")
        return place // 4, threads

    def _must_be_in_arrays(self, at: np.ndarray, size: int) -> None:
        if not self._allowed[(at - self.memory_base)[:, None] + np.arange(size)].all():
            raise MosaicError("Device memory is accessed outside of the arrays.")


# From MLIR to functions of numpy


_Env = list[Any]
_Step = Callable[[_Env], None]


@dataclasses.dataclass
class _Block:
    """A block of code: where its arguments go, what it does, and what it hands on."""

    arguments: list[int]
    steps: list[_Step]
    ends: list[int]

    def run(self, env: _Env, arguments: Sequence[Any] = ()) -> list[Any]:
        for slot, value in zip(self.arguments, arguments, strict=True):
            env[slot] = value
        for step in self.steps:
            step(env)
        return [env[slot] for slot in self.ends]


def _dtype(kind: Any) -> np.dtype:
    name = str(kind)
    if name == "i1":
        return np.dtype(bool)
    if name == "index":
        return np.dtype(np.int64)
    if name == "bf16":
        return np.dtype(jax.numpy.bfloat16)
    return np.dtype({"i": "int", "f": "float"}[name[0]] + name[1:])


def _signed(a: np.ndarray) -> np.ndarray:
    return -a.astype(np.int8) if a.dtype == bool else a


def _unsigned(a: np.ndarray) -> np.ndarray:
    return a if a.dtype == bool else a.view(f"u{a.dtype.itemsize}")


def _shift(by: Callable[..., np.ndarray], convert: Callable[..., Any] = lambda a: a) -> Any:
    def shifted(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
        bits = 8 * a.dtype.itemsize
        if (_unsigned(amount) >= bits).any():
            raise MosaicError(f"{bits} bits are shifted by as many or more.")
        return by(convert(a), convert(amount)).view(a.dtype)

    return shifted


def _truncated(operation: str) -> Callable[..., np.ndarray]:
    def divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if (b == 0).any():
            raise MosaicError("A whole number is divided by 0.")
        rest = np.fmod(a, b)
        return rest if operation == "rem" else (a - rest) // b

    return divided


def _of_unsigned(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda a, b: function(_unsigned(a), _unsigned(b)).view(a.dtype)


_SIGNED = [np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal]
_INTEGERS = [lambda a, b, f=f: f(_signed(a), _signed(b)) for f in _SIGNED]
_INTEGERS += [lambda a, b, f=f: f(_unsigned(a), _unsigned(b)) for f in _SIGNED[2:]]
# By the numbers of MLIR's predicates.
_FLOATS = {1: np.equal, 2: np.greater, 3: np.greater_equal, 4: np.less, 5: np.less_equal}
_FLOATS |= {13: np.not_equal}

_OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "arith.addf": np.add,
    "arith.addi": np.add,
    "arith.subf": np.subtract,
    "arith.subi": np.subtract,
    "arith.mulf": np.multiply,
    "arith.muli": np.multiply,
    "arith.remf": np.fmod,
    "arith.negf": np.negative,
    "arith.divsi": _truncated("div"),
    "arith.remsi": _truncated("rem"),
    "arith.divui": _of_unsigned(_truncated("div")),
    "arith.remui": _of_unsigned(_truncated("rem")),
    "arith.andi": np.bitwise_and,
    "arith.ori": np.bitwise_or,
    "arith.xori": np.bitwise_xor,
    "arith.maximumf": np.maximum,
    "arith.minimumf": np.minimum,
    "arith.maxsi": lambda a, b: np.where(_signed(a) > _signed(b), a, b),
    "arith.minsi": lambda a, b: np.where(_signed(a) < _signed(b), a, b),
    "arith.maxui": lambda a, b: np.where(_unsigned(a) > _unsigned(b), a, b),
    "arith.minui": lambda a, b: np.where(_unsigned(a) < _unsigned(b), a, b),
    "arith.shli": _shift(np.left_shift),
    "arith.shrui": _shift(np.right_shift, _unsigned),
    "arith.shrsi": _shift(np.right_shift),
    "arith.select": np.where,
    "math.absf": np.abs,
    "math.absi": np.abs,
    "math.cos": np.cos,
    "math.sin": np.sin,
    "math.tanh": np.tanh,
}


def _integer_of(a: np.ndarray, to: np.dtype, unsigned: bool = False) -> np.ndarray:
    """A float as an integer: towards 0, and the nearest there is."""
    if to.kind == "b":
        raise MosaicError("What is a float as one bit?")
    bounds = np.iinfo(f"u{to.itemsize}" if unsigned else to)
    wide = np.nan_to_num(np.trunc(a.astype(np.float64)))
    return np.clip(wide, bounds.min, bounds.max).astype(bounds.dtype).view(to)


_CONVERSIONS: dict[str, Callable[[np.ndarray, np.dtype], np.ndarray]] = {
    "arith.extf": lambda a, to: a.astype(to),
    "arith.truncf": lambda a, to: a.astype(to),
    "arith.extsi": lambda a, to: _signed(a).astype(to),
    "arith.extui": lambda a, to: _unsigned(a).astype(to),
    "arith.trunci": lambda a, to: (a & 1).astype(bool) if to.kind == "b" else a.astype(to),
    "arith.sitofp": lambda a, to: _signed(a).astype(to),
    "arith.uitofp": lambda a, to: _unsigned(a).astype(to),
    "arith.fptosi": _integer_of,
    "arith.fptoui": lambda a, to: _integer_of(a, to, unsigned=True),
    "arith.bitcast": lambda a, to: a.view(to),
    "arith.index_cast": lambda a, to: a.astype(to),
}


class _Compiler:
    """Takes a function of MLIR apart once, so that loops need not look at it again."""

    def __init__(self, machine: MosaicMachine):
        self._machine = machine
        self._slots: dict[Any, int] = {}

    @property
    def size(self) -> int:
        return len(self._slots)

    def block(self, block: Any) -> _Block:
        arguments = [self._slot(x) for x in block.arguments]
        *operations, last = block.operations
        steps = [self._step(op.operation) for op in operations]
        assert last.operation.name in ("scf.yield", "scf.condition", "func.return")
        return _Block(arguments, steps, [self._slot(x) for x in last.operation.operands])

    def _slot(self, value: Any) -> int:
        return self._slots.setdefault(value, len(self._slots))

    def _step(self, op: Any) -> _Step:
        ins, outs = [self._slot(x) for x in op.operands], [self._slot(x) for x in op.results]
        if op.name == "scf.if":
            return self._if(op, ins[0], outs)
        if op.name == "scf.while":
            return self._while(op, ins, outs)
        if op.name == "gpu.barrier":
            return lambda env: self._machine.all_meet()
        function = self._function(op)

        def step(env: _Env) -> None:
            result = function(*(env[i] for i in ins))
            for out in outs:
                env[out] = result

        return step

    def _function(self, op: Any) -> Callable[..., Any]:
        machine, attributes = self._machine, op.attributes
        if op.name == "llvm.inline_asm":
            return self._assembly(op)
        to = _dtype(op.results[0].type)
        if op.name == "arith.constant":
            value = attributes["value"].value
            value = value & 1 if to.kind == "b" else value
            made = np.full(machine.threads, value, to)
            return lambda: made
        if op.name == "gpu.block_id":
            return lambda: np.full(machine.threads, machine.blocks[0], to)
        if op.name == "arith.cmpi":
            return _INTEGERS[attributes["predicate"].value]
        if op.name == "arith.cmpf":
            return _FLOATS[attributes["predicate"].value]
        if op.name == "llvm.extractvalue":
            [which] = ir.DenseI64ArrayAttr(attributes["position"])
            return lambda values: _bits(values[which], to)
        if op.name in _CONVERSIONS:
            return lambda a: _CONVERSIONS[op.name](a, to)
        if op.name not in _OPERATIONS:
            raise NotImplementedError(f"The machine does not know {op.name}.")
        return _OPERATIONS[op.name]

    def _assembly(self, op: Any) -> Callable[..., Any]:
        machine, kind = self._machine, op.results[0].type
        text, constraints = (op.attributes[x].value for x in ("asm_string", "constraints"))
        to = None if str(kind).startswith("!llvm.struct") else _dtype(kind)

        def run(*operands: np.ndarray) -> Any:
            if machine.record:
                machine.texts.append(Text(text, constraints, operands))
            results = machine.run(text, constraints, operands)
            return results if to is None else _bits(results[0], to)

        return run

    def _if(self, op: Any, test: int, outs: list[int]) -> _Step:
        ways = [self.block(region.blocks[0]) for region in op.regions]

        def step(env: _Env) -> None:
            results = ways[0 if _together(env[test]) else 1].run(env)
            for out, value in zip(outs, results, strict=True):
                env[out] = value

        return step

    def _while(self, op: Any, ins: list[int], outs: list[int]) -> _Step:
        before, after = (self.block(region.blocks[0]) for region in op.regions)

        def step(env: _Env) -> None:
            values = [env[i] for i in ins]
            while True:
                test, *values = before.run(env, values)
                if not _together(test):
                    break
                values = after.run(env, values)
            for out, value in zip(outs, values, strict=True):
                env[out] = value

        return step


def _bits(register: np.ndarray, to: np.dtype) -> np.ndarray:
    if register.dtype.itemsize != to.itemsize:
        raise MosaicError(f"A register of type {register.dtype} is taken for {to}.")
    return register.view(to)


def _together(test: np.ndarray) -> bool:
    if (test != test[0]).any():
        raise MosaicError("Threads of a program go different ways.")
    return bool(test[0])


# Kernels


def traced(
    kernel: Callable[..., None],
    arrays: Sequence[Any],
    out_shapes: Sequence[Any],
    aliases: dict[int, int] | None = None,
    programs: int = 1,
) -> Any:
    """A kernel's jaxpr, of refs of its arrays, then of its results."""
    specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    return _trace(kernel, programs, specs, out_shapes, aliases or {})


@contextlib.contextmanager
def lowered_function(
    write: Callable[[Threads, Any, list[Any]], None],
    count: int,
    threads: int,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Iterator[Any]:
    """A function of MLIR, there within the context.

    Args:
        write: writes its code, of the threads, the ring's address, and the arrays' addresses.
        count: of the arrays.
        threads: T.
        scratch_bytes: of shared memory, for what goes from thread to thread.

    Yields:
        MLIR's function, of the addresses of the scratch and of the ring, int32, and of each array,
        64 bits.
    """
    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            function = func.FuncOp("kernel", ([i32(), i32(), *[integer(64)] * count], []))
        with ir.InsertionPoint(function.add_entry_block()):
            scratch, ring, *bases = function.arguments
            write(Threads(threads, scratch, scratch_bytes), ring, bases)
            func.return_([])
        assert module.operation.verify()
        yield function


def lowered_kernel(
    jaxpr: Any,
    arrays: Sequence[Any],
    threads: int,
    scratch_bytes: int = SCRATCH_BYTES,
    order: Sequence[int] | None = None,
) -> Any:
    """A kernel as Mosaic GPU is given it, within a context: see `lowered_function`.

    Args:
        jaxpr: of refs of all the arrays.
        arrays: arrays, or their shapes.
        threads: T.
        scratch_bytes: of shared memory, for what goes from thread to thread.
        order: the arrays' numbers, one a ref; None: each once.
    """

    def write(own: Threads, ring: Any, bases: list[Any]) -> None:
        pairs = zip(bases, arrays, strict=True)
        pointers = [Pointer(base, np.dtype(x.dtype).itemsize) for base, x in pairs]
        with lowered.by_backend(MosaicGpu(own, ring)):
            Body(own).run(jaxpr, [pointers[i] for i in order or range(len(pointers))])

    return lowered_function(write, len(arrays), threads, scratch_bytes)


def run_lowered(function: Any, machine: MosaicMachine) -> None:
    """Runs a lowered kernel on a machine's threads."""
    compiler = _Compiler(machine)
    block = compiler.block(function.entry_block)
    addresses = [np.full(machine.threads, x, np.int32) for x in (machine.scratch, machine.ring)] + [
        np.full(machine.threads, x, np.int64) for x in machine.arrays
    ]
    with np.errstate(all="ignore"):
        block.run([None] * compiler.size, addresses)


def run(
    kernel: Callable[..., None],
    *,
    threads: int,
    arrays: Sequence[Any],
    out_shapes: Sequence[Any],
    aliases: dict[int, int] | None = None,
    ring_bytes: int = 0,
    once: bool = True,
    record: bool = False,
    scratch_bytes: int = SCRATCH_BYTES,
    prepare: Callable[[MosaicMachine], None] = lambda machine: None,
) -> tuple[list[np.ndarray], MosaicMachine]:
    """Traces, lowers and runs a kernel of one program.

    Args:
        kernel: of refs of the arrays, then of the results.
        threads: T.
        arrays: inputs.
        out_shapes: of the results, which start as bits that are all set.
        aliases: inputs, by number, that are results as well, and are updated in place.
        ring_bytes: of shared memory that the kernel lays out itself.
        once: whether an element must not be stored more than once.
        record: whether the machine keeps the inline PTX that it ran.
        scratch_bytes: of shared memory, for what goes from thread to thread.
        prepare: what is done to the machine before.

    Returns:
        The results, and the machine.
    """
    aliases = aliases or {}
    given = [np.asarray(x) for x in arrays]
    memory, place = [*given], {out: i for i, out in aliases.items()}
    for number, x in enumerate(out_shapes):
        if number not in place:
            place[number] = len(memory)
            size = int(np.prod(x.shape, dtype=np.int64)) * np.dtype(x.dtype).itemsize
            memory.append(np.full(size, 0xFF, np.uint8).view(x.dtype).reshape(x.shape))
    jaxpr = traced(kernel, given, out_shapes, aliases)
    order = [*range(len(given)), *(place[i] for i in range(len(out_shapes)))]
    machine = MosaicMachine(
        threads, memory, ring_bytes=ring_bytes, scratch_bytes=scratch_bytes, record=record
    )
    prepare(machine)
    with lowered_kernel(jaxpr, memory, threads, scratch_bytes, order) as function:
        run_lowered(function, machine)
    if once and machine.stored.max() > 1:
        raise MosaicError("An element is stored more than once.")
    return [machine.array(place[i], x) for i, x in enumerate(out_shapes)], machine
