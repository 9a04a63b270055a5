"""An operation of the kernel that is a text of inline PTX: one wrapper for all of them.

def _write_sum(b: Block, total: Register, address: Register, *, step: int) -> None: ...

_sum = Operation("ffjax_sum", _write_sum)
[total] = _sum(address, results=["float32"], step=4)
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.asm import Block
from pallas_kernels.inline_ptx import lowered
from pallas_kernels.primitives import ORDERED, effectful, made, reads, writes

__all__ = ["Choice", "Operation", "Pointer", "listings"]

_KINDS = {"int32": "s32", "bool": "s32", "float32": "f32"}


_listings: list[list[str]] = []


@contextlib.contextmanager
def listings() -> Iterator[list[str]]:
    """Keeps what is lowered within it as texts for people: with comments, and what is bound.

    with listings() as texts:
        jax.jit(step).lower(...)
    print(*texts, sep="\n\n")
    """
    texts: list[str] = []
    _listings.append(texts)
    try:
        yield texts
    finally:
        _listings.remove(texts)


class Pointer(NamedTuple):
    """An operand that is an array's address, or those of some of its elements: 64 bits.

    Attributes:
        ref: the array's.
        offsets: int32, numbers of elements; None: the array's beginning.
        written: whether the text writes there; else it reads.
    """

    ref: Any
    offsets: Array | int | None = None
    written: bool = False


class Choice(NamedTuple):
    """Likewise of elements of one of several arrays.

    Which array is no matter of branches: after one, what was loaded would be waited for.

    Attributes:
        refs: the arrays', which are read.
        beyond: bool, one for each array but the first: the last one whose condition holds is it.
        offsets: int32, numbers of elements; None: the array's beginning.
    """

    refs: Sequence[Any]
    beyond: Sequence[Array]
    offsets: Array | int | None


class _Operand(NamedTuple):
    """What is bound, by the numbers of a primitive's refs and, from 0 on, of its arrays."""

    refs: tuple[int, ...]
    beyond: tuple[int, ...]
    array: int | None


class Operation:
    """A primitive of JAX that is lowered to a text, with all that this takes.

    Nothing drops, merges or reorders it.
    """

    def __init__(
        self,
        name: str,
        write: Callable[..., None],
        when_lowered: Callable[..., None] = lambda **_: None,
        *,
        anywhere: bool = False,
    ):
        """Makes the primitive, and its rule with every backend.

        Args:
            name: the primitive's.
            write: writes the text: of a `Block`, a register for each result, one for each operand,
                or a list of them where elements are taken together, and of keywords.
            when_lowered: called before, with the same keywords.
            anywhere: whether it is the same whichever threads run it for an element, and how many:
                a backend need then not bring its operands to the threads that texts want them in.
        """
        self._write, self._when_lowered = write, when_lowered
        self._primitive = effectful(name, self._abstract)
        lowered.rule(self._primitive)(self._lower)
        if anywhere:
            lowered.ANYWHERE.add(self._primitive)

    def __call__(
        self,
        *operands: Any,
        results: Sequence[str] = (),
        early: bool = True,
        together: int | None = None,
        **options: Any,
    ) -> list[Array]:
        """Has every thread run the text for each of its elements.

        Args:
            operands: int32, float32 or bool, all of one shape, or scalars, which are spread to it;
                or a `Pointer`. A bool comes as 0 or 1.
            results: their dtypes; empty where the text makes nothing.
            early: whether a result may be set before the last operand has been read.
            together: elements of an array that a thread takes at once: the text is then of a list
                of registers for each result, and for each operand. None: of one register.
            options: what the text is written by; hashable.

        Returns:
            The results, of the operands' shape, `(1,)` where all are scalars. Where the text makes
            none, one of no use: a branch of a `cond` must have a result.
        """
        refs: list[Any] = []
        arrays: list[Any] = []
        bound, is_written = [], []

        def numbered(to: list[Any], some: Sequence[Any]) -> tuple[int, ...]:
            to.extend(some)
            return tuple(range(len(to) - len(some), len(to)))

        for x in operands:
            choice = x if isinstance(x, Choice) else Choice((), (), x)
            if isinstance(x, Pointer):
                choice = Choice((x.ref,), (), x.offsets)
            of, beyond = numbered(refs, choice.refs), numbered(arrays, choice.beyond)
            is_written += [isinstance(x, Pointer) and x.written] * len(of)
            array = None
            if (offsets := choice.offsets) is not None:
                whole = jnp.int32(offsets) if isinstance(offsets, int) else offsets
                [array] = numbered(arrays, [whole])
            bound.append(_Operand(of, beyond, array))
        shape = next((x.shape for x in arrays if x.shape), (1,))
        arrays = [x if x.shape == shape else jnp.full(shape, x) for x in arrays]
        return self._primitive.bind(
            *refs,
            *arrays,
            bound=tuple(bound),
            written=tuple(is_written),
            results=tuple(results),
            early=early,
            together=together,
            **options,
        )

    def _abstract(self, *args: Any, written: Any, results: Any, **_: Any) -> Any:
        effects = {writes(i) if is_written else reads(i) for i, is_written in enumerate(written)}
        return [made(args[-1].shape, x) for x in results or ["int32"]], {ORDERED, *effects}

    def text(
        self,
        results: Sequence[str],
        kinds: Sequence[str],
        early: bool,
        together: int | None,
        **options: Any,
    ) -> Block:
        """The text, with registers of some types bound to it."""
        b, names, each = Block(), _names(self._write), together or 1
        # Where a text makes nothing, something is set at its end.
        made = b.results(
            *([_KINDS[x] for x in results for _ in range(each)] or ["u32"]),
            early=early and bool(results),
        )
        for _ in results:
            next(names)
        outs = [made[i : i + each] for i in range(0, each * len(results), each)]
        given = [b.operand_list(kind, next(names), each) for kind in kinds]
        registers = [x if together else x[0] for x in (*outs, *given)]
        self._write(b, *registers, **options)
        if not results:
            b.mov(made[0], 0)
        return b

    def _lower(
        self,
        ctx: Any,
        *args: Any,
        bound: Sequence[_Operand],
        written: Sequence[bool],
        results: Sequence[str],
        early: bool,
        together: int | None,
        **options: Any,
    ) -> Any:
        self._when_lowered(**options)
        refs, count = args[: len(written)], len(written)
        shape = ctx.avals_in[-1].shape
        values = lowered.values(ctx, args[count:])
        dtypes = [x.dtype.name for x in ctx.avals_in[count:]]
        for x in bound:
            if x.array is not None and dtypes[x.array] == "bool":
                word = lowered.like(shape, lowered.i32())
                values[x.array] = lowered.arith.extui(word, values[x.array])

        def value_of(x: _Operand) -> tuple[str, Any]:
            if x.array is None:
                return "u64", lowered.spread(lowered.pointer(refs[x.refs[0]]), list(shape))
            value = values[x.array]
            if x.refs:
                first, *others = (lowered.addresses(refs[i], value, shape) for i in x.refs)
                for condition, other in zip(x.beyond, others, strict=True):
                    first = lowered.arith.select(values[condition], other, first)
                return "u64", first
            return _KINDS[dtypes[x.array]], value

        kinds, arguments = zip(*map(value_of, bound), strict=True)
        b = self.text(results, kinds, early, together, **options)
        types = {"int32": lowered.i32(), "float32": lowered.f32()}
        made = [lowered.like(shape, types[x]) for x in results or ["int32"]]
        for texts in _listings:
            texts.append(f"// {self._primitive.name}\n{b.listing()}")
        whole = b.warps_jump_whole or not b.jumps
        return lowered.assembly(
            made, b.text(), b.constraints, list(arguments), together or 1, by_warps=whole
        )


def _names(write: Callable[..., None]) -> Iterator[str]:
    """What a text's results and operands are called in the function that writes it.

    Those that a `*name` takes have that name, however many they are.
    """
    for parameter in [*inspect.signature(write).parameters.values()][1:]:
        if parameter.kind is parameter.VAR_POSITIONAL:
            yield from itertools.repeat(parameter.name)
        yield parameter.name
