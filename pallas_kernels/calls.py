"""Calls of the kernels beside the decode step: those of the prefill, of draws, of probabilities.

They are compiled by Triton alone. Where this JAX has none, `backends.why_no_small_kernels` says so,
and XLA does their work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.experimental import pallas as pl

__all__ = ["kernel_call"]


def kernel_call(
    kernel: Callable[..., None],
    *,
    grid: tuple[int, ...],
    out_shape: Any,
    num_warps: int,
    num_stages: int = 1,
    aliases: dict[int, int] | None = None,
    name: str,
    interpret: bool,
) -> Callable[..., Any]:
    """A function of arrays that runs a kernel once on each program, as one launch.

    Args:
        kernel: of refs of the arrays, then of the results.
        grid: programs along each axis.
        out_shape: a tree of `jax.ShapeDtypeStruct`, of the results.
        num_warps: of a program.
        num_stages: loads of a loop that the compiler keeps on their way, less one.
        aliases: arrays, by number, that are results as well, and are updated in place.
        name: the kernel's.
        interpret: run on a CPU, which needs no backend.
    """
    options: dict[str, Any] = {}
    if not interpret:
        from pallas_kernels.triton.launch import compiler_params

        options["compiler_params"] = compiler_params(num_warps, num_stages)
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        input_output_aliases=aliases or {},
        interpret=interpret,
        name=name,
        **options,
    )
