"""Runs a case by the kernel and by the reference, on the same tokens, and says what differs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from as_if import take_device_for
from flax import nnx
from jax import Array, lax
from numerics import TOLERANCES, relative_error, worst_error

from ffjax.cache import KVCache
from ffjax.decode import DecodeOutput, default_device, fused_step, reference_step
from ffjax.quantization import dequantize
from pallas_kernels.gpu import INTERPRETER, Gpu
from pallas_kernels.stream.exchange_layout import exchange_words
from pallas_kernels.stream.launch import layout_of
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.stream.tuning import tuning_for
from pallas_kernels.support import why_not

from .aged import aged_counters, poison_of
from .draw import STEPS, Case
from .models import cache_of, live_of, model_of, tokens_of

__all__ = ["Ran", "Refused", "StepFunction", "check_case", "kernel_step"]

# A model, a cache, and tokens `[B]`; or tokens `[B, T]`, and how many of each sequence's count.
StepFunction = Callable[..., DecodeOutput]

take_device_for()

# The reference runs a few times: what makes it fast would take longer than it saves.
_QUICK = {"xla_backend_optimization_level": 0}
_QUICK_ON_GPU = {"xla_backend_optimization_level": 1, "xla_gpu_autotune_level": 0}
_NEAR, _EXACT = TOLERANCES["fused_vs_model_deep"], TOLERANCES["fused_vs_float32"]


class Refused(Exception):
    """The kernel says why it does not run the case."""


class Ran(NamedTuple):
    """What some steps made, on the host.

    Of several tokens, B stands for B, T, and the counters are those of wide steps.
    """

    logits: np.ndarray  # float32 [steps, B, V]
    tokens: np.ndarray  # int32 [steps, B]
    keys: np.ndarray
    values: np.ndarray
    lengths: np.ndarray
    counters: np.ndarray

    @property
    def bits(self) -> dict[str, bytes]:
        """What must be the same in every run."""
        return {name: x.tobytes() for name, x in self._asdict().items() if name != "counters"}

    def new(self, spans: list[slice]) -> np.ndarray:
        """Keys and values of the new positions that there is room for: float32 `[rows, K * H]`."""
        rows = []
        for b, span in enumerate(spans):
            for x in (self.keys, self.values):
                some = x[:, b, :, span].astype(np.float32)  # [L, K, positions, H]
                rows.append(some.transpose(0, 2, 1, 3).reshape(-1, some.shape[1] * some.shape[3]))
        return np.concatenate(rows)

    def old(self, spans: list[slice]) -> list[bytes]:
        """What no step may touch."""
        left = []
        for x in (self.keys, self.values):
            x = x.copy()
            for b, span in enumerate(spans):
                x[:, b, :, span] = 0
            left.append(x.tobytes())
        return left


def _positions(case: Case) -> np.ndarray:
    """Of the first token of each sequence in each step, and after the last: `[STEPS + 1, B]`."""
    grown = np.cumsum(live_of(case), axis=0)
    return np.array(case.lengths) + np.concatenate([np.zeros_like(grown[:1]), grown])


def _spans(case: Case) -> list[slice]:
    """The positions of each sequence that the steps write, also for tokens that do not count."""
    end = _positions(case)[-2] + case.tokens
    return [slice(*some) for some in zip(case.lengths, end.tolist(), strict=True)]


def kernel_step(case: Case, interpret: bool = False) -> StepFunction:
    """The fused kernel's step."""
    return functools.partial(fused_step, tuning=case.tuned, interpret=interpret)


def _stepping(step: StepFunction, graph: Any, options: dict[str, Any]) -> Callable[..., Any]:
    """A jitted function that feeds what `_fed` has, and between steps changes the counters."""

    @functools.partial(jax.jit, compiler_options=options)
    def run(params: Any, cache: KVCache, fed: list[Array], keep: Array, put: Array):
        model = nnx.merge(graph, params)
        name = "counters" if len(fed) == 1 else "wide_counters"

        def one(cache: KVCache, fed: list[Array]):
            counters = getattr(cache, name) & keep | put
            out = step(model, dataclasses.replace(cache, **{name: counters}), *fed)
            return out.cache, (out.logits, out.token)

        cache, (logits, made) = lax.scan(one, cache, fed)
        return logits, made, cache.k, cache.v, cache.lengths, getattr(cache, name)

    return run


def _fed(case: Case) -> list[Array]:
    """What each step is given besides model and cache."""
    if case.tokens == 1:
        return [tokens_of(case)]
    return [tokens_of(case), jnp.asarray(live_of(case))]


def _left_alone(words: int) -> tuple[np.ndarray, np.ndarray]:
    """What keeps all words of the counters as they are."""
    return np.full(words, -1, np.int32), np.zeros(words, np.int32)


def _on_host(made: Any) -> Ran:
    return Ran(*(np.asarray(x) for x in made))


def _plan(case: Case, gpu: Gpu | None):
    """The step's plan.

    Raises:
        Refused: there is none.
    """
    dims = case.dims
    tuning = case.tuned or (None if gpu is None else tuning_for(gpu.name, dims))
    if (reason := why_not(dims, jnp.bfloat16, gpu, tuning=tuning)) is not None:
        raise Refused(reason)
    assert gpu is not None
    return make_stream_plan(dims, gpu, tuning)


def check_case(case: Case, step: StepFunction | None = None, gpu: Gpu | None = None) -> str | None:
    """What is wrong with a case's steps, as a sentence; None if nothing is.

    Args:
        case: what to run.
        step: what is compared with the reference, instead of the kernel on the default device.
        gpu: the device that the plan is made for, instead of the default one.

    Raises:
        Refused: the kernel does not run such a case.
    """
    gpu = gpu or Gpu.of(default_device())
    plan = _plan(case, gpu)
    layout, words = layout_of(plan), exchange_words(case.dims)
    before = [max(length - case.tokens, 0) for length in case.lengths]
    counters = aged_counters(plan, layout, case.step, words, before)
    poison = poison_of(plan, layout, words)
    graph, params = model_of(case)
    cache, fed = cache_of(case, counters), _fed(case)
    start = _on_host((np.zeros(0), np.zeros(0), cache.k, cache.v, cache.lengths, counters))
    options = {} if gpu != INTERPRETER else _QUICK
    run = _stepping(step or kernel_step(case), graph, options)
    got = _on_host(run(params, cache, fed, *_left_alone(words)))
    # Words that say nothing between steps must make no difference.
    again = _on_host(run(params, cache, fed, poison.keep, poison.set))
    if differing := [name for name, x in got.bits.items() if again.bits[name] != x]:
        return f"Two runs from the same start differ in {', '.join(differing)}."
    if (wrong := _bookkeeping(case, start, got, layout.steps)) is not None:
        return wrong
    return _numbers(case, graph, params, cache, fed, got)


def _bookkeeping(case: Case, start: Ran, got: Ran, steps: int) -> str | None:
    """What of a step is no question of rounding."""
    if got.lengths.tolist() != _positions(case)[-1].tolist():
        return f"Lengths are {got.lengths.tolist()} after {STEPS} steps from {case.lengths}."
    spans = _spans(case)
    if got.old(spans) != start.old(spans):
        return "The steps changed other positions of the cache than the new ones."
    counted = (int(got.counters[steps]) - case.step) % 2**32
    if counted != STEPS:
        return f"The cache counted {counted} steps instead of {STEPS}."
    known = np.isfinite(got.logits).all(axis=-1)
    if (got.logits.argmax(axis=-1) != got.tokens)[known].any():
        return "A token is not that of the largest logit."
    return None


def _numbers(case: Case, graph: Any, params: Any, cache: KVCache, fed: list[Array], got: Ran):
    """Whether logits, keys and values are near enough to the reference's."""
    plain, spans = _left_alone(len(got.counters)), _spans(case)
    options = _QUICK_ON_GPU if default_device().platform == "gpu" else _QUICK
    want = _on_host(_stepping(reference_step, graph, options)(params, cache, fed, *plain))
    position = _positions(case)[:-1, :, None] + np.arange(case.tokens)
    room = (position < case.capacity).reshape(got.tokens.shape)
    pairs = {
        "logits": (got.logits[room], want.logits[room]),
        "new keys and values": (got.new(spans), want.new(spans)),
    }
    if not np.isnan(got.logits[~room]).all():
        return "A token that the cache has no room for has logits."
    far = {
        name: relative_error(*pair)
        for name, pair in pairs.items()
        if pair[1].size and not _near(*pair)
    }
    if not far:
        return None
    # Deep models of random weights may magnify roundings: what is further from float32 is at fault.
    model = dequantize(nnx.merge(graph, params), jnp.float32)
    graph, params = nnx.split(model)
    stored = {name: getattr(cache, name).astype(jnp.float32) for name in ("k", "v")}
    wide = dataclasses.replace(cache, **stored)
    exact = _on_host(_stepping(reference_step, graph, options)(params, wide, fed, *plain))
    truth = {"logits": exact.logits[room], "new keys and values": exact.new(spans)}
    for name, error in far.items():
        ours, theirs = (relative_error(x, truth[name]) for x in pairs[name])
        if not np.isfinite(ours) or ours > 2 * theirs + _EXACT.relative:
            return (
                f"The {name} are off by {error:.3g} of their norm, by {ours:.3g} from float32's; "
                f"the bfloat16 reference's by {theirs:.3g}."
            )
    return None


def _near(got: np.ndarray, want: np.ndarray) -> bool:
    return relative_error(got, want) <= _NEAR.relative and worst_error(got, want) <= _NEAR.worst
