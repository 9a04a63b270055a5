"""One decode step, by the fused kernel or by the reference: the selector."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.dims import step_dims, step_features, unknown_groups
from ffjax.model import Transformer
from ffjax.rope import inverse_frequencies
from pallas_kernels.dims import DecodeWeights
from pallas_kernels.gpu import INTERPRETER, Gpu
from pallas_kernels.launch import StepState, launch_step
from pallas_kernels.plan import make_plan
from pallas_kernels.stream.launch import stream_step
from pallas_kernels.stream.planner import make_stream_plan, why_not_on
from pallas_kernels.stream.tuning import Tuning, tuning_for
from pallas_kernels.support import why_not

__all__ = [
    "DecodeOutput",
    "Implementation",
    "Kernel",
    "choose_kernel",
    "decode_step",
    "default_device",
    "fused_step",
    "quantized_weights",
    "resolve_implementation",
    "resolve_implementation_config",
    "unsupported_field",
    "why_not_fused",
    "why_not_fused_config",
]

Kernel = Literal["pallas", "pallas_stream"]
Implementation = Literal[Kernel, "xla"]

_log = logging.getLogger("ffjax")

# Fields that the fused kernel takes as they come: names, and what reaches it as numbers or
# frequencies. Two act in local layers alone, and those need a window. Of every other field
# that has a default, it knows the default.
_ANY_VALUE = frozenset(
    {
        *("name", "family", "norm_eps", "tied_embeddings", "max_context"),
        *("rope_theta", "rope_scaling", "rope_theta_local", "window_pattern"),
    }
)


class DecodeOutput(NamedTuple):
    """What a decode step returns.

    The cache comes first so that, when it is donated to a jitted function that
    returns this, its buffers become the new cache and not another output of the
    same shape.

    Attributes:
        cache: the cache, one position longer.
        logits: float32 `[B, V]`.
        token: int32 `[B]`, the greedy choice, the lowest id of equal logits.
    """

    cache: KVCache
    logits: Array
    token: Array


def decode_weights(model: Transformer) -> DecodeWeights:
    """The model's own arrays, as the fused kernels take them: no copy.

    Of quantized matrices these are the integers, and the scales beside them.

    Raises:
        NotImplementedError: they are int4 in groups that no kernel reads.
    """
    config, layers = model.config, model.layers
    if (reason := unknown_groups(config)) is not None:
        raise NotImplementedError(reason)

    def stacked(name: str) -> Array | None:
        param = getattr(layers, name, None)
        return None if param is None else param[...]

    head_scale = getattr(model, "head_scale", None)

    local = None
    if step_features(config).local_rope:
        local = jnp.asarray(inverse_frequencies(config, local=True))
    return DecodeWeights(
        embed=model.embed[...],
        attn_norm=stacked("attn_norm"),
        qkv=layers.qkv[...],
        attn_out=layers.attn_out[...],
        mlp_norm=stacked("mlp_norm"),
        gate_up=layers.gate_up[...],
        down=layers.down[...],
        final_norm=model.final_norm[...],
        head=model.head_weight,
        inv_freq=jnp.asarray(inverse_frequencies(config)),
        inv_freq_local=local,
        qkv_bias=stacked("qkv_bias"),
        q_norm=stacked("q_norm"),
        k_norm=stacked("k_norm"),
        attn_post_norm=stacked("attn_post_norm"),
        mlp_post_norm=stacked("mlp_post_norm"),
        qkv_scale=stacked("qkv_scale"),
        attn_out_scale=stacked("attn_out_scale"),
        gate_up_scale=stacked("gate_up_scale"),
        down_scale=stacked("down_scale"),
        head_scale=None if head_scale is None else head_scale[...],
    )


def quantized_weights(config: ModelConfig, kernel: Kernel) -> str | None:
    """Why a fused kernel cannot read the weights of a model that is quantized; else None.

    Args:
        config: the model's.
        kernel: "pallas", which reads none such, or "pallas_stream", which reads int8, and int4
            in groups of 128.
    """
    if not config.weights.quantized:
        return None
    if kernel == "pallas":
        return (
            f"The phased kernel reads bfloat16 weights; those of {config.name} are quantized "
            f"({config.weights}). Use implementation='pallas_stream' or 'xla', or "
            "ffjax.dequantize(model)."
        )
    return unknown_groups(config)


def unsupported_field(config: ModelConfig) -> str | None:
    """A sentence that names the first field whose value the phased kernel does not know.

    The streamed kernel knows them all.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.default is dataclasses.MISSING or field.name in _ANY_VALUE:
            continue
        if value != field.default:
            return (
                f"The fused kernel does not support {field.name}={value!r} yet. "
                "Use implementation='xla', or 'pallas_stream'."
            )
    return None


def default_device() -> Any:
    """The device a jitted function runs on when its arguments do not say."""
    default = jax.config.jax_default_device
    return default if default is not None and not isinstance(default, str) else jax.devices()[0]


def why_not_fused(
    model: Transformer, batch: int, capacity: int, kernel: Kernel = "pallas"
) -> str | None:
    """Why a fused kernel cannot run this step on the default device; None if it can.

    Args:
        model: the model.
        batch: B.
        capacity: S, slots of the cache.
        kernel: "pallas", the phased kernel, or "pallas_stream", the streamed one.
    """
    return why_not_fused_config(model.config, model.dtype, batch, capacity, kernel)


def why_not_fused_config(
    config: ModelConfig, dtype: Any, batch: int, capacity: int, kernel: Kernel = "pallas"
) -> str | None:
    """What `why_not_fused` says of a model that need not exist: nothing is allocated.

    Args:
        config: the model's.
        dtype: of its weights and cache.
        batch: B.
        capacity: S, slots of the cache.
        kernel: "pallas", the phased kernel, or "pallas_stream", the streamed one.
    """
    device = default_device()
    found = f"{device.device_kind} ({device.platform})"
    return _why_not(config, dtype, batch, capacity, kernel, Gpu.of(device), found)


def _why_not(
    config: ModelConfig,
    dtype: Any,
    batch: int,
    capacity: int,
    kernel: Kernel,
    gpu: Gpu | None,
    found: str = "",
) -> str | None:
    if (reason := quantized_weights(config, kernel)) is not None:
        return reason
    if kernel == "pallas" and (reason := unsupported_field(config)) is not None:
        return reason
    dims = step_dims(config, batch, capacity)
    reason = why_not(dims, dtype, gpu, found)
    if reason is None and kernel == "pallas_stream":
        assert gpu is not None
        reason = why_not_on(gpu, dims)
    return reason


def choose_kernel(
    config: ModelConfig, dtype: Any, batch: int, capacity: int
) -> tuple[Kernel | None, str | None]:
    """The best fused kernel that can run here; or None, and why the best one cannot.

    Args: see `resolve_implementation_config`.
    """
    # The streamed kernel is the faster one; the phased one runs on older GPUs as well.
    kernels: tuple[Kernel, ...] = ("pallas_stream", "pallas")
    reasons = []
    for kernel in kernels:
        reason = why_not_fused_config(config, dtype, batch, capacity, kernel)
        if reason is None:
            return kernel, None
        reasons.append(reason)
    return None, reasons[0]


@functools.lru_cache
def _say_once(message: str) -> None:
    _log.info(message)


def resolve_implementation(
    model: Transformer, cache: KVCache, implementation: Implementation | None = None
) -> Implementation:
    """Which implementation a decode step will use.

    Args:
        model: the model.
        cache: the cache.
        implementation: a name, or None for the best that can run.

    Raises:
        ValueError: the name is unknown.
        NotImplementedError: the named implementation cannot run here; the message
            says why and what to do.
    """
    size = cache.batch, cache.capacity
    return resolve_implementation_config(model.config, model.dtype, *size, implementation)


def resolve_implementation_config(
    config: ModelConfig,
    dtype: Any,
    batch: int,
    capacity: int,
    implementation: Implementation | None = None,
) -> Implementation:
    """What `resolve_implementation` says of a model and a cache that need not exist.

    Args:
        config: the model's.
        dtype: of its weights and cache.
        batch: B.
        capacity: S, slots of the cache.
        implementation: a name, or None for the best that can run.

    Raises:
        ValueError: the name is unknown.
        NotImplementedError: the named implementation cannot run here; the message
            says why and what to do.
    """
    names = get_args(Implementation)
    if implementation is not None and implementation not in names:
        raise ValueError(
            f"implementation is one of {', '.join(map(repr, names))} or None, "
            f"got {implementation!r}."
        )
    if implementation == "xla":
        return "xla"
    if implementation is not None:
        reason = why_not_fused_config(config, dtype, batch, capacity, implementation)
        if reason is not None:
            raise NotImplementedError(reason)
        return implementation
    kernel, reason = choose_kernel(config, dtype, batch, capacity)
    if kernel is not None:
        _say_once(f"decode_step uses {kernel!r}: the fused kernel can run here.")
        return kernel
    _say_once(f"decode_step uses 'xla': {reason}")
    return "xla"


def fused_step(
    model: Transformer,
    cache: KVCache,
    tokens: Array,
    *,
    kernel: Kernel = "pallas",
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> DecodeOutput:
    """A decode step by a fused kernel, whatever the selector would say.

    Args:
        model: the model.
        cache: the cache.
        tokens: int `[B]`.
        kernel: "pallas", the phased kernel, or "pallas_stream", the streamed one.
        tuning: tunables of the streamed kernel. None: what its table says.
        interpret: run the kernel's body on a CPU, with one program, in Pallas's
            interpret mode: slow, for tests of its numerics.

    Raises:
        NotImplementedError: the kernel cannot run here.
    """
    gpu = INTERPRETER if interpret else Gpu.of(default_device())
    reason = _why_not(model.config, model.dtype, cache.batch, cache.capacity, kernel, gpu)
    if reason is not None or gpu is None:
        raise NotImplementedError(reason)
    dims = step_dims(model.config, cache.batch, cache.capacity)
    state = StepState(cache.k, cache.v, cache.lengths, cache.counters)
    step = decode_weights(model), state, tokens.astype(jnp.int32)
    if kernel == "pallas_stream":
        plan = make_stream_plan(dims, gpu, tuning or tuning_for(gpu.name, dims))
        logits, token, state = stream_step(plan, *step, interpret=interpret)
    else:
        logits, token, state = launch_step(make_plan(dims, gpu), *step, interpret=interpret)
    return DecodeOutput(KVCache(*state), logits, token)


def reference_step(model: Transformer, cache: KVCache, tokens: Array) -> DecodeOutput:
    """A decode step by the reference model.

    Args:
        model: the model.
        cache: the cache.
        tokens: int `[B]`.
    """
    tokens = jnp.clip(tokens, 0, model.config.vocab_size - 1)
    logits, cache = model(tokens[:, None], cache)
    logits = logits[:, 0]
    return DecodeOutput(cache, logits, jnp.argmax(logits, axis=-1).astype(jnp.int32))


def decode_step(
    model: Transformer,
    cache: KVCache,
    tokens: Array,
    *,
    implementation: Implementation | None = None,
) -> DecodeOutput:
    """Feeds one token to each sequence; returns logits and greedy choice of the next.

    Call it under `jax.jit` or `nnx.jit`, with the cache donated: the fused kernel then
    updates it in place, and the step is one kernel launch. Token ids outside the
    vocabulary are clamped into it (`generate` refuses them with a sentence). A
    sequence whose cache is full gets NaN logits.

    Args:
        model: the model.
        cache: the cache; each sequence's token goes to position `lengths[b]`.
        tokens: int `[B]`.
        implementation: "pallas_stream", the streamed kernel; "pallas", the phased one; "xla",
            the reference; None: the first of these that can run, said once by logging.

    Returns:
        Cache, logits and greedy token.

    Raises:
        ValueError: the implementation's name is unknown, or the tokens are not `[B]`.
        TypeError: the tokens are no integers, or cache and weights differ in dtype.
        NotImplementedError: the named implementation cannot run here.
    """
    tokens = jnp.asarray(tokens)
    if tokens.shape != (cache.batch,):
        raise ValueError(
            f"A decode step takes one token a sequence, shape [{cache.batch}], got {tokens.shape}."
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"Tokens are integers, got {tokens.dtype}.")
    if cache.k.dtype != model.dtype:
        raise TypeError(f"Cache and weights share a dtype, got {cache.k.dtype} and {model.dtype}.")
    chosen = resolve_implementation(model, cache, implementation)
    if chosen == "xla":
        return reference_step(model, cache, tokens)
    return fused_step(model, cache, tokens, kernel=chosen)
