"""Launches a kernel by Pallas's Triton backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

__all__ = ["launch"]


def launch(
    kernel: Callable[..., None],
    *,
    programs: int,
    threads: int,
    num_stages: int,
    arrays: Sequence[Array],
    out_shapes: Sequence[jax.ShapeDtypeStruct],
    aliases: dict[int, int],
    name: str,
) -> list[Array]:
    """Runs `kernel` once on each program, as one launch.

    Args:
        kernel: of refs of the arrays, then of the results.
        programs: of the launch.
        threads: of a program.
        num_stages: for the compiler, by which it takes shared memory.
        arrays: its inputs.
        out_shapes: of its results.
        aliases: inputs, by number, that are results as well, and are updated in place.
        name: the kernel's.

    Returns:
        The results.
    """
    call = pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=list(out_shapes),
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=threads // 32, num_stages=num_stages),
        name=name,
    )
    return call(*arrays)
