"""Why a decode step cannot run fused: one function, which sees all there is to see.

A reason stands where what it needs is known: the device, dtype and sizes below; how matrices are
cut for a tuning and so many programs, in `stream.planner.why_not`; room in shared memory, in
`StreamPlan.why_no_room`; the backend, in `backends.why_not_backend`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels.backends import Backend, default_backend, why_not_backend
from pallas_kernels.dims import Dims
from pallas_kernels.gpu import CAPABILITIES, INTERPRETER, Gpu
from pallas_kernels.stream.plan import MAX_BATCH
from pallas_kernels.stream.planner import tuned, why_not_on
from pallas_kernels.stream.tuning import Tuning

__all__ = ["HEAD_DIMS", "MAX_BATCH", "why_not"]

HEAD_DIMS = (32, 64, 128, 256)
_MAX_GROUP = 16
_MAX_MODEL_DIM = 16_384


def why_not(
    dims: Dims,
    dtype: Any,
    gpu: Gpu | None,
    *,
    tuning: Tuning | None = None,
    backend: Backend | None = None,
    found: str = "",
) -> str | None:
    """None when the fused kernel can run the step, else a sentence that says why not.

    Args:
        dims: the sizes.
        dtype: dtype of weights and cache.
        gpu: the device, or None when it is not a supported GPU.
        tuning: the kernel's tunables. None: what its table says, or what fits the device.
        backend: that of Pallas which is to compile the kernel; None: what the tuning says, or the
            faster one that there is.
        found: what was found instead of a GPU, for the sentence.
    """
    if (reason := _why_not_sizes(dims, dtype, gpu, found)) is not None:
        return reason
    assert gpu is not None
    tuning = tuning or tuned(dims, gpu)
    if (reason := why_not_on(gpu, dims, tuning)) is not None:
        return reason
    if gpu == INTERPRETER:  # no backend compiles what is interpreted
        return None
    backend = backend or (tuning.backend if tuning is not None else None) or default_backend()
    return why_not_backend(backend, gpu)


def _why_not_sizes(dims: Dims, dtype: Any, gpu: Gpu | None, found: str) -> str | None:
    """Why no plan could run these sizes."""
    d = dims
    if gpu is None:
        return (
            "The fused kernel runs on NVIDIA GPUs of compute capability 8.0 or newer, as far as it "
            f"knows them ({', '.join(CAPABILITIES)}); this is {found or 'another device'}. Use "
            "implementation='xla' here."
        )
    if jnp.dtype(dtype) != jnp.bfloat16:
        return (
            f"The fused kernel reads bfloat16 weights; these are {jnp.dtype(dtype).name}. "
            "Load the model in bfloat16, or use implementation='xla'."
        )
    if d.batch > MAX_BATCH:
        return (
            f"The fused kernel takes 1 to {MAX_BATCH} sequences; there are {d.batch}. "
            "Split the batch, or use implementation='xla'."
        )
    if d.columns > MAX_BATCH:
        return (
            f"The fused kernel takes at most {MAX_BATCH} tokens a step, of all sequences together; "
            f"there are {d.batch} sequences of {d.tokens}. Feed fewer at a time, or use "
            "implementation='xla'."
        )
    if d.head_dim not in HEAD_DIMS:
        return (
            f"The fused kernel's heads have {', '.join(map(str, HEAD_DIMS))} elements; "
            f"these have {d.head_dim}. Make them wider (ffjax.widen_heads), or use "
            "implementation='xla'."
        )
    if d.q_per_kv > _MAX_GROUP:
        return (
            f"The fused kernel shares a key/value head among at most {_MAX_GROUP} query heads; "
            f"here {d.q_per_kv} share one. Use implementation='xla'."
        )
    for what, size in (("model_dim", d.model_dim), ("ffw_dim", d.ffw_dim)):
        if size % 16:
            return (
                f"The fused kernel loads 16 weights at a time: {what} must be a multiple of 16; "
                f"it is {size}. Use implementation='xla'."
            )
    if d.model_dim > _MAX_MODEL_DIM:
        return (
            f"The fused kernel takes a model_dim of at most {_MAX_MODEL_DIM}; it is "
            f"{d.model_dim}. Use implementation='xla'."
        )
    if d.vocab_size < 8:
        return (
            f"The fused kernel computes 8 logits at a time; the vocabulary has {d.vocab_size}. "
            "Use implementation='xla'."
        )
    return None
