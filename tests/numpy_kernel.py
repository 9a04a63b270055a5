"""Interpreted kernels run by numpy instead of by XLA: see `jaxpr_numpy.py`.

XLA takes seconds to compile what Pallas's interpreter makes of the decode kernel, for a test that
runs it once or twice. Here a program around the kernel calls back to numpy, which evaluates the
kernel's jaxpr as it was traced. It is stricter too: an address outside an array is an error, where
the interpreter moves it inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import callback, core
from jax._src.interpreters import mlir
from jax.experimental import pallas as pl
from jaxpr_numpy import evaluate

from pallas_kernels.stream import launch

__all__ = ["by_numpy"]

# Not `jax.pure_callback`, which makes arrays of JAX's for numpy to read: with few CPUs each waits
# for the other.
_called_p = core.Primitive("numpy_kernel")
_called_p.multiple_results = True


@_called_p.def_abstract_eval
def _(*avals: Any, results: tuple[Any, ...], **_: Any) -> list[Any]:
    return [core.ShapedArray(x.shape, x.dtype) for x in results]


def _lowered(ctx: Any, *operands: Any, function: Any, **_: Any) -> Any:
    made, _, _ = callback.emit_python_callback(
        ctx,
        function,
        None,
        list(operands),
        ctx.avals_in,
        ctx.avals_out,
        has_side_effect=False,
        returns_token=False,
    )
    return made


mlir.register_lowering(_called_p, _lowered, cacheable=False)


def _run(*args: Any, function: Any, **_: Any) -> list[jax.Array]:
    return [jnp.asarray(x) for x in function(*map(np.asarray, args))]


_called_p.def_impl(_run)


def _jaxpr_of(call: Any, arrays: Sequence[Any]) -> Any:
    """The jaxpr of the kernel that a call runs."""
    specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    [kernel] = (
        eqn.params["jaxpr"]
        for eqn in jax.make_jaxpr(call)(*specs).eqns
        if eqn.primitive.name == "pallas_call"
    )
    return kernel


def _unwritten(spec: Any) -> np.ndarray:
    """What an array holds that nobody has written, as in Pallas's interpreter."""
    dtype = np.dtype(spec.dtype)
    value: Any = jnp.iinfo(dtype).min if jnp.issubdtype(dtype, jnp.integer) else np.nan
    return np.full(spec.shape, value, dtype)


def _interpret(kernel: Any, programs: int, arrays: Any, shapes: Any, aliases: Any) -> Any:
    """In place of `launch._interpret`: programs run one after another."""
    call = pl.pallas_call(
        kernel, grid=(programs,), out_shape=shapes, input_output_aliases=aliases, interpret=True
    )
    jaxpr = _jaxpr_of(call, arrays)
    given = {out: at for at, out in aliases.items()}

    def function(*inputs: np.ndarray) -> list[np.ndarray]:
        results = [
            np.array(inputs[given[at]]) if at in given else _unwritten(spec)
            for at, spec in enumerate(shapes)
        ]
        for program in range(programs):
            evaluate(jaxpr, [*inputs, *results], program)
        return results

    # What is traced around it shows the kernel.
    return _called_p.bind(*arrays, function=function, results=tuple(shapes), kernel=jaxpr)


@contextlib.contextmanager
def by_numpy() -> Iterator[None]:
    """Interpreted steps that are traced meanwhile are run by numpy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_interpret", _interpret)
        yield
