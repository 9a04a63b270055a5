"""The kernel's own body against the model, interpreted on a CPU with one program."""

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
    small_config,
)
from flax import nnx
from numerics import assert_close

from ffjax.cache import KVCache
from ffjax.config import RopeScaling
from ffjax.decode import DecodeOutput, fused_step, reference_step
from pallas_kernels.gpu import INTERPRETER
from pallas_kernels.kernel import decode_kernel
from pallas_kernels.launch import run_kernel
from pallas_kernels.plan import make_plan
from pallas_kernels.scratch import scratch_shapes

pytestmark = pytest.mark.filterwarnings("error")

_SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)

# Attention takes tiles of 128 positions of 64 elements, 64 of 128.
CASES = {
    "one head, tied, stretched rope": (
        small_config(num_heads=1, tied_embeddings=True, rope_scaling=_SCALING),
        150,
        [[129], [0]],
    ),
    "heads of 64, G=1": (small_config(num_kv_heads=2), 130, [[0, 64, 127], [128, 129, 1]]),
    "heads of 64, G=8": (
        small_config(num_heads=8, model_dim=48),
        200,
        [[0, 1, 63, 65, 127, 128, 129, 199]],
    ),
    "heads of 128, G=4": (small_config(num_heads=4, head_dim=128), 100, [[63, 64, 65]]),
    "heads of 128, G=8": (
        small_config(num_heads=16, num_kv_heads=2, head_dim=128, model_dim=112, vocab_size=97),
        70,
        [[64]],
    ),
    "heads of 256, G=3": (small_config(num_heads=3, head_dim=256, model_dim=80), 40, [[31, 33]]),
    "heads of 32, G=16": (small_config(num_heads=16, head_dim=32), 20, [[7]]),
    "inputs wider than a tile": (
        small_config(num_layers=1, model_dim=2192, ffw_dim=2320),
        8,
        [[5, 0]],
    ),
}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK_COMPILE)
def _fused(graph, params, cache: KVCache, tokens) -> DecodeOutput:
    return fused_step(nnx.merge(graph, params), cache, tokens, interpret=True)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK_COMPILE)
def _reference(graph, params, cache: KVCache, tokens) -> DecodeOutput:
    return reference_step(nnx.merge(graph, params), cache, tokens)


def fused(model, cache, tokens) -> DecodeOutput:
    return _fused(*nnx.split(model), cache, tokens)


def reference(model, cache, tokens) -> DecodeOutput:
    return _reference(*nnx.split(model), cache, tokens)


def bits(tree) -> list[bytes]:
    """Arrays as bytes: so NaNs equal themselves, and -0.0 does not equal 0.0."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def in_float32(tree):
    """Arrays of bfloat16 as float32, the rest as they are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def untouched(cache: KVCache) -> list[np.ndarray]:
    """Keys and values without each sequence's newest position, if it has a slot."""
    slots = np.arange(cache.capacity)[:, None]
    others = slots != np.asarray(cache.lengths)[:, None, None, None] - 1
    return [np.where(others, np.asarray(x), 0) for x in (cache.k, cache.v)]


def newest(cache: KVCache) -> jax.Array:
    """Keys and values of each sequence's newest position: `[2, B, L, K, H]`."""
    row, slot = jnp.arange(cache.batch), cache.lengths - 1
    return jnp.stack([x[:, row, :, slot] for x in (cache.k, cache.v)])


@pytest.mark.parametrize("name", CASES)
def test_a_step_matches_the_model(name):
    config, capacity, all_lengths = CASES[name]
    model = random_model(config)
    for lengths in all_lengths:
        cache = filled_cache(config, lengths, capacity)  # NaN where nobody may read
        tokens = random_tokens(config, len(lengths))
        got = fused(model, cache, tokens)
        want = reference(model, cache, tokens)
        assert_close(got.logits, want.logits, "fused_vs_model")
        assert_close(newest(got.cache), newest(want.cache), "fused_vs_model")
        assert bits(untouched(got.cache)) == bits(untouched(want.cache))
        assert got.token.tolist() == np.argmax(got.logits, axis=-1).tolist()
        assert got.cache.lengths.tolist() == [n + 1 for n in lengths]
        assert not got.cache.counters.any()
        assert bits(fused(model, cache, tokens)) == bits(got)


@pytest.mark.parametrize("name", ["heads of 64, G=8", "inputs wider than a tile"])
def test_a_step_is_closer_to_the_model_in_float32(name):
    """The model's own rounding of activations is most of the difference above."""
    config, capacity, all_lengths = CASES[name]
    graph, params = nnx.split(random_model(config))
    cache = filled_cache(config, all_lengths[0], capacity)
    tokens = random_tokens(config, cache.batch)
    got = _fused(graph, params, cache, tokens)
    exact = _reference(graph, in_float32(params), in_float32(cache), tokens)
    assert_close(got.logits, exact.logits, "fused_vs_float32")


@pytest.fixture(scope="module")
def step():
    """A model, a step's inputs at lengths around the edge of a tile, and its output."""
    config = small_config()
    model = random_model(config)
    cache = filled_cache(config, [127, 0, 66], 130)
    tokens = random_tokens(config, 3)
    return model, cache, tokens, fused(model, cache, tokens)


def test_sequences_of_a_batch_do_not_see_each_other(step):
    model, cache, tokens, together = step
    order = np.array([2, 0, 1])
    shuffled = KVCache(cache.k[:, order], cache.v[:, order], cache.lengths[order], cache.counters)
    got = fused(model, shuffled, tokens[order])
    assert bits(got.logits) == bits(together.logits[order])
    assert bits(got.cache.k) == bits(together.cache.k[:, order])
    assert bits(got.cache.v) == bits(together.cache.v[:, order])


def test_a_sequence_gets_the_same_in_any_batch(step):
    model, cache, tokens, together = step
    for b in range(3):
        one = slice(b, b + 1)
        # The counters of one sequence: a cache of its own has fewer.
        counters = KVCache.create(model.config, 1, 1).counters
        alone = KVCache(cache.k[:, one], cache.v[:, one], cache.lengths[one], counters)
        got = fused(model, alone, tokens[one])
        # Another batch may be cut into other tiles: the same sums in another order.
        assert_close(got.logits, together.logits[one], "fused_vs_fused")
        assert got.token.tolist() == together.token[one].tolist()


def test_scratch_may_hold_anything(step):
    model, cache, tokens, together = step
    plan = make_plan(dims_of(model.config, cache.batch, cache.capacity), INTERPRETER)
    weights, state = kernel_inputs(model, cache)
    run = functools.partial(run_kernel, decode_kernel, plan, interpret=True)
    launch = jax.jit(run, compiler_options=QUICK_COMPILE)
    for poison in (np.nan, np.inf):
        shapes = scratch_shapes(plan) | {
            "logits": together.logits,
            "token": together.token,
        }
        # An integer has no NaN; 7 is a plausible token.
        scratch = {
            name: jnp.full(x.shape, poison if jnp.issubdtype(x.dtype, jnp.floating) else 7, x.dtype)
            for name, x in shapes.items()
        }
        got = launch(weights, state, tokens, scratch=scratch)
        assert bits([got[name] for name in ("logits", "token", "k", "v")]) == bits(
            [together.logits, together.token, together.cache.k, together.cache.v]
        )


def test_a_full_cache_gives_nan_and_keeps_what_it_holds(step):
    model, cache, tokens, together = step
    lengths = cache.lengths.at[1:].set(jnp.array([cache.capacity, cache.capacity + 1]))
    # Zeros, where the other tests have NaN: of a full row every slot is alive.
    full = KVCache(jnp.nan_to_num(cache.k), jnp.nan_to_num(cache.v), lengths, cache.counters)
    got, want = fused(model, full, tokens), reference(model, full, tokens)
    assert np.isnan(got.logits[1:]).all()
    assert bits(got.logits[0]) == bits(together.logits[0])
    assert got.token[1:].tolist() == want.token[1:].tolist()
    assert got.cache.lengths.tolist() == want.cache.lengths.tolist()
    assert bits([got.cache.k[:, 1:], got.cache.v[:, 1:]]) == bits([full.k[:, 1:], full.v[:, 1:]])


def test_tokens_outside_the_vocabulary_are_clamped(step):
    model, cache, _, _ = step
    last = model.config.vocab_size - 1
    wild = jnp.array([-1, last + 1, 2**31 - 1], jnp.int32)
    tame = jnp.array([0, last, last], jnp.int32)
    assert bits(fused(model, cache, wild)) == bits(fused(model, cache, tame))


def test_of_equal_logits_the_lowest_token_wins(step):
    model, cache, tokens, together = step
    before, behind = (1, 9, 33), (97, 99, 100)
    head = model.head_weight
    # Each sequence's best row once more, before and behind it: three equal logits.
    for best, *copies in zip(together.token.tolist(), before, behind, strict=True):
        head = head.at[jnp.array(copies)].set(head[best])
    graph, params = nnx.split(model)

    def tokens_with(head) -> list[int]:
        params["head"] = nnx.Param(head)
        got = _fused(graph, params, cache, tokens)
        assert got.token.tolist() == np.argmax(got.logits, axis=-1).tolist()
        return got.token.tolist()

    assert tokens_with(head) == np.minimum(together.token, before).tolist()
    assert tokens_with(jnp.ones_like(head)) == [0, 0, 0]
