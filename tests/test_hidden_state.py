"""Embeddings in and the last hidden state out: the model's parts, for other programs."""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from numerics import assert_close
from reference_cases import CONFIGS, oracle_weights, quick_jit, random_model, random_tokens

import ffjax
from ffjax.cache import KVCache

pytestmark = [
    pytest.mark.once(
        "A sample of configurations shows what a JAX makes of the model.",
        sample=[
            "test_embeddings_come_out_as_the_oracle_says[every scale]",
            "test_a_call_is_embedding_layers_and_head[grouped, tied, stretched rope]",
            "test_steps_go_on_from_embeddings_in_a_cache",
            "test_bad_inputs_get_a_sentence",
            "test_what_takes_no_embeddings_says_what_does",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

BATCH, COUNT, CAPACITY = 2, 7, 9
NAME = "grouped, tied, stretched rope"
SAME, FLOAT32 = "cached_vs_whole_float32", "float32"


@quick_jit
def hidden_of(model, inputs, cache=None, num_tokens=None):
    return model.last_hidden_state(inputs, cache, num_tokens=num_tokens)


@quick_jit
def logits_of(model, hidden):
    return model.logits(hidden)


@quick_jit
def step(model, cache, token):
    return ffjax.decode_step(model, cache, token, implementation="xla")


def embeddings_of(model, count=COUNT) -> Any:
    """Embeddings `[B, T, D]` that are no token's."""
    shape = BATCH, count, model.config.model_dim
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


@pytest.mark.drawn(
    "What the others have, one of these has as well.",
    sample=[
        "test_embeddings_come_out_as_the_oracle_says[grouped, tied, stretched rope]",
        "test_embeddings_come_out_as_the_oracle_says[every scale]",
        "test_embeddings_come_out_as_the_oracle_says[norms after the blocks, projections normed]",
        "test_embeddings_come_out_as_the_oracle_says[caps, norms on both sides, GELU]",
    ],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_come_out_as_the_oracle_says(name):
    model = random_model(name, FLOAT32)
    embeddings = embeddings_of(model)
    hidden = hidden_of(model, embeddings)
    assert hidden.dtype == jnp.float32
    for b, row in enumerate(embeddings.astype(np.float64)):
        want, _ = oracle.through_layers(row, oracle_weights(model), model.config)
        assert_close(hidden[b], want, "model_vs_oracle_float32")


@pytest.mark.parametrize("name", [NAME, "every scale", "caps, norms on both sides, GELU"])
def test_a_call_is_embedding_layers_and_head(name):
    model = random_model(name, FLOAT32)
    tokens = random_tokens(model.config, BATCH, COUNT)
    want = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    assert_close(logits_of(model, hidden_of(model, tokens)), want, SAME)
    embedded = model.embedded(jnp.asarray(tokens))
    assert_close(hidden_of(model, embedded), hidden_of(model, tokens), SAME)


def test_a_quantized_head_and_embeddings_of_two_bytes():
    model = ffjax.quantize(ffjax.load(ffjax.SHIPPED_MODEL), "int8", head="int8")
    tokens = jnp.arange(97, 97 + COUNT)[None]
    embedded = model.embedded(tokens).astype(model.dtype)
    got = logits_of(model, hidden_of(model, embedded))
    assert_close(got, model(tokens), "cached_vs_whole_bfloat16")


def test_steps_go_on_from_embeddings_in_a_cache():
    """A prefix that is no token's, padded; then steps, against the oracle without a cache."""
    model = random_model(NAME, FLOAT32)
    embeddings, counts = embeddings_of(model), np.array([5, 7], np.int32)
    padded = embeddings.copy()
    padded[0, 5:] = np.nan  # is never looked at
    cache = KVCache.create(model.config, BATCH, CAPACITY, model.dtype)
    cache = hidden_of(model, padded, cache, counts)[1]
    assert cache.lengths.tolist() == counts.tolist()
    tokens, weights = random_tokens(model.config, BATCH, 2), oracle_weights(model)
    embedded = np.asarray(model.embedded(jnp.asarray(tokens)))
    for t in range(2):
        out = step(model, cache, tokens[:, t])
        cache = out.cache
        for b, n in enumerate(counts):
            x = np.concatenate([embeddings[b, :n], embedded[b, : t + 1]]).astype(np.float64)
            hidden, _ = oracle.through_layers(x, weights, model.config)
            want = (weights.embedding if weights.head is None else weights.head) @ hidden[-1]
            assert_close(out.logits[b], want, "model_vs_oracle_float32")


def test_the_last_one_alone_and_what_does_not_fit():
    model = random_model(NAME, FLOAT32)
    embeddings, counts = embeddings_of(model), jnp.array([5, 7])
    cache = KVCache.create(model.config, BATCH, 6, model.dtype)
    every, _ = hidden_of(model, embeddings, cache, counts)
    last, grown = model.last_hidden_state(embeddings, cache, num_tokens=counts, last_only=True)
    assert last.shape == (BATCH, model.config.model_dim)
    assert grown.lengths.tolist() == [5, 7]
    assert_close(last[0], every[0, 4], SAME)
    assert np.isnan(last[1]).all()
    assert np.isnan(logits_of(model, last)[1]).all()
    assert np.isfinite(every[:, :6]).all()


BAD = {
    "another width": (ValueError, r"float \[B, T, D\] of D = 64, got float32 of shape \(1, 2, 3\)"),
    "one axis": (ValueError, r"Inputs of .* got int32 of shape \(3,\)"),
    "integers": (TypeError, "Embeddings are floating-point numbers, got int32. model.embedded"),
    "another batch": (ValueError, "The cache holds 3 sequences, got embeddings for 1."),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_inputs_get_a_sentence(what):
    model = random_model(NAME, FLOAT32)
    width = model.config.model_dim
    inputs = {
        "another width": jnp.zeros((1, 2, 3)),
        "one axis": jnp.zeros(3, jnp.int32),
        "integers": jnp.zeros((1, 2, width), jnp.int32),
        "another batch": jnp.zeros((1, 2, width)),
    }[what]
    cache = KVCache.create(model.config, 3, 4, model.dtype) if what == "another batch" else None
    error, sentence = BAD[what]
    with pytest.raises(error, match=sentence.replace("D = 64", f"D = {width}")):
        model.last_hidden_state(inputs, cache)


def test_what_takes_no_embeddings_says_what_does():
    model = random_model(NAME, FLOAT32)
    embeddings = embeddings_of(model)
    cache = KVCache.create(model.config, BATCH, CAPACITY, model.dtype)
    way = re.escape("model.last_hidden_state(embeddings")
    with pytest.raises(ValueError, match=way):
        model(embeddings)
    for one in (embeddings[:, 0], embeddings[:, :1]):
        with pytest.raises(TypeError, match=f"takes token ids, not embeddings.*{way}"):
            ffjax.decode_step(model, cache, one)
    with pytest.raises(TypeError, match=f"as embeddings have.*{way}"):
        ffjax.generate(model, embeddings, 4)
    assert dataclasses.asdict(cache)["lengths"].tolist() == [0, 0]
