"""Which of Pallas's backends compiles the kernels.

A step's plan says which one: `StreamPlan.backend` is that of its `Tuning`, or else
`default_backend`. `ffjax.decode.fused_step` overrides it for the implementation that was asked for,
and `stream.launch` sends the kernel to that backend's room. `support.why_not` asks
`why_not_backend` before.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Literal

from pallas_kernels import mosaic_gpu, triton
from pallas_kernels.gpu import Gpu

__all__ = ["BACKENDS", "Backend", "default_backend", "why_no_small_kernels", "why_not_backend"]

Backend = Literal["triton", "mosaic_gpu"]

BACKENDS: tuple[Backend, ...] = ("triton", "mosaic_gpu")
_ROOMS: dict[Backend, ModuleType] = {"triton": triton, "mosaic_gpu": mosaic_gpu}
_NAMES = {"triton": "Pallas's Triton backend", "mosaic_gpu": "Pallas's Mosaic GPU backend"}


def why_not_backend(backend: Backend, gpu: Gpu | None = None) -> str | None:
    """Why a backend cannot compile the kernel here, as a sentence; None: it can.

    Args:
        backend: its name.
        gpu: the device; None: any.
    """
    if not _is_there(backend):
        instead = (
            "Take the other one" if any(map(_is_there, BACKENDS)) else "Use implementation='xla'"
        )
        return f"{_NAMES[backend]} is not part of this version of JAX. {instead}, or another JAX."
    if backend == "mosaic_gpu" and gpu is not None and float(gpu.capability) < 9:
        instead = (
            "Take Triton"
            if _is_there("triton")
            else "Use implementation='xla', or a JAX with Triton"
        )
        return (
            f"Mosaic GPU compiles the kernel for compute capability 9.0 and newer, got {gpu.name}, "
            f"of {gpu.capability}. {instead}, which compiles it for 8.0 and newer."
        )
    return None


def why_no_small_kernels() -> str | None:
    """Why the kernels beside the decode step cannot be compiled, as a sentence; None: they can.

    Those are the prefill's, those that draw, and those that find log-probabilities: Triton's alone.
    """
    if _is_there("triton"):
        return None
    return (
        f"{_NAMES['triton']} is not part of this version of JAX, and compiles the kernels for "
        "prompts, draws and log-probabilities: XLA does their work. With another JAX they are "
        "faster."
    )


def _is_there(backend: Backend) -> bool:
    """Whether JAX has a backend, which is not imported."""
    try:
        return importlib.util.find_spec(_ROOMS[backend].MODULE) is not None
    except ModuleNotFoundError:  # nor is what it lies in
        return False


def default_backend() -> Backend:
    """Triton, whose kernel is the faster one, where this version of JAX has it."""
    return "triton" if _is_there("triton") else "mosaic_gpu"
