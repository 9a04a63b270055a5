"""The key/value cache: its layout, its life as a pytree, and which slots a call writes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference_cases import random_model, random_tokens

from ffjax.cache import KVCache
from ffjax.config import ModelConfig, preset

pytestmark = pytest.mark.filterwarnings("error")

NAME = "grouped, untied"
CONFIG = ModelConfig(
    vocab_size=101,
    num_layers=3,
    model_dim=37,
    ffw_dim=53,
    num_heads=10,
    num_kv_heads=2,
    head_dim=14,
)


@nnx.jit
def grow(model, tokens, cache, num_tokens):
    return model(tokens, cache, num_tokens=num_tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_empty_cache_has_the_documented_layout(dtype):
    cache = KVCache.create(CONFIG, 5, 11, jnp.dtype(dtype))
    for stored in (cache.k, cache.v):
        assert stored.shape == (3, 5, 2, 11, 14)  # [L, B, K, S, H]
        assert stored.dtype == jnp.dtype(dtype)
    assert cache.lengths.dtype == jnp.int32
    assert cache.lengths.tolist() == [0] * 5
    assert cache.counters.dtype == jnp.int32
    assert cache.counters.ndim == 1
    assert not cache.counters.any()
    assert (cache.batch, cache.capacity) == (5, 11)


def test_the_default_dtype_is_that_of_the_weights():
    assert KVCache.create(CONFIG, 1, 1).k.dtype == jnp.bfloat16


def test_keys_and_values_are_buffers_of_their_own():
    cache = KVCache.create(CONFIG, 1, 3)
    # A buffer donated twice is an error.
    assert cache.k.unsafe_buffer_pointer() != cache.v.unsafe_buffer_pointer()


def test_a_long_cache_of_a_large_model_costs_what_its_shape_says():
    cache = jax.eval_shape(lambda: KVCache.create(preset("llama3.1-8b"), 8, 16_384))
    assert cache.k.shape == (32, 8, 8, 16_384, 128)
    assert (cache.batch, cache.capacity) == (8, 16_384)


def test_it_is_a_pytree_of_its_fields():
    cache = KVCache.create(CONFIG, 2, 3)
    leaves, _ = jax.tree_util.tree_flatten_with_path(cache)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    assert names == [".k", ".v", ".lengths", ".counters"]
    again = jax.jit(lambda c: jax.tree.map(lambda x: x + 1, c))(cache)
    assert isinstance(again, KVCache)
    assert again.lengths.tolist() == [1, 1]
    assert (np.asarray(again.k) == 1).all()


def test_it_is_frozen():
    cache = KVCache.create(CONFIG, 1, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cache.lengths = jnp.ones((1,), jnp.int32)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("batch", "capacity"), [(0, 4), (4, 0), (-1, 4), (2, -3)])
def test_impossible_sizes_get_a_sentence(batch, capacity):
    sentence = f"A cache needs a positive batch and capacity, got {batch} and {capacity}."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        KVCache.create(CONFIG, batch, capacity)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_call_writes_the_positions_that_follow_and_no_other(dtype):
    """Two rows have room, one runs over its end, one was full: `.` kept, `w` written.

    slot   0 1 2 3 4 5 6
    row 0  . . w w w . .    2 live, 3 new
    row 1  w w w . . . .    0 live, 3 new, of which 1 counts
    row 2  . . . . . w w    5 live, 3 new, the last of which has no slot
        row 3  . . . . . . .    7 live, 3 new, which have no slot
    """
    model = random_model(NAME, dtype)
    written = np.zeros((4, 7), bool)
    written[0, 2:5] = written[1, 0:3] = written[2, 5:7] = True
    empty = KVCache.create(model.config, 4, 7, model.dtype)
    rng = np.random.default_rng(0)
    before = dataclasses.replace(
        empty,
        k=jnp.asarray(rng.standard_normal(empty.k.shape).astype(empty.k.dtype)),
        v=jnp.asarray(rng.standard_normal(empty.v.shape).astype(empty.v.dtype)),
        lengths=jnp.array([2, 0, 5, 7], jnp.int32),
    )
    tokens = random_tokens(model.config, 4, 3)
    _, after = grow(model, tokens, before, np.array([3, 1, 3, 3], np.int32))
    for old, new in ((before.k, after.k), (before.v, after.v)):
        assert new.dtype == old.dtype
        # [L, B, K, S, H] to [B, S]: whether any number of a slot changed, and whether all did.
        changed = np.moveaxis(np.asarray(old) != np.asarray(new), (1, 3), (0, 1))
        np.testing.assert_array_equal(changed.any(axis=(2, 3, 4)), written)
        assert changed[written].mean() > 0.95
    assert after.lengths.dtype == jnp.int32
    assert after.lengths.tolist() == [5, 1, 8, 10]


def test_the_reference_hands_the_counters_through():
    model = random_model(NAME, "float32")
    cache = KVCache.create(model.config, 3, 7, jnp.float32)
    counters = jnp.arange(cache.counters.size, dtype=jnp.int32)
    cache = dataclasses.replace(cache, counters=counters)
    tokens = random_tokens(model.config, 3, 3)
    _, after = grow(model, tokens, cache, np.array([3, 3, 3], np.int32))
    np.testing.assert_array_equal(after.counters, counters)
