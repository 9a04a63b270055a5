"""Steps compiled by Mosaic GPU in the programs around them, lowered for an H200."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from decode_cases import dims_of, random_model, small_config
from flax import nnx
from ptx_inline import lower_for_gpu

from ffjax import decode
from ffjax.cache import KVCache
from ffjax.decode import decode_step
from ffjax.transforms import NO_DERIVATIVE
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.targets import target

CONFIG = small_config(head_dim=32)


@pytest.fixture(autouse=True)
def on_an_h200(monkeypatch):
    monkeypatch.setattr(decode.Gpu, "of", lambda device: target("h200").gpu)


def parts():
    graph, params = nnx.split(random_model(CONFIG))
    cache = jax.eval_shape(lambda: KVCache.create(CONFIG, 2, 64))
    return graph, params, cache, jax.ShapeDtypeStruct((2,), jnp.int32)


def step(graph, params, cache, tokens):
    model = nnx.merge(graph, params)
    return decode_step(model, cache, tokens, implementation="pallas_mosaic_gpu")


def alone(graph, params, cache, tokens):
    return step(graph, params, cache, tokens)


def in_a_scan(graph, params, cache, tokens):
    def one(carry, _):
        out = step(graph, params, *carry)
        return (out.cache, out.token), out.token

    return jax.lax.scan(one, (cache, tokens), length=3)


def in_a_loop(graph, params, cache, tokens):
    def one(carry):
        out = step(graph, params, *carry[:2])
        return out.cache, out.token, carry[2] + 1

    return jax.lax.while_loop(lambda c: c[2] < 3, one, (cache, tokens, 0))


def in_a_branch(graph, params, cache, tokens):
    def one(cache):
        out = step(graph, params, cache, tokens)
        return out.cache, out.token

    return jax.lax.cond(tokens[0] > 0, one, lambda cache: (cache, tokens), cache)


def of_instances(graph, params, cache, tokens):
    caches = jax.tree.map(lambda x: jnp.stack([x, x]), cache)
    both = jnp.stack([tokens, tokens])
    return jax.vmap(functools.partial(step, graph, params))(caches, both)


@pytest.mark.parametrize("program", [alone, in_a_scan, in_a_loop, in_a_branch, of_instances])
def test_a_step_is_lowered_within(program):
    graph, *arrays = parts()
    lower_for_gpu(functools.partial(program, graph), *arrays)


def test_no_ref_is_left_to_those_around():
    """A caller's derivatives and batching take none within."""
    graph, *arrays = parts()
    made = jax.make_jaxpr(functools.partial(alone, graph))(*arrays)
    assert not made.jaxpr.effects
    assert "ref_new" not in str(made) and "new_ref" not in str(made)


def test_a_derivative_is_refused():
    graph, params, cache, tokens = parts()
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)

    def loss(weights):
        return step(graph, weights, cache, jnp.zeros(tokens.shape, jnp.int32)).logits.sum()

    with pytest.raises(NotImplementedError, match=re.escape(NO_DERIVATIVE)):
        jax.grad(loss, allow_int=True)(params)


def test_an_older_gpu_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(decode.Gpu, "of", lambda device: target("a100").gpu)
    graph, params, cache, tokens = parts()
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
    with pytest.raises(NotImplementedError, match=r"9.0 and newer, got .*A100.*, of 8.0"):
        step(graph, params, cache, jnp.zeros(tokens.shape, jnp.int32))


def test_a_plan_for_another_backend_is_the_same_plan():
    gpu = target("h200").gpu
    plan = make_stream_plan(dims_of(CONFIG, 2, 64), gpu)
    other = plan.compiled_by("mosaic_gpu")
    assert (plan.backend, other.backend) == ("triton", "mosaic_gpu")
    assert dataclasses.replace(other, tuning=plan.tuning) == plan
