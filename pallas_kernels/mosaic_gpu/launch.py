"""Launches a kernel by Mosaic GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax._src import core
from jax._src.lib.mlir.dialects import llvm
from jax._src.state import discharge
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.inline_ptx import lowered
from pallas_kernels.mosaic_gpu.backend import MosaicGpu
from pallas_kernels.mosaic_gpu.body import Body
from pallas_kernels.mosaic_gpu.ir import i32, integer
from pallas_kernels.mosaic_gpu.threads import Threads
from pallas_kernels.mosaic_gpu.values import Pointer

__all__ = ["SCRATCH_BYTES", "launch"]

# Of shared memory, for what goes from thread to thread. Plans leave a compiler so much and more.
SCRATCH_BYTES = 4096
# Threads of what Mosaic GPU calls a thread.
_WARP_GROUP = 128


def launch(
    kernel: Callable[..., None],
    *,
    programs: int,
    threads: int,
    shared_bytes: int,
    arrays: Sequence[Array],
    out_shapes: Sequence[jax.ShapeDtypeStruct],
    aliases: dict[int, int],
    name: str,
) -> list[Array]:
    """Runs `kernel` once on each program, as one launch.

    Args:
        kernel: of refs of the arrays, then of the results.
        programs: of the launch.
        threads: of a program, a multiple of 128.
        shared_bytes: that the kernel lays out itself.
        arrays: its inputs.
        out_shapes: of its results.
        aliases: inputs, by number, that are results as well, and are updated in place.
        name: the kernel's.

    Returns:
        The results.
    """
    specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    jaxpr = _trace(kernel, programs, specs, out_shapes, aliases)
    fresh = [i for i in range(len(out_shapes)) if i not in aliases.values()]
    items = [spec.dtype.itemsize for spec in (*specs, *(out_shapes[i] for i in fresh))]

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def lower(_context: Any, *memory: Any) -> None:
            *arrays, ring, scratch = memory
            own = Threads(threads, _shared_address(scratch), SCRATCH_BYTES)
            pointers = [
                Pointer(llvm.ptrtoint(integer(64), utils.memref_ptr(x)), item)
                for x, item in zip(arrays, items, strict=True)
            ]
            given, made = pointers[: len(specs)], iter(pointers[len(specs) :])
            updated = {out: given[i] for i, out in aliases.items()}
            results = [updated[i] if i in updated else next(made) for i in range(len(out_shapes))]
            with lowered.by_backend(MosaicGpu(own, _shared_address(ring))):
                Body(own).run(jaxpr, [*given, *results])

        lower(*refs)

    body.__name__ = name
    call = plgpu.kernel(
        body,
        out_type=tuple(out_shapes[i] for i in fresh),
        scratch_types=[
            plgpu.SMEM((shared_bytes,), jnp.int8),
            plgpu.SMEM((SCRATCH_BYTES,), jnp.int8),
        ],
        grid=(programs,),
        grid_names=("program",),
        num_threads=threads // _WARP_GROUP,
        thread_name="warp_group",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    # Without its rule of batching, which JAX before 0.11 discharges no refs within. Callers of the
    # step batch it by a rule of their own.
    run = call.fun
    inputs = {out: i for i, out in aliases.items()}

    def stateful(*arrays: Array) -> list[Array]:
        refs = {i: jax.new_ref(arrays[i]) for i in aliases}
        made = iter(run(*(refs.get(i, x) for i, x in enumerate(arrays))))
        return [refs[inputs[i]][...] if i in inputs else next(made) for i in range(len(out_shapes))]

    # Derivatives and batching that a caller defines take no refs within: only values go in and out.
    pure = discharge.discharge_state(jax.make_jaxpr(stateful)(*arrays))
    # XLA fuses slices of arrays, and updates of them, with a call between them ("dynamic slice
    # fusion"), and forgets that the call updates arrays in place: in a `lax.scan` over caches or
    # models, and under `jax.vmap`, which is one, results may keep what they held. Where no operand
    # is a slice, and no result becomes an update, it fuses nothing.
    outs = core.jaxpr_as_fun(pure)(*lax.optimization_barrier(arrays))
    return lax.optimization_barrier(outs)


def _trace(
    kernel: Callable[..., None],
    programs: int,
    specs: Sequence[jax.ShapeDtypeStruct],
    out_shapes: Sequence[jax.ShapeDtypeStruct],
    aliases: dict[int, int],
) -> Any:
    """The kernel's jaxpr, of refs of all inputs and results."""
    call = pl.pallas_call(
        kernel, grid=(programs,), out_shape=list(out_shapes), input_output_aliases=aliases
    )
    [eqn] = [
        eqn
        for eqn in jax.make_jaxpr(call)(*specs).jaxpr.eqns
        if eqn.primitive.name == "pallas_call"
    ]
    return eqn.params["jaxpr"]


def _shared_address(memory: Any) -> Any:
    return llvm.ptrtoint(i32(), utils.memref_ptr(memory))
