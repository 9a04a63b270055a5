"""Which implementation of the prefill runs."""

from __future__ import annotations

from typing import Any, get_args

import jax.numpy as jnp
from jax import Array

from ffjax.decode import Implementation, why_not_fused_config
from ffjax.parts import Parts
from ffjax.prefill.packed import PackedPrefill
from ffjax.prefill.padded import PaddedPrefill
from ffjax.prefill.request import Prefill, RequestPrefill
from ffjax.prefill.stepwise import StepwisePrefill, step_tokens
from ffjax.requests import Request
from ffjax.said import say_once
from ffjax.sampling.rows import Rows, Stages
from pallas_kernels.backends import why_no_small_kernels
from pallas_kernels.gpu import Gpu

__all__ = ["Prefill", "prefill_of", "resolve_prefill", "resolve_prefill_of"]


def resolve_prefill(
    dtype: Any, device: Any, implementation: Implementation | None, prefill: Prefill | None
) -> Prefill:
    """Which prefill will run of sequences that come and go.

    Args:
        dtype: of the model's weights.
        device: a JAX device.
        implementation: what was asked for as that of the steps. Who names "xla" wants the
            reference all along.
        prefill: a name, or None for the best that can run.

    Raises:
        ValueError: there is no prefill of that name, or it takes whole requests alone.
        NotImplementedError: the named prefill cannot run here.
    """
    _check_name(prefill)
    if prefill == "steps":
        raise ValueError(
            "prefill='steps' feeds the prompts of one request; where sequences come and go, take "
            "'pallas', 'xla' or None."
        )
    if prefill == "xla" or (prefill is None and implementation == "xla"):
        return "xla"
    reason = _why_not(dtype, device)
    if reason is None and (reason := why_no_small_kernels()) is not None and prefill is None:
        say_once(reason)
    if reason is None:
        return "pallas"
    if prefill is None:
        return "xla"
    raise NotImplementedError(f"{reason} Use prefill='xla'.")


def _check_name(prefill: Prefill | None) -> None:
    names = get_args(Prefill)
    if prefill is not None and prefill not in names:
        raise ValueError(
            f"prefill is one of {', '.join(map(repr, names))} or None, got {prefill!r}."
        )


def resolve_prefill_of(
    parts: Parts,
    request: Request,
    capacity: int,
    implementation: Implementation | None,
    prefill: Prefill | None,
    *,
    steps: bool = True,
) -> Prefill:
    """Which prefill a request will have.

    Args:
        parts: the model.
        request: whose prompts.
        capacity: S.
        implementation: what was asked for as that of the steps; see `resolve_prefill`.
        prefill: a name, or None for the best that can run: "steps" has to be asked for, since it
            compiles another decode step.
        steps: whether the cache can be made for its steps.

    Raises:
        ValueError: there is no prefill of that name, or a cache for other steps is wanted.
        NotImplementedError: the named prefill cannot run here.
    """
    _check_name(prefill)
    if prefill == "steps" and not steps:
        raise ValueError(
            f"prefill='steps' takes steps of {step_tokens(request.batch)} tokens of each prompt; "
            "speculation asks for others. Leave prefill out, or the number of its tokens."
        )
    if prefill != "steps":
        return resolve_prefill(parts.dtype, parts.device, implementation, prefill)
    tokens, config = step_tokens(request.batch), parts.config
    reason = why_not_fused_config(config, parts.dtype, request.batch, capacity, tokens)
    if reason is not None:
        raise NotImplementedError(reason)
    return "steps"


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
    name: Prefill,
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
        name: which, as `resolve_prefill_of` says.
    """
    kinds: dict[Prefill, type[PackedPrefill | PaddedPrefill | StepwisePrefill]] = {
        "pallas": PackedPrefill,
        "steps": StepwisePrefill,
        "xla": PaddedPrefill,
    }
    return kinds[name](parts, request.prompts, capacity, rows, stages, last)
