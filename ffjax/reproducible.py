"""XLA's options for programs that compute the same bits in every process."""

from __future__ import annotations

from typing import Any

__all__ = ["SAME_IN_EVERY_PROCESS", "compiler_options"]

# On a GPU, XLA times several ways to compute each matrix product when it compiles, and keeps the
# fastest. Which one that is differs from process to process, and with it the rounding: a greedy
# token that hung on it is another. Without timing, cuBLAS's own heuristic chooses, which knows
# the shapes and the kind of GPU alone. XLA's Triton products are left out because the tiles they
# have without timing suit no shape in particular.
SAME_IN_EVERY_PROCESS: dict[str, Any] = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
}


def compiler_options(device: Any) -> dict[str, Any] | None:
    """What `jax.jit` and `compile` take as `compiler_options` for a program on this device.

    With them, programs give the same bits in every process on one kind of GPU with the same
    versions of JAX and CUDA. A program of your own that is to agree with `ffjax.generate` bit by
    bit needs them too.

    Args:
        device: a JAX device.

    Returns:
        The options; None for other devices than GPUs, which know none of them and time nothing.
    """
    return dict(SAME_IN_EVERY_PROCESS) if device.platform == "gpu" else None
