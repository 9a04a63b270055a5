"""Which implementation of the prefill runs."""

from __future__ import annotations

from typing import Any, get_args

import jax.numpy as jnp
from jax import Array

from ffjax.decode import Implementation
from ffjax.parts import Parts
from ffjax.prefill.packed import PackedPrefill
from ffjax.prefill.padded import PaddedPrefill
from ffjax.prefill.request import Prefill, RequestPrefill
from ffjax.requests import Request
from ffjax.sampling.rows import Rows, Stages
from pallas_kernels.gpu import Gpu

__all__ = ["Prefill", "prefill_of", "resolve_prefill"]


def resolve_prefill(
    dtype: Any, device: Any, implementation: Implementation | None, prefill: Prefill | None
) -> Prefill:
    """Which prefill will run.

    Args:
        dtype: of the model's weights.
        device: a JAX device.
        implementation: what was asked for as that of the steps. Who names "xla" wants the
            reference all along.
        prefill: a name, or None for the best that can run.

    Raises:
        ValueError: there is no prefill of that name.
        NotImplementedError: the named prefill cannot run here.
    """
    names = get_args(Prefill)
    if prefill is not None and prefill not in names:
        raise ValueError(
            f"prefill is one of {', '.join(map(repr, names))} or None, got {prefill!r}."
        )
    if prefill == "xla" or (prefill is None and implementation == "xla"):
        return "xla"
    reason = _why_not(dtype, device)
    if reason is None:
        return "pallas"
    if prefill is None:
        return "xla"
    raise NotImplementedError(f"{reason} Use prefill='xla'.")


def _why_not(dtype: Any, device: Any) -> str | None:
    if Gpu.of(device) is None:
        found = f"{device.device_kind} ({device.platform})"
        return f"The packed prefill needs an NVIDIA GPU, Ampere or later; this device is {found}."
    if (kind := jnp.dtype(dtype)) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"The packed prefill takes weights of 16 or 32 bits; these are {kind}."
    return None


def prefill_of(
    parts: Parts,
    request: Request,
    capacity: int,
    rows: Rows,
    stages: Stages,
    last: Array,
    implementation: Implementation | None,
    prefill: Prefill | None,
) -> RequestPrefill:
    """The prefill of a request, not yet compiled.

    Args:
        parts: the model.
        request: whose prompts.
        capacity: S, of the cache, which is empty.
        rows: how the first token is chosen.
        stages: likewise.
        last: float32 `[B, D]`, room for what the last layer returns at the end of each prompt;
            overwritten.
        implementation: see `resolve_prefill`.
        prefill: likewise.

    Raises:
        ValueError: see `resolve_prefill`.
        NotImplementedError: likewise.
    """
    name = resolve_prefill(parts.dtype, parts.device, implementation, prefill)
    kind = PackedPrefill if name == "pallas" else PaddedPrefill
    return kind(parts, request.prompts, capacity, rows, stages, last)
