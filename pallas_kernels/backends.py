"""Which of Pallas's backends compiles the kernel."""

from __future__ import annotations

import importlib.util
from typing import Literal

from pallas_kernels import mosaic_gpu, triton
from pallas_kernels.gpu import Gpu

__all__ = ["BACKENDS", "Backend", "default_backend", "why_not_backend"]

Backend = Literal["triton", "mosaic_gpu"]

BACKENDS: tuple[Backend, ...] = ("triton", "mosaic_gpu")
_ROOMS = {"triton": triton, "mosaic_gpu": mosaic_gpu}
_NAMES = {"triton": "Pallas's Triton backend", "mosaic_gpu": "Pallas's Mosaic GPU backend"}


def why_not_backend(backend: Backend, gpu: Gpu | None = None) -> str | None:
    """Why a backend cannot compile the kernel here, as a sentence; None: it can.

    Args:
        backend: its name.
        gpu: the device; None: any.
    """
    if not _is_there(_ROOMS[backend].MODULE):
        return (
            f"{_NAMES[backend]} is not part of this version of JAX. Take the other one, or "
            "another JAX."
        )
    if backend == "mosaic_gpu" and gpu is not None and float(gpu.capability) < 9:
        return (
            f"Mosaic GPU compiles the kernel for compute capability 9.0 and newer, got {gpu.name}, "
            f"of {gpu.capability}. Take Triton, which compiles it for 8.0 and newer."
        )
    return None


def _is_there(module: str) -> bool:
    """Whether JAX has a module, which is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is what it lies in
        return False


def default_backend() -> Backend:
    """Triton, whose kernel is the faster one, where this version of JAX has it."""
    return "triton" if why_not_backend("triton") is None else "mosaic_gpu"
