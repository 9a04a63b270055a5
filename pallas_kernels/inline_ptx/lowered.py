"""How the kernels' operations become inline PTX, whichever compiler takes the kernel.

An operation is a primitive of JAX with a rule, kept by `rule`: what text it is, and what is bound
to it. How a compiler holds numbers is the business of its room, `pallas_kernels.triton` or
`pallas_kernels.mosaic_gpu`. A room calls the rules for its `Backend`, within `by_backend`, and they
reach it through the functions below. Nothing here knows which backends there are.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from pallas_kernels.primitives import Primitive

__all__ = [
    "ANYWHERE",
    "MEET",
    "REJOIN",
    "RULES",
    "Backend",
    "Rule",
    "addresses",
    "arith",
    "assembly",
    "barrier",
    "by_backend",
    "f32",
    "i32",
    "i64",
    "like",
    "one_program_a_multiprocessor",
    "pointer",
    "ring_base",
    "rule",
    "spread",
    "values",
]

# The threads of a warp wait for each other.
REJOIN = "bar.warp.sync 0xffffffff;"
# The threads of a program do.
MEET = f"{REJOIN} bar.sync 0;"


Rule = Callable[..., Sequence[Any] | Any]
RULES: dict[Primitive, Rule] = {}
"""What each operation is lowered by: of a context with `avals_in` and `avals_out`, operands, and
the primitive's parameters."""
ANYWHERE: set[Primitive] = set()
"""Those that make nothing, and whose elements may be done by any thread, by several too."""


class Backend(Protocol):
    """How a compiler holds arrays, and what it makes of a rule's wishes."""

    arith: Any
    """Arithmetic on values, by the names of MLIR's dialect `arith`."""

    def integer(self, bits: int) -> Any:
        """The type of integers of so many bits."""
        ...

    def float32(self) -> Any:
        """The type of float32."""
        ...

    def values(self, ctx: Any, args: Sequence[Any]) -> list[Any]:
        """Values of the last operands."""
        ...

    def like(self, shape: Sequence[int], element: Any) -> Any:
        """The type of arrays of a shape."""
        ...

    def spread(self, value: Any, shape: Sequence[int]) -> Any:
        """An array of one value."""
        ...

    def pointer(self, ref: Any) -> Any:
        """Address of an array, 64 bits."""
        ...

    def addresses(self, ref: Any, offsets: Any, shape: Sequence[int]) -> Any:
        """64-bit addresses of an array's elements."""
        ...

    def assembly(
        self,
        results: list[Any],
        text: str,
        constraints: str,
        args: list[Any],
        together: int,
    ) -> list[Any]:
        """Inline PTX, run by every thread for each of its elements, or for `together` of them."""
        ...

    def barrier(self) -> None:
        """Waits for the program's other threads."""
        ...

    def one_program_a_multiprocessor(self) -> None:
        """Says that no second program need find room beside one."""
        ...

    def ring_base(self, zero: Any, size: int, alignment: int) -> Any:
        """Where `size` bytes of shared memory begin that are the kernel's own, aligned."""
        ...


_backend: contextvars.ContextVar[Backend | None] = contextvars.ContextVar("backend", default=None)


def _now() -> Backend:
    """The backend that lowers."""
    backend = _backend.get()
    assert backend is not None, "Rules are called by a backend's room: see by_backend."
    return backend


@contextlib.contextmanager
def by_backend(backend: Backend) -> Iterator[None]:
    """Within it, rules are called for this backend."""
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def rule(primitive: Primitive) -> Callable[[Rule], Rule]:
    """Keeps how an operation is lowered, by whichever backend: in `RULES`."""

    def keep(function: Rule) -> Rule:
        RULES[primitive] = function
        return function

    return keep


def i32() -> Any:
    """32-bit integers."""
    return _now().integer(32)


def i64() -> Any:
    """64-bit integers."""
    return _now().integer(64)


def f32() -> Any:
    """float32."""
    return _now().float32()


class _Arithmetic:
    """The backend's arithmetic."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_now().arith, name)


arith: Any = _Arithmetic()


def values(ctx: Any, args: Sequence[Any]) -> list[Any]:
    """Values of the last operands."""
    return _now().values(ctx, args)


def like(shape: Sequence[int], element: Any) -> Any:
    """The type of arrays of a shape."""
    return _now().like(shape, element)


def spread(value: Any, shape: Sequence[int]) -> Any:
    """An array of one value."""
    return _now().spread(value, list(shape))


def pointer(ref: Any) -> Any:
    """Address of an array, 64 bits."""
    return _now().pointer(ref)


def addresses(ref: Any, offsets: Any, shape: Sequence[int]) -> Any:
    """64-bit addresses of an array's elements."""
    return _now().addresses(ref, offsets, shape)


def one_program_a_multiprocessor() -> None:
    """Says that no second program need find room beside one. To be called while lowering.

    Of 128 threads ptxas else saves registers for two more programs, and spills what it has saved;
    the ring leaves no shared memory for them.
    """
    _now().one_program_a_multiprocessor()


def barrier() -> None:
    """Waits for the program's other threads, and tells the compiler that all have met."""
    _now().barrier()


def ring_base(zero: Any, size: int, alignment: int) -> Any:
    """Where `size` bytes of shared memory begin that are the kernel's own, aligned."""
    return _now().ring_base(zero, size, alignment)


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
    return _now().assembly(results, text, constraints, args, together)
