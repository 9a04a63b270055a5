"""Inline PTX as lowerings hand it to Triton, and what they bind to it, with no GPU there."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from ptx_machine import Machine
from ptx_mutations import Mutation, mutated, occurs

from pallas_kernels.inline_ptx import lowered
from pallas_kernels.stream import ptx
from pallas_kernels.triton.launch import compiler_params

__all__ = [
    "Edit",
    "Inline",
    "Spelled",
    "bound",
    "inline",
    "inlines",
    "lower_for_gpu",
    "map_text",
    "shape",
]


class Spelled(NamedTuple):
    """An edit of a text that is written as a string: characters, and what comes instead."""

    old: str
    new: str


Edit = Mutation | Spelled | None


class Inline(NamedTuple):
    """Inline PTX as Triton is given it."""

    text: str
    constraints: str

    def edited(self, edit: Edit) -> Inline:
        if edit is None:
            return self
        if isinstance(edit, Spelled):
            if edit.old not in self.text:
                raise LookupError(f"{edit.old} does not occur in {self.text}")
            return self._replace(text=self.text.replace(*edit))
        return self._replace(text=mutated(self.text, edit))

    def has(self, edit: Edit) -> bool:
        """Whether the text has what an edit is about."""
        return edit is not None and occurs(self.text, edit)

    def run(self, machine: Machine, *operands: Any, limit: int = 20_000) -> list[np.ndarray]:
        return machine.run(self.text, self.constraints, operands, limit)


def _recorded(found: list[Any], make: Callable[[str, str, Any], Any]) -> Any:
    """Patches the lowering so that what `make` makes of each inline PTX is found."""
    original = lowered.assembly

    def recorded(results: Any, text: str, constraints: str, args: Any, *rest: Any, **more: Any):
        found.append(make(text, constraints, args))
        return original(results, text, constraints, args, *rest, **more)

    return mock.patch.object(lowered, "assembly", recorded)


def lower_for_gpu(function: Callable[..., Any], *specs: Any) -> None:
    """Lowers a function of arrays for a GPU that need not be there.

    Args:
        function: what to lower.
        specs: its arguments, shapes in place of arrays.
    """
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Pallas for Triton
        jax.jit(lambda *x: function(*x)).trace(*specs).lower(lowering_platforms=("cuda",))


def _lower(body: Callable[..., Any], arrays: Sequence[jax.ShapeDtypeStruct]) -> None:
    def kernel(*refs: Any) -> None:
        body(*refs[:-1])

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((1,), jnp.int32),
        compiler_params=compiler_params(num_warps=1, num_stages=1),
    )
    lower_for_gpu(call, *arrays)


def inlines(body: Callable[..., Any], *arrays: jax.ShapeDtypeStruct) -> list[Inline]:
    """What a kernel's body is lowered to, for a GPU that need not be there.

    Args:
        body: of the arrays' refs.
        arrays: of the kernel.
    """
    found: list[Inline] = []
    with _recorded(found, lambda text, constraints, _: Inline(text, constraints)):
        _lower(body, arrays)
    return found


def inline(body: Callable[..., Any], *arrays: jax.ShapeDtypeStruct) -> Inline:
    [found] = inlines(body, *arrays)
    return found


def bound(
    body: Callable[..., Any], pointers: Sequence[int], *arrays: jax.ShapeDtypeStruct
) -> list[np.ndarray]:
    """What is bound to the first inline PTX of a body.

    Args:
        body: of the arrays' refs. What is bound follows from those and from constants.
        pointers: of the arrays.
        arrays: of the kernel.
    """
    found: list[list[np.ndarray]] = []

    def numbers(_text: str, _constraints: str, args: Any) -> list[np.ndarray]:
        return [_number(x, pointers) for x in args] if not found else []

    with _recorded(found, numbers):
        _lower(body, arrays)
    return found[0]


def shape(count: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count,), dtype)


_COMPARE = [np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal]
_BINARY = {
    "arith.addi": np.add,
    "arith.andi": np.bitwise_and,
    "arith.muli": np.multiply,
    "arith.subi": np.subtract,
}


def _number(value: Any, pointers: Sequence[int]) -> np.ndarray:
    """A value of the intermediate representation, int64."""
    if "Block" in type(value.owner).__name__:
        return np.array(pointers[value.arg_number], np.int64)
    op = value.owner
    at, inputs = op.attributes, [_number(x, pointers) for x in op.operands]
    if op.name == "arith.constant":
        return np.array(at["value"].value, np.int64)
    if op.name == "tt.make_range":
        return np.arange(at["start"].value, at["end"].value)
    if op.name == "tt.addptr":
        size = next(n for kind, n in (("bf16", 2), ("i32", 4)) if f"ptr<{kind}>" in str(value.type))
        return inputs[0] + size * inputs[1]
    if op.name == "arith.extui":
        return inputs[0].astype(np.int64)
    if op.name == "arith.select":
        return np.where(*inputs)
    if op.name == "arith.cmpi":
        return _COMPARE[at["predicate"].value](*inputs)
    if op.name in _BINARY:
        return _BINARY[op.name](*inputs)
    assert op.name in ("tt.splat", "tt.ptr_to_int"), f"{op.name} is not known."
    return inputs[0]


@functools.cache
def map_text(tensor: ptx.TensorMap) -> Inline:
    """Makes a tensor map: of the words' address, the matrix's, the scratch's, and the place."""

    def body(words: Any, weights: Any) -> None:
        zero = jnp.int32(0)
        ptx.make_map(words, zero, weights, zero, zero, tensor)

    return inline(body, shape(16), shape(16, jnp.bfloat16))
