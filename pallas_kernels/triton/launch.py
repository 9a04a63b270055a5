"""Launches a kernel by Pallas's Triton backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.triton.backend import know_rules

__all__ = ["compiler_params", "launch"]


def compiler_params(num_warps: int, num_stages: int) -> Any:
    """What a `pallas_call` is given to be compiled by Triton, which knows all operations then.

    Args:
        num_warps: of a program.
        num_stages: for the compiler, by which it takes shared memory.
    """
    know_rules()
    return plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)


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
        compiler_params=compiler_params(threads // 32, num_stages),
        name=name,
    )
    return call(*arrays)
