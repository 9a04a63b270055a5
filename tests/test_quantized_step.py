"""The fused kernel's own body on quantized weights, interpreted, against the reference.

The reference rounds activations, and int4's weights, to bfloat16; the kernel multiplies integers
by the digits of activations and rounds neither. Between them lies what the reference rounds.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import (
    QUICK_COMPILE,
    dims_of,
    filled_cache,
    kernel_inputs,
    random_model,
    random_tokens,
)
from flax import nnx
from numerics import assert_close, relative_error
from quantize_cases import FOR_KERNELS, kernel_config
from spec_cases import alone, check_buffers, check_specification
from step_cases import bits, in_float32, newest, reference
from stream_cases import check, streamed

import checkpoints
from ffjax.cache import KVCache
from ffjax.decode import fused_step
from ffjax.quantization import dequantize, quantize
from pallas_kernels.gpu import INTERPRETER
from pallas_kernels.stream import activations
from pallas_kernels.stream.launch import stream_step
from pallas_kernels.stream.planner import make_stream_plan

pytestmark = [
    pytest.mark.once(
        "test_grouped_step.py shows what a JAX makes of the interpreted kernel with integers."
    ),
    pytest.mark.by_numpy,
    pytest.mark.filterwarnings("error"),
]

CAPACITY = 80
LENGTHS = {1: [65], 3: [65, 0, 79]}
# A compilation takes 10 s: these have every matrix in two formats, and each format once with one
# sequence and once with several.
CASES = [("mixed otherwise", 1), ("mixed", 3)]


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK_COMPILE)
def _interpreted(graph, params, cache, tokens):
    model = nnx.merge(graph, params)
    return fused_step(model, cache, tokens, interpret=True)


def started(model, batch: int) -> tuple[KVCache, jax.Array]:
    """A cache that is NaN where nobody may read, and tokens."""
    config = model.config
    return filled_cache(config, LENGTHS[batch], CAPACITY), random_tokens(config, batch)


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_a_step_matches_the_reference_and_is_closer_to_float32(name, batch):
    model = random_model(kernel_config(FOR_KERNELS[name]))
    cache, tokens = started(model, batch)
    got, want = streamed(model, cache, tokens), reference(model, cache, tokens)
    check(model.config, got, want, LENGTHS[batch])
    plan = alone(model, cache, tokens)
    check_buffers(plan, model, cache, tokens, got)
    check_specification(plan, model, cache, tokens, want)
    assert bits(streamed(model, cache, tokens)) == bits(got)
    exact = reference(dequantize(model, jnp.float32), in_float32(cache), tokens)
    assert_close(got[0], exact.logits, "fused_vs_float32")
    assert relative_error(got[0], exact.logits) < relative_error(want.logits, exact.logits)


def test_a_model_decodes_by_it_whose_head_stays_bfloat16():
    """Through `fused_step`, two steps in a row: the second reads what the first has stored."""
    config = dataclasses.replace(kernel_config(FOR_KERNELS["int8"]), tied_embeddings=True)
    model = random_model(config)
    cache, tokens = started(model, 1)
    want_cache = cache
    for _ in range(2):
        got = _interpreted(*nnx.split(model), cache, tokens)
        want = reference(model, want_cache, tokens)
        assert_close(got.logits, want.logits, "fused_vs_model")
        assert_close(newest(got.cache), newest(want.cache), "fused_vs_model")
        cache, want_cache, tokens = got.cache, want.cache, want.token


def test_trained_weights_match_the_reference():
    """Their rows and groups differ in size, and their activations have outliers."""
    model = quantize(checkpoints.load(checkpoints.SHIPPED_MODEL), "int4")
    cache = filled_cache(model.config, [20], 32, dead=0.0)
    tokens = jnp.array([101], jnp.int32)
    check(model.config, streamed(model, cache, tokens), reference(model, cache, tokens), [20])


# What follows is of the same sizes as above: nothing is compiled once more.


def test_a_row_and_a_group_whose_scale_is_zero_are_zero():
    model = nnx.clone(random_model(kernel_config(FOR_KERNELS["mixed"])))
    layers, last = model.layers, model.config.vocab_size - 1
    attn_out, down, head = (
        vars(module)[f"{name}_scale"]
        for module, name in ((layers, "attn_out"), (layers, "down"), (model, "head"))
    )
    attn_out[...] = attn_out[...].at[:, 3].set(0)
    down[...] = down[...].at[:, 7, 1].set(0)
    head[...] = head[...].at[last].set(0)
    cache, tokens = started(model, 3)
    got = streamed(model, cache, tokens)
    check(model.config, got, reference(model, cache, tokens), LENGTHS[3])
    assert not np.asarray(got[0])[:, last].any()


def test_a_full_cache_gives_nan_in_its_own_row():
    model = random_model(kernel_config(FOR_KERNELS["mixed"]))
    cache = filled_cache(model.config, [66, CAPACITY, 5], CAPACITY)
    tokens = random_tokens(model.config, 3)
    logits, _, after = streamed(model, cache, tokens)
    assert np.isnan(logits).all(axis=1).tolist() == [False, True, False]
    assert np.isfinite(np.asarray(logits)[[0, 2]]).all()
    for new, old in ((after.k, cache.k), (after.v, cache.v)):
        assert bits(new[:, 1]) == bits(old[:, 1])


def test_sequences_of_a_batch_do_not_see_each_other():
    model = random_model(kernel_config(FOR_KERNELS["mixed"]))
    cache, tokens = started(model, 3)
    order = np.array([2, 0, 1])
    shuffled = KVCache(cache.k[:, order], cache.v[:, order], cache.lengths[order], cache.counters)
    logits, _, _ = streamed(model, cache, tokens)
    again, _, _ = streamed(model, shuffled, tokens[order])
    assert bits(again) == bits(logits[order])


def test_activations_that_are_collected_by_the_same_code_are_the_same(monkeypatch):
    """Of wide models, attention's output and hidden activations."""
    config = kernel_config(FOR_KERNELS["int4"], num_layers=1)
    model = random_model(config)
    cache, tokens = started(model, 3)
    plan = make_stream_plan(dims_of(config, 3, CAPACITY), INTERPRETER)
    weights, state = kernel_inputs(model, cache)
    results = []
    for many in (activations._MANY, 1):
        monkeypatch.setattr(activations, "_MANY", many)
        step = functools.partial(stream_step, plan, interpret=True)  # traced anew
        text = str(jax.make_jaxpr(step)(weights, state, tokens))
        step = jax.jit(step, compiler_options=QUICK_COMPILE)
        results.append((step(weights, state, tokens), text))
    (apart, text), (together, other_text) = results
    assert text != other_text
    assert bits(apart) == bits(together)
