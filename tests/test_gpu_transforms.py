"""On a GPU: a step under vmap, where each instance must read its own cache, and odd lengths."""

from __future__ import annotations

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import filled_cache, random_model, random_tokens, small_config
from flax import nnx
from test_gpu import maps_begin

from ffjax.decode import Kernel, decode_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("error", "ignore:The Pallas Triton backend:DeprecationWarning"),
]

CONFIG = small_config(num_layers=8)
CAPACITY = 64
every_kernel = pytest.mark.parametrize("kernel", get_args(Kernel))


@functools.cache
def split(seed: int = 0):
    return nnx.split(random_model(CONFIG, seed))


@functools.cache
def step_of(kernel: Kernel):
    """A step; its cache's counters without the tensor maps, which say where the cache lies."""
    graph, _ = split()

    def step(params, cache, tokens):
        model = nnx.merge(graph, params)
        out = decode_step(model, cache, tokens, implementation=kernel)
        counters = out.cache.counters[: maps_begin(CONFIG, cache.batch, CAPACITY)]
        return out._replace(cache=dataclasses.replace(out.cache, counters=counters))

    return step


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def assert_same(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@every_kernel
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("weights", ["shared", "own"])
def test_each_instance_of_vmap_reads_its_own(kernel, batch, weights):
    params = [split(i if weights == "own" else 0)[1] for i in range(3)]
    caches = [filled_cache(CONFIG, [5 * i + b for b in range(batch)], CAPACITY) for i in range(3)]
    tokens = [random_tokens(CONFIG, batch, i) for i in range(3)]
    alone = jax.jit(step_of(kernel))
    want = stacked([alone(*each) for each in zip(params, caches, tokens, strict=True)])
    assert np.isfinite(want.logits).all()
    together = stacked(caches), stacked(tokens)
    if weights == "own":
        got = jax.jit(jax.vmap(step_of(kernel)))(stacked(params), *together)
    else:
        got = jax.jit(jax.vmap(step_of(kernel), (None, 0, 0)))(params[0], *together)
    assert_same(got, want)


@every_kernel
def test_a_negative_length_counts_as_none(kernel):
    (_, params), tokens = split(), random_tokens(CONFIG, 2)
    step = jax.jit(step_of(kernel))
    cache = filled_cache(CONFIG, [0, 9], CAPACITY)
    want = step(params, cache, tokens)
    odd = dataclasses.replace(cache, lengths=jnp.array([-1, 9], jnp.int32))
    got = step(params, odd, tokens)
    assert_same((got.logits, got.token), (want.logits, want.token))
    assert_same((got.cache.k, got.cache.v), (want.cache.k, want.cache.v))
