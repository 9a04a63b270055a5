"""Which of Pallas's backends compiles the kernel."""

from __future__ import annotations

import importlib.util
from typing import Literal

__all__ = ["BACKENDS", "Backend", "default_backend", "why_not_backend"]

Backend = Literal["triton", "mosaic_gpu"]

BACKENDS: tuple[Backend, ...] = ("triton", "mosaic_gpu")
_MODULES = {
    "triton": "jax._src.pallas.triton",
    "mosaic_gpu": "jax._src.pallas.mosaic_gpu",
}
_NAMES = {"triton": "Pallas's Triton backend", "mosaic_gpu": "Pallas's Mosaic GPU backend"}


def why_not_backend(backend: Backend, capability: tuple[int, int] | None = None) -> str | None:
    """Why a backend cannot compile the kernel here, as a sentence; None: it can.

    Args:
        backend: its name.
        capability: of the GPU, as (9, 0); None: not known.
    """
    if importlib.util.find_spec(_MODULES[backend]) is None:
        return (
            f"{_NAMES[backend]} is not part of this version of JAX. Take the other one, or "
            "another JAX."
        )
    if backend == "mosaic_gpu" and capability is not None and capability < (9, 0):
        return (
            f"The kernel is compiled by Mosaic GPU for compute capability 9.0 and newer, got "
            f"{capability[0]}.{capability[1]}. Take the Triton backend."
        )
    return None


def default_backend() -> Backend:
    """Triton, whose kernel is the faster one, where this version of JAX has it."""
    return "triton" if why_not_backend("triton") is None else "mosaic_gpu"
