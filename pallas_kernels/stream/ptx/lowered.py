"""How the operations of this package become inline PTX, whichever compiler takes the kernel.

An operation is a primitive of JAX with a rule, registered by `rule`: what text it is, and what is
bound to it. How a compiler holds numbers is the business of its room, `pallas_kernels.triton` or
`pallas_kernels.mosaic_gpu`, whose `Backend` a rule reaches through the functions below.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from jax._src import core, effects
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.pallas import core as pallas_core

__all__ = [
    "MEET",
    "ORDERED",
    "REJOIN",
    "ANYWHERE",
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


class _Ordered(effects.Effect):
    """That of what the kernel does besides computing."""


ORDERED = _Ordered()
"""Nothing with this effect is dropped, merged or moved across another that has it."""
pallas_core.kernel_local_effects.add_type(_Ordered)
effects.control_flow_allowed_effects.add_type(_Ordered)

Rule = Callable[..., Sequence[Any] | Any]
RULES: dict[core.Primitive, Rule] = {}
"""What each operation is lowered by: of a context with `avals_in` and `avals_out`, operands, and
the primitive's parameters."""
ANYWHERE: set[core.Primitive] = set()
"""Those that make nothing, and whose elements may be done by any thread, by several too."""


class Backend(Protocol):
    """How a compiler holds arrays, and what it makes of a rule's wishes."""

    arith: Any
    """Arithmetic on values, by the names of MLIR's dialect `arith`."""

    def values(self, ctx: Any, args: Sequence[Any]) -> list[Any]:
        """Values of the last operands."""
        ...

    def like(self, shape: Sequence[int], element: ir.Type) -> Any:
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
    """The backend that lowers; Triton, which calls the rules by itself, if none says that it is."""
    if (backend := _backend.get()) is None:
        from pallas_kernels.triton.backend import TRITON

        return TRITON
    return backend


@contextlib.contextmanager
def by_backend(backend: Backend) -> Iterator[None]:
    """Within it, rules are called for this backend."""
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def rule(primitive: core.Primitive) -> Callable[[Rule], Rule]:
    """Registers how an operation is lowered, with every backend that JAX has."""

    def register(function: Rule) -> Rule:
        RULES[primitive] = function
        # JAX means to take Triton's away: Mosaic GPU, which looks the rules up, is left then.
        with contextlib.suppress(ImportError):
            from pallas_kernels.triton.backend import register as register_with_triton

            register_with_triton(primitive, function)
        return function

    return register


def i32() -> ir.Type:
    """32-bit integers."""
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    """64-bit integers."""
    return ir.IntegerType.get_signless(64)


def f32() -> ir.Type:
    """float32."""
    return ir.F32Type.get()


class _Arithmetic:
    """The backend's arithmetic."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_now().arith, name)


arith: Any = _Arithmetic()


def values(ctx: Any, args: Sequence[Any]) -> list[Any]:
    """Values of the last operands."""
    return _now().values(ctx, args)


def like(shape: Sequence[int], element: ir.Type) -> Any:
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
