"""Hidden states of chosen layers, from the model and from a step, fused or not."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import reference_cases as cases
from decode_cases import (
    QUICK_COMPILE,
    dims_of,
    filled_cache,
    kernel_inputs,
    random_model,
    small_config,
)
from flax import nnx
from numerics import assert_close
from step_cases import bits
from stream_cases import FAMILIES, machine

from ffjax.cache import KVCache
from ffjax.decode import DecodeOutput, decode_step, fused_step, reference_step
from pallas_kernels.stream.launch import run_stream
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.stream.stages import run_stage, state_shapes, told

pytestmark = [
    pytest.mark.once(
        "A sample of shapes shows what a JAX makes of the interpreted kernel.",
        sample=["test_a_fused_step_returns_what_the_reference_does[gemma2-2]"],
    ),
    pytest.mark.by_numpy,
    pytest.mark.filterwarnings("error"),
]

NAME = "grouped, tied, stretched rope"


@functools.partial(jax.jit, static_argnums=(0, 4, 5), compiler_options=QUICK_COMPILE)
def _step(graph, params, cache, tokens, layers, fused: bool) -> DecodeOutput:
    model = nnx.merge(graph, params)
    if fused:
        return fused_step(model, cache, tokens, hidden_layers=layers, interpret=True)
    return reference_step(model, cache, tokens, hidden_layers=layers)


def step(model, cache, tokens, layers, *, fused: bool) -> DecodeOutput:
    return _step(*nnx.split(model), cache, tokens, layers, fused)


@pytest.mark.parametrize("name", [NAME, "every scale", "caps, norms on both sides, GELU"])
def test_the_model_returns_what_the_oracle_has_behind_each_layer(name):
    model = cases.random_model(name, "float32")
    last = model.config.num_layers
    tokens = cases.random_tokens(model.config, 2, 7)
    layers = [last, 0, 1]
    hidden = nnx.jit(lambda model, tokens: model.hidden_states(tokens, layers=layers))(
        model, tokens
    )
    assert (hidden.shape, hidden.dtype) == ((2, 7, 3, model.config.model_dim), jnp.float32)
    embedded = np.asarray(model.embedded(jnp.asarray(tokens)))
    for b, row in enumerate(embedded.astype(np.float64)):
        _, outputs = oracle.through_layers(row, cases.oracle_weights(model), model.config)
        want = np.stack([outputs[-1].x, row, outputs[0].x], axis=1)
        assert_close(hidden[b], want, "model_vs_oracle_float32")


def test_a_cache_goes_on_and_the_head_makes_logits_of_the_last_one():
    model: Any = cases.random_model(NAME, "float32")
    tokens = jnp.asarray(cases.random_tokens(model.config, 2, 6))
    cache = KVCache.create(model.config, 2, 9, model.dtype)
    last = model.config.num_layers
    whole = model.hidden_states(tokens, layers=[last])
    _, cache = model.hidden_states(tokens[:, :4], cache, layers=[0])
    rest, cache = model.hidden_states(tokens[:, 4:], cache, layers=[last])
    assert_close(rest, whole[:, 4:], "cached_vs_whole_float32")
    assert cache.lengths.tolist() == [6, 6]
    assert_close(model.logits_of(whole[:, :, 0]), model(tokens), "cached_vs_whole_float32")


# Of one sequence and of several, whose residual is packed on its way; T tokens of each.
STEPS = [("granite", 1), ("gemma2", 2), ("olmo2", 3)]
LENGTHS = {1: [41], 2: [39, 63, 0], 3: [5]}


@pytest.mark.drawn(
    "Several tokens, and norms on both sides.",
    sample=[
        "test_a_fused_step_returns_what_the_reference_does[gemma2-2]",
        "test_a_fused_step_returns_what_the_reference_does[olmo2-3]",
    ],
)
@pytest.mark.parametrize(("name", "tokens"), STEPS)
def test_a_fused_step_returns_what_the_reference_does(name, tokens):
    config = small_config(**FAMILIES.get(name, {"num_heads": 4, "num_kv_heads": 2}))
    model, lengths = random_model(config), LENGTHS[tokens]
    cache = filled_cache(config, lengths, 140, tokens=tokens)  # NaN where nobody may read
    shape = (len(lengths), tokens) if tokens > 1 else (len(lengths),)
    some = jax.random.randint(jax.random.key(3), shape, 0, config.vocab_size)
    layers = (config.num_layers, 1, 0)
    got, want = (step(model, cache, some, layers, fused=fused) for fused in (True, False))
    assert got.hidden is not None and want.hidden is not None
    assert got.hidden.shape == want.hidden.shape == (*shape, 3, config.model_dim)
    assert_close(got.hidden, want.hidden, "fused_vs_model")
    # The embedding is the model's own row.
    assert bits(got.hidden[..., 2, :]) == bits(want.hidden[..., 2, :])


def test_the_rest_of_a_step_is_what_it_is_without_them():
    config = small_config(num_layers=1)
    model, cache = random_model(config), filled_cache(config, [63, 9], 140)
    for fused in (True, False):
        out, alone = (step(model, cache, jnp.array([3, 5]), x, fused=fused) for x in ((1,), ()))
        assert alone.hidden is None
        assert bits(out.token) == bits(alone.token)
        assert_close(out.logits, alone.logits, "fused_vs_model")
        assert out.cache.lengths.tolist() == alone.cache.lengths.tolist()


@pytest.mark.parametrize("lengths", [[9], [9, 3]])
def test_every_element_is_stored_by_the_program_that_owns_it(lengths):
    """Of the embedding, by 7 programs; those that own nothing store nothing."""
    config, batch = small_config(), len(lengths)
    model, cache = random_model(config), filled_cache(config, lengths, 64)
    tokens = jax.random.randint(jax.random.key(3), (batch,), 0, config.vocab_size)
    plan = make_stream_plan(dims_of(config, batch, 64), machine(7))
    weights, state = kernel_inputs(model, cache)
    names = state_shapes(plan).items()
    carried = {name: jnp.zeros(x.shape, x.dtype) for name, x in names}
    hidden = {"hidden": jnp.full((batch, 1, config.model_dim), jnp.nan, jnp.float32)}
    carried["stage"] = told(plan)[0]
    how = {"updated": carried | hidden, "hidden_layers": (0,), "interpret": True}
    out = run_stream(run_stage, plan, weights, state, tokens, **how)
    assert bits(out["hidden"][:, 0]) == bits(model.embedded(tokens[None])[0])


def test_a_token_that_the_cache_has_no_slot_for_has_none():
    config = small_config(num_layers=1)
    model = random_model(config)
    cache = filled_cache(config, [62, 20], 64, tokens=4)
    some = jnp.arange(8).reshape(2, 4)
    for fused in (True, False):
        out = step(model, cache, some, (0, 1), fused=fused)
        there = np.isfinite(np.asarray(out.hidden)).all(axis=(2, 3))
        nowhere = np.isnan(np.asarray(out.hidden)).all(axis=(2, 3))
        assert there.tolist() == [[True, True, False, False], [True] * 4]
        assert nowhere.tolist() == [[False, False, True, True], [False] * 4]


def test_instances_of_vmap_have_theirs():
    config = small_config(num_layers=1)
    model = random_model(config)
    graph, params = nnx.split(model)
    caches = [filled_cache(config, [n], 64) for n in (5, 40)]
    tokens = jnp.array([[3], [8]])

    def one(cache, tokens):
        return fused_step(
            nnx.merge(graph, params), cache, tokens, hidden_layers=(1,), interpret=True
        ).hidden

    both = jax.jit(jax.vmap(one))(jax.tree.map(lambda *x: jnp.stack(x), *caches), tokens)
    for hidden, cache, some in zip(both, caches, tokens, strict=True):
        assert_close(hidden, step(model, cache, some, (1,), fused=False).hidden, "fused_vs_model")


BAD = {
    "no such layer": (
        [3],
        ValueError,
        "after layers 1 to 2 of made-up, or 0, the embedding; got 3",
    ),
    "a negative one": ([0, -1], ValueError, "the embedding; got -1"),
    "twice": ([1, 1], ValueError, re.escape("each named once; got [1, 1]")),
    "no integer": ([1.5], TypeError, re.escape("a sequence of integers; got [1.5]")),
    "no sequence": (2, TypeError, "a sequence of integers; got 2"),
    "a set": ({1, 2}, TypeError, "a sequence of integers; got {1, 2}"),
}


@pytest.mark.parametrize("what", BAD)
def test_layers_that_there_are_not_get_a_sentence(what):
    config = small_config(name="made-up")
    layers, error, sentence = BAD[what]
    model, cache = random_model(config), filled_cache(config, [3], 8)
    with pytest.raises(error, match=sentence):
        decode_step(model, cache, jnp.array([1]), hidden_layers=layers, implementation="xla")
    with pytest.raises(error, match=sentence):
        model.hidden_states(jnp.array([[1]]), layers=layers)


def test_layers_are_what_a_program_is_compiled_for():
    model, cache = random_model(small_config()), filled_cache(small_config(), [3], 8)
    call = nnx.jit(decode_step, static_argnames="implementation")
    with pytest.raises(TypeError, match=r"compiled for; got traced ones\. Bind them by functools"):
        call(model, cache, jnp.array([1]), hidden_layers=(1,), implementation="xla")
    with pytest.raises(ValueError, match="at least one of them; got none"):
        model.hidden_states(jnp.array([[1]]), layers=[])
