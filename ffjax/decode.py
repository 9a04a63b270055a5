"""One decode step, by the fused kernel or by the reference: the selector."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeGuard, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from ffjax.broken import NotFiniteError
from ffjax.cache import KVCache, check_cache
from ffjax.config import ModelConfig
from ffjax.dims import step_dims, step_features
from ffjax.inputs import checked_layers
from ffjax.model import Transformer
from ffjax.rope import inverse_frequencies
from ffjax.said import say_once
from ffjax.settings import own_settings
from ffjax.transforms import launch_whole
from pallas_kernels.backends import Backend
from pallas_kernels.dims import DecodeWeights, Dims
from pallas_kernels.gpu import INTERPRETER, Gpu
from pallas_kernels.launch import StepState
from pallas_kernels.stream.faults import Fault, fault_of
from pallas_kernels.stream.launch import layout_of, stream_step
from pallas_kernels.stream.plan import StreamPlan
from pallas_kernels.stream.planner import make_stream_plan, tuned
from pallas_kernels.stream.tuning import Tuning
from pallas_kernels.support import why_not

__all__ = [
    "FORMER_NAMES",
    "DecodeOutput",
    "Implementation",
    "Kernel",
    "backend_of",
    "choose_kernel",
    "decode_step",
    "default_device",
    "device_of",
    "fused_step",
    "is_fused",
    "resolve_implementation",
    "resolve_implementation_config",
    "step_fault",
    "why_not_fused",
    "why_not_fused_config",
    "why_not_kernel",
]

Kernel = Literal["pallas", "pallas_mosaic_gpu"]
Implementation = Literal[Kernel, "xla"]
# Which of Pallas's backends compiles the kernel; None: the faster one that there is.
_BACKENDS: dict[Kernel, Backend | None] = {"pallas": None, "pallas_mosaic_gpu": "mosaic_gpu"}
# What an implementation was called while there were two kernels.
FORMER_NAMES: dict[str, Implementation] = {"pallas_stream": "pallas"}


def is_fused(implementation: Implementation | None) -> TypeGuard[Kernel]:
    """Whether an implementation is the fused kernel, whatever compiles it."""
    return implementation in _BACKENDS


def backend_of(kernel: Kernel) -> Backend | None:
    """Which of Pallas's backends compiles it; None: the faster one that there is."""
    return _BACKENDS[kernel]


class DecodeOutput(NamedTuple):
    """What a decode step returns.

    The cache comes first so that, when it is donated to a jitted function that
    returns this, its buffers become the new cache and not another output of the
    same shape.

    Attributes:
        cache: the cache, one position longer.
        logits: float32 `[B, V]`; of a step of several tokens `[B, T, V]`.
        token: int32 `[B]`, or `[B, T]`: the greedy choice after each token, the lowest id of equal
            logits. Where a logit is NaN it is that one's, or -1 where the kernel gave up.
        hidden: float32 `[B, n, D]`, or `[B, T, n, D]`: the residual after each of the n layers
            that were asked for, in that order; None if none were. Those of tokens that do not
            count (`live`) are of no use, nor are any where the kernel gave up.
    """

    cache: KVCache
    logits: Array
    token: Array
    hidden: Array | None = None

    def check(self, model: Transformer) -> None:
        """Waits for the step; raises if it chose no token.

        For loops of your own: a jitted step cannot raise, and `ffjax.generate` and `ffjax.stream`
        look by themselves. It reads some numbers a sequence from the device. Sequences whose
        cache is full are left out: their logits are NaN on purpose.

        Args:
            model: whose step it was.

        Raises:
            TypeError: the step is traced, as within jit.
            NotFiniteError: the logits of a sequence are NaN or infinite. Where the kernel gave up
                waiting for a hand-over, the message says in which layer, and for what. The next
                step needs a fresh cache then.
        """
        if isinstance(self.token, Tracer):
            raise TypeError(
                "A step's numbers can be looked at when it has run; got one that is traced. Call "
                "check outside of jit, with what the jitted step returns."
            )
        token, tokens = np.asarray(self.token), 1 if self.token.ndim == 1 else self.token.shape[1]
        index = jnp.maximum(self.token, 0)[..., None]
        chosen = np.asarray(jnp.take_along_axis(self.logits, index, axis=-1)[..., 0])
        wrong = ((token < 0) | ~np.isfinite(chosen)).reshape(len(token), -1).any(axis=1)
        # The cache has grown by one position at least.
        wrong &= np.asarray(self.cache.lengths) + (tokens - 1) <= self.cache.capacity
        if wrong.any():
            fault = step_fault(model, self.cache, tokens)
            raise NotFiniteError(int(wrong.argmax()), None, None if fault is None else str(fault))


def decode_weights(model: Transformer, capacity: int) -> DecodeWeights:
    """The model's own arrays, as the fused kernel takes them: no copy.

    Of quantized matrices these are the integers, and the scales beside them.

    Args:
        model: the model.
        capacity: S, slots of the cache: see `ffjax.rope.inverse_frequencies`.
    """
    config, layers = model.config, model.layers

    def stacked(name: str) -> Array | None:
        param = getattr(layers, name, None)
        return None if param is None else param[...]

    head_scale = getattr(model, "head_scale", None)

    other = None
    if step_features(config).other_rope:
        other = jnp.asarray(inverse_frequencies(config, capacity, other=True))
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
        inv_freq=jnp.asarray(inverse_frequencies(config, capacity)),
        inv_freq_other=other,
        qkv_bias=stacked("qkv_bias"),
        attn_out_bias=stacked("attn_out_bias"),
        gate_up_bias=stacked("gate_up_bias"),
        down_bias=stacked("down_bias"),
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


def default_device() -> Any:
    """The device a jitted function runs on when its arguments do not say."""
    default = jax.config.jax_default_device
    if default is None or isinstance(default, str):  # a string names a platform
        return jax.local_devices(backend=default)[0]
    return default


def device_of(model: Transformer) -> Any:
    """The device a step of this model runs on, as far as it can be known.

    That of the weights. Weights that are traced do not tell theirs: then the default device.
    """
    embed = model.embed[...]
    if isinstance(embed, jax.Array) and not isinstance(embed, Tracer):
        # Of several devices, the first: those of one sharding are of one kind.
        return min(embed.devices(), key=lambda device: device.id)
    return default_device()


def why_not_fused(model: Transformer, batch: int, capacity: int, tokens: int = 1) -> str | None:
    """Why the fused kernel cannot run this step on the model's device; None if it can.

    Args:
        model: the model.
        batch: B.
        capacity: S, slots of the cache.
        tokens: T, of each sequence.
    """
    with jax.default_device(device_of(model)):
        return why_not_fused_config(model.config, model.dtype, batch, capacity, tokens)


def why_not_fused_config(
    config: ModelConfig,
    dtype: Any,
    batch: int,
    capacity: int,
    tokens: int = 1,
    backend: Backend | None = None,
) -> str | None:
    """What `why_not_fused` says of a model that need not exist: nothing is allocated.

    It would run on the default device.

    Args:
        config: the model's.
        dtype: of its weights and cache.
        batch: B.
        capacity: S, slots of the cache.
        tokens: T, of each sequence.
        backend: that of Pallas which is to compile the kernel; None: the faster one that there is.
    """
    device = default_device()
    found = f"{device.device_kind} ({device.platform})"
    sizes = config, dtype, batch, capacity, tokens
    return _why_not(*sizes, Gpu.of(device), backend=backend, found=found)


# Asked anew by every request: with the plan looked at, 0.25 ms of each.
@functools.lru_cache
def _why_not(
    config: ModelConfig,
    dtype: Any,
    batch: int,
    capacity: int,
    tokens: int,
    gpu: Gpu | None,
    *,
    tuning: Tuning | None = None,
    backend: Backend | None = None,
    found: str = "",
) -> str | None:
    dims = step_dims(config, batch, capacity, tokens)
    return why_not(dims, dtype, gpu, tuning=tuning, backend=backend, found=found)


def why_not_kernel(
    kernel: Kernel, config: ModelConfig, dtype: Any, batch: int, capacity: int, tokens: int = 1
) -> str | None:
    """Why the fused kernel, compiled as its name says, cannot run here; None: it can.

    Args: see `resolve_implementation_config`.
    """
    return why_not_fused_config(config, dtype, batch, capacity, tokens, backend_of(kernel))


def choose_kernel(
    config: ModelConfig, dtype: Any, batch: int, capacity: int, tokens: int = 1
) -> tuple[Kernel | None, str | None]:
    """The fused kernel, if it can run here; or None, and why it cannot.

    Args: see `resolve_implementation_config`.
    """
    reason = why_not_fused_config(config, dtype, batch, capacity, tokens)
    return ("pallas", None) if reason is None else (None, reason)


def resolve_implementation(
    model: Transformer,
    cache: KVCache,
    implementation: Implementation | None = None,
    tokens: int = 1,
) -> Implementation:
    """Which implementation a decode step will use.

    Args:
        model: the model.
        cache: the cache.
        implementation: a name, or None for the best that can run.
        tokens: T, of each sequence.

    Raises:
        ValueError: the name is unknown.
        NotImplementedError: the named implementation cannot run here; the message
            says why and what to do.
    """
    size = cache.batch, cache.capacity
    with jax.default_device(device_of(model)):
        return resolve_implementation_config(
            model.config, model.dtype, *size, implementation, tokens
        )


def resolve_implementation_config(
    config: ModelConfig,
    dtype: Any,
    batch: int,
    capacity: int,
    implementation: Implementation | None = None,
    tokens: int = 1,
) -> Implementation:
    """What `resolve_implementation` says of a model and a cache that need not exist.

    Args:
        config: the model's.
        dtype: of its weights and cache.
        batch: B.
        capacity: S, slots of the cache.
        implementation: a name, or None for the best that can run.
        tokens: T, of each sequence.

    Raises:
        ValueError: the name is unknown.
        NotImplementedError: the named implementation cannot run here; the message
            says why and what to do.
    """
    names = get_args(Implementation)
    if implementation in FORMER_NAMES:
        former, implementation = implementation, FORMER_NAMES[implementation]
        warnings.warn(
            f"implementation={former!r} is called {implementation!r} now, and is unknown from the "
            f"next version on: take implementation={implementation!r}.",
            FutureWarning,
            stacklevel=2,
        )
    if implementation is not None and implementation not in names:
        raise ValueError(
            f"implementation is one of {', '.join(map(repr, names))} or None, "
            f"got {implementation!r}."
        )
    if implementation == "xla":
        return "xla"
    if implementation is not None:
        reason = why_not_kernel(implementation, config, dtype, batch, capacity, tokens)
        if reason is not None:
            raise NotImplementedError(reason)
        return implementation
    kernel, reason = choose_kernel(config, dtype, batch, capacity, tokens)
    if kernel is not None:
        say_once(f"decode_step uses {kernel!r}: the fused kernel can run here.")
        return kernel
    say_once(f"decode_step uses 'xla': {reason}")
    return "xla"


def _checked(model: Transformer, cache: KVCache, tokens: Any) -> Array:
    """The tokens int `[B]` or `[B, T]` of a step whose inputs fit together."""
    check_cache(cache, model.config, model.dtype)
    tokens = jnp.asarray(tokens)
    if tokens.ndim > 1 and jnp.issubdtype(tokens.dtype, jnp.floating):
        raise TypeError(
            f"A decode step takes token ids, not embeddings, got {tokens.dtype} of shape "
            f"{list(tokens.shape)}. Feed embeddings by model.last_hidden_state(embeddings, cache): "
            "steps go on from the cache that it returns."
        )
    if tokens.shape[:1] != (cache.batch,) or tokens.ndim > 2 or not tokens.size:
        raise ValueError(
            f"A decode step takes one token a sequence, shape [{cache.batch}], or several, "
            f"[{cache.batch}, T]; got {list(tokens.shape)}."
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"Tokens are integers, got {tokens.dtype}.")
    return tokens


def _tokens_each(tokens: Array) -> int:
    """T of a step's tokens `[B]` or `[B, T]`."""
    return 1 if tokens.ndim == 1 else tokens.shape[1]


def _checked_live(live: Any, tokens: Array) -> Array | None:
    """How many of each sequence's tokens count, int32 `[B]`; None if all do."""
    if live is None:
        return None
    live = jnp.asarray(live)
    if live.shape != tokens.shape[:1]:
        raise ValueError(
            f"live says of each sequence how many of its tokens count, shape [{tokens.shape[0]}]; "
            f"got {list(live.shape)}."
        )
    if not jnp.issubdtype(live.dtype, jnp.integer):
        raise TypeError(f"live counts tokens: integers, got {live.dtype}.")
    return jnp.clip(live, 0, _tokens_each(tokens)).astype(jnp.int32)


def _stream_plan(dims: Dims, gpu: Gpu, tuning: Tuning | None = None) -> StreamPlan:
    return make_stream_plan(dims, gpu, tuning or tuned(dims, gpu))


def step_fault(model: Transformer, cache: KVCache, tokens: int = 1) -> Fault | None:
    """What a fused step that gave up waiting left in the cache; None if none did.

    Args:
        model: the model.
        cache: the cache, as a step with the plan of this model and its device left it.
        tokens: T, that the step took of each sequence.
    """
    gpu = Gpu.of(device_of(model))
    if gpu is None:
        return None
    plan = _stream_plan(step_dims(model.config, cache.batch, cache.capacity, tokens), gpu)
    layout, counters = layout_of(plan), cache.counters if tokens == 1 else cache.wide_counters
    if counters is None:
        return None
    return fault_of(plan, np.asarray(counters[layout.fault : layout.fault + 2]), layout)


def fused_step(
    model: Transformer,
    cache: KVCache,
    tokens: Array,
    live: Array | None = None,
    *,
    hidden_layers: Sequence[int] = (),
    tuning: Tuning | None = None,
    backend: Backend | None = None,
    interpret: bool = False,
) -> DecodeOutput:
    """A decode step by the fused kernel, whatever the selector would say.

    Args:
        model: the model.
        cache: the cache.
        tokens: int `[B]`, or `[B, T]` with a cache made for as many.
        live: how many tokens of each sequence count: see `decode_step`.
        hidden_layers: whose hidden states to return: see `decode_step`.
        tuning: the kernel's tunables. None: what its table says, or what fits the device.
        backend: that of Pallas which compiles the kernel, "triton" or "mosaic_gpu"; None: what the
            tuning says, or the faster one that there is.
        interpret: run the kernel's body on a CPU, with one program, in Pallas's
            interpret mode: slow, for tests of its numerics.

    Raises:
        ValueError: the cache is another model's or not for steps of so many tokens, a length is
            negative, or the tokens are not `[B]` or `[B, T]`.
        TypeError: the tokens are no integers, or the cache has other dtypes.
        NotImplementedError: the kernel cannot run here, or a transformation asks for what a
            kernel has not: a derivative.
    """
    tokens = _checked(model, cache, tokens)
    live, each = _checked_live(live, tokens), _tokens_each(tokens)
    layers = checked_layers(hidden_layers, model.config, some=False)
    gpu = INTERPRETER if interpret else Gpu.of(device_of(model))
    sizes = model.config, model.dtype, cache.batch, cache.capacity, each
    reason = _why_not(*sizes, gpu, tuning=tuning, backend=backend)
    if reason is not None or gpu is None:
        raise NotImplementedError(reason)
    check_cache(cache, model.config, model.dtype, each)
    dims = step_dims(model.config, cache.batch, cache.capacity, each)
    name = "counters" if each == 1 else "wide_counters"
    state = StepState(cache.k, cache.v, cache.lengths, getattr(cache, name))
    step = decode_weights(model, cache.capacity), state, tokens.astype(jnp.int32).reshape(-1)
    plan = _stream_plan(dims, gpu, tuning)
    if backend is not None:
        plan = plan.compiled_by(backend)
    launch = functools.partial(stream_step, plan, hidden_layers=layers, interpret=interpret)
    logits, token, state, hidden = launch_whole(launch, *step)
    lengths = state.lengths if live is None else jnp.maximum(cache.lengths, 0) + live
    made = {"k": state.k, "v": state.v, "lengths": lengths, name: state.counters}
    logits, token = logits.reshape(*tokens.shape, -1), token.reshape(tokens.shape)
    if hidden is not None:
        hidden = hidden.reshape(*tokens.shape, *hidden.shape[1:])
    return DecodeOutput(dataclasses.replace(cache, **made), logits, token, hidden)


def reference_step(
    model: Transformer,
    cache: KVCache,
    tokens: Array,
    live: Array | None = None,
    *,
    hidden_layers: Sequence[int] = (),
) -> DecodeOutput:
    """A decode step by the reference model.

    Args:
        model: the model.
        cache: the cache.
        tokens: int `[B]` or `[B, T]`.
        live: how many tokens of each sequence count: see `decode_step`.
        hidden_layers: whose hidden states to return: see `decode_step`.

    Raises:
        ValueError: the cache is another model's, a length is negative, the tokens are not `[B]` or
            `[B, T]`, or a layer is not one of the model's.
        TypeError: the tokens or layers are no integers, or the cache has other dtypes.
    """
    tokens = _checked(model, cache, tokens)
    live = _checked_live(live, tokens)
    layers = checked_layers(hidden_layers, model.config, some=False)
    tokens = jnp.clip(tokens, 0, model.config.vocab_size - 1)
    cache = dataclasses.replace(cache, lengths=jnp.maximum(cache.lengths, 0))
    before = cache.lengths
    rows, hidden = tokens.reshape(len(tokens), -1), None
    if layers:
        last = model.config.num_layers  # after it stands what logits are made of
        seen = layers if last in layers else (*layers, last)
        hidden, cache = model.hidden_states(rows, cache, layers=seen)
        logits = model.logits_of(hidden[:, :, seen.index(last)])
        hidden = hidden[:, :, : len(layers)].reshape(*tokens.shape, len(layers), -1)
    else:
        logits, cache = model(rows, cache)
    logits = logits.reshape(*tokens.shape, -1)
    if live is not None:
        cache = dataclasses.replace(cache, lengths=before + live)
    return DecodeOutput(cache, logits, jnp.argmax(logits, axis=-1).astype(jnp.int32), hidden)


@own_settings()
def decode_step(
    model: Transformer,
    cache: KVCache,
    tokens: Array,
    live: Array | None = None,
    *,
    hidden_layers: Sequence[int] = (),
    implementation: Implementation | None = None,
) -> DecodeOutput:
    """Feeds one token to each sequence, or T; returns logits and greedy choice of the next.

    Of several tokens each sees those before it, as if they had been fed one by one, and has logits
    of its own. The step reads the weights once for all of them. With `live`, so many of each
    sequence's count, from the first on: its length grows by as many, and what the others left in
    the cache is overwritten by the next step. A sequence's length can be set back as well, by
    `dataclasses.replace(cache, lengths=...)`: nothing is copied. A fused step takes up to 8 tokens,
    of all sequences together, and a cache that was made for T (`KVCache.create(..., tokens=T)`).

    Call it under `jax.jit` or `nnx.jit`, with the cache donated: the fused kernel then
    updates it in place, and the step is one kernel launch. Token ids outside the
    vocabulary are clamped into it (`generate` refuses them with a sentence). A
    sequence whose cache is full gets NaN logits; one whose length is negative counts as empty.
    NaN in weights or activations gives NaN logits, and so does the kernel where its programs wait
    for each other in vain: `DecodeOutput.check` says which. (A copy of weights that never comes
    ends the process.)

    Under `jax.vmap` the instances of a fused step run one after another, each as a launch of
    its own that copies the instance's cache in and out; a batch is the fast way. Of a fused
    step there is no derivative. Within `jax.shard_map(..., check_vma=False)` and `jax.pmap`
    every device runs the step of its own arrays; arrays that are sharded otherwise are first
    gathered by XLA on every device, each of which then runs the whole step.

    The kernel's plan is made for the device of the weights. Traced weights do not tell theirs:
    the plan is then made for JAX's default device, which `jax.default_device` sets. That
    matters only where GPUs of different kinds are side by side.

    Args:
        model: the model.
        cache: the cache; each sequence's first token goes to position `lengths[b]`.
        tokens: int `[B]`, or `[B, T]`.
        live: int `[B]`, 0 to T; None: all count.
        hidden_layers: n layers whose hidden states are returned too, each once, in any order, as
            a draft head takes them: l is the residual after layer l, 1 to L, and 0 the embedding
            (see `Transformer.hidden_states`). They are static under jit.
        implementation: "pallas", the fused kernel; "pallas_mosaic_gpu", the same compiled by
            Pallas's Mosaic GPU backend and not by Triton; "xla", the reference; None: "pallas"
            where it can run, else "xla", said once by logging.

    Returns:
        Cache, logits, greedy token, and the hidden states that were asked for.

    Raises:
        ValueError: the implementation's name is unknown, the tokens are not `[B]` or `[B, T]`, the
            cache is another model's or not for fused steps of T tokens, a layer is not among 0 to
            L or named twice, or, where it is no tracer, a length is negative.
        TypeError: the tokens are no integers (embeddings go into `Transformer.last_hidden_state`),
            or the cache has other dtypes.
        NotImplementedError: the named implementation cannot run here; a fused step is asked
            for a derivative.
    """
    tokens = _checked(model, cache, tokens)
    chosen = resolve_implementation(model, cache, implementation, _tokens_each(tokens))
    if chosen == "xla":
        return reference_step(model, cache, tokens, live, hidden_layers=hidden_layers)
    backend = backend_of(chosen)
    return fused_step(model, cache, tokens, live, hidden_layers=hidden_layers, backend=backend)
