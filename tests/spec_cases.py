"""What tests hold against the executable specification: steps, whatever has run them."""

from __future__ import annotations

import itertools

import jax
import numpy as np
from decode_cases import dims_of, kernel_inputs
from numerics import assert_close

from ffjax.cache import KVCache
from ffjax.decode import DecodeOutput
from pallas_kernels.gpu import INTERPRETER
from pallas_kernels.spec.comparing import compare_head, compare_last_layer
from pallas_kernels.spec.step import step
from pallas_kernels.stream.launch import StepResult
from pallas_kernels.stream.plan import StreamPlan
from pallas_kernels.stream.planner import make_stream_plan

__all__ = ["alone", "check_buffers", "check_specification"]


def alone(model, cache: KVCache, tokens: jax.Array) -> StreamPlan:
    """The plan of an interpreted step of one program, of tokens `[B]` or `[B, T]`."""
    dims = dims_of(model.config, cache.batch, cache.capacity, tokens[0].size)
    return make_stream_plan(dims, INTERPRETER)


def check_buffers(plan: StreamPlan, model, cache: KVCache, tokens: jax.Array, got) -> None:
    """Fails unless every buffer that a step has left, and what it returns, is the specification's.

    Args:
        plan: the step's.
        model: its model.
        cache: as the step found it.
        tokens: int32 `[B]` or `[B, T]`.
        got: logits, token and cache, as the kernel has made them.
    """
    logits, token, after = got
    weights, before = kernel_inputs(model, cache, plan.dims.tokens)
    _, state = kernel_inputs(model, after, plan.dims.tokens)
    columns = plan.dims.columns
    result = StepResult(logits.reshape(columns, -1), token.reshape(-1), state, None)
    last = compare_last_layer(plan, plan, weights, before, tokens.reshape(-1), result)
    differences = itertools.chain(last, compare_head(plan, weights, before, result))
    assert not (found := [str(one) for one in differences]), found


def check_specification(
    plan: StreamPlan,
    model,
    cache: KVCache,
    tokens: jax.Array,
    want: DecodeOutput,
    tolerance: str = "fused_vs_model",
) -> None:
    """Fails unless the specification's step is the reference's, but for rounding."""
    weights, state = kernel_inputs(model, cache, plan.dims.tokens)
    made = step(plan, weights, state, tokens.reshape(-1))
    room = np.isfinite(np.asarray(want.logits)).all(axis=-1)
    logits = made.head["logits"].reshape(want.logits.shape)
    assert np.array_equal(np.isfinite(logits).all(axis=-1), room)
    assert_close(logits[room], want.logits[room], tolerance)
    assert made.head["token"].tolist() == np.argmax(made.head["logits"], axis=-1).tolist()
    assert made.lengths.tolist() == want.cache.lengths.tolist()
    slot = np.arange(cache.capacity) - np.asarray(cache.lengths)[:, None]  # [B, S]
    new = (slot >= 0) & (slot < plan.dims.tokens)
    for name in ("k", "v"):
        arrays = getattr(made, name), getattr(want.cache, name), getattr(cache, name)
        # `[L, B, S, K, H]`
        mine, theirs, old = (np.moveaxis(np.asarray(x, np.float32), 3, 2) for x in arrays)
        assert_close(mine[:, new], theirs[:, new], tolerance)
        assert np.array_equal(mine[:, ~new], old[:, ~new], equal_nan=True)
