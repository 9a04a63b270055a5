"""The fused kernel's own body, interpreted by one program, against the model."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import (
    dims_of,
    filled_cache,
    kernel_inputs,
    random_model,
    random_tokens,
    small_config,
)
from numerics import assert_close
from step_cases import CASES, bits, newest, reference
from stream_cases import check, stream, streamed

from ffjax.cache import KVCache
from pallas_kernels.gpu import INTERPRETER
from pallas_kernels.stream.exchange_order import word_in_exchange
from pallas_kernels.stream.half2 import HALF2_TAG_BITS, half2_tag
from pallas_kernels.stream.launch import layout_of
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.stream.tuning import Tuning

pytestmark = [
    pytest.mark.once(
        "A sample of shapes shows what a JAX makes of the interpreted kernel.",
        sample=[
            "test_tokens_outside_the_vocabulary_are_clamped",
        ],
    ),
    pytest.mark.by_numpy,
    pytest.mark.filterwarnings("error"),
]

# One program has room for all inputs of the down projection in its registers.
ONE_PROGRAM = [name for name in CASES if name != "inputs wider than a tile"]


@pytest.mark.drawn(
    "Each size of heads, and batches of 1, 3 and 8.",
    sample=[
        "test_a_step_matches_the_model[one head, tied, stretched rope]",
        "test_a_step_matches_the_model[heads of 64, G=1]",
        "test_a_step_matches_the_model[heads of 64, G=8]",
        "test_a_step_matches_the_model[heads of 128, G=4]",
        "test_a_step_matches_the_model[heads of 256, G=3]",
    ],
)
@pytest.mark.parametrize("name", ONE_PROGRAM)
def test_a_step_matches_the_model(name):
    config, capacity, all_lengths = CASES[name]
    model = random_model(config)
    lengths = all_lengths[0]
    cache = filled_cache(config, lengths, capacity)  # NaN where nobody may read
    tokens = random_tokens(config, len(lengths))
    got = streamed(model, cache, tokens)
    check(config, got, reference(model, cache, tokens), lengths)
    assert bits(streamed(model, cache, tokens)) == bits(got)


def test_steps_in_a_row_match_the_model():
    """Each step's tags differ from those that the step before has left in the exchange."""
    config = small_config(num_kv_heads=2)
    model = random_model(config)
    cache = filled_cache(config, [126, 0, 60], 135)
    want_cache, tokens = cache, random_tokens(config, 3)
    for step in range(4):
        logits, _, cache = streamed(model, cache, tokens)
        want = reference(model, want_cache, tokens)
        assert_close(logits, want.logits, "fused_vs_model")
        want_cache, tokens = want.cache, want.token
        check_tags(model, cache, step + 1)


def check_tags(model, cache: KVCache, steps: int) -> None:
    """After so many steps every word has the tag of its last hand-over: none is a step old."""
    dims = dims_of(model.config, cache.batch, cache.capacity)
    plan = make_stream_plan(dims, INTERPRETER)
    at, words = layout_of(plan), np.asarray(cache.counters)
    assert plan.half2 == (dims.batch > 1)
    assert words[at.steps] == steps
    tag_of_head = steps * (dims.num_layers + 1)
    qkv = words[at.qkv : at.qkv + dims.batch * dims.qkv_dim]
    assert (qkv & 255 == (tag_of_head - 1) & 255).all()
    sequences = np.arange(dims.batch)[:, None]
    for start, reader, tag in (
        (at.x_in, Segment.QKV, tag_of_head - 1),
        (at.x_head, Segment.HEAD, steps),
        (at.x_mid, Segment.GATE_UP, tag_of_head - 1),
        (at.attn, Segment.ATTN_OUT, tag_of_head - 1),
        (at.ffw, Segment.DOWN, tag_of_head - 1),
    ):
        bits, wanted = 255, tag & 255
        if plan.half2:
            bits, wanted = HALF2_TAG_BITS, half2_tag(jnp.int32(tag))
        part = plan.segments[reader]
        there = word_in_exchange(plan, part, sequences, np.arange(part.inner))
        assert (words[start + there] & bits == wanted).all()


@pytest.mark.drawn(
    "A batch has words of two halves.",
    sample=["test_hidden_activations_are_handed_over_twice_where_the_tuning_says_so[lengths1]"],
)
@pytest.mark.parametrize("lengths", [[5], [5, 0]])
def test_hidden_activations_are_handed_over_twice_where_the_tuning_says_so(lengths):
    config = small_config()
    model = random_model(config)
    dims = dims_of(config, len(lengths), 16)
    at = layout_of(make_stream_plan(dims, INTERPRETER))
    cache, tokens = filled_cache(config, lengths, 16), random_tokens(config, len(lengths))
    once, twice = (streamed(model, cache, tokens, Tuning(hidden_copies=n)) for n in (1, 2))
    assert bits(once[0]) == bits(twice[0])
    size = at.ffw_copy - at.ffw
    hidden, copy, none = (
        np.asarray(out[2].counters)[start : start + size]
        for out, start in ((twice, at.ffw), (twice, at.ffw_copy), (once, at.ffw_copy))
    )
    assert hidden.any()
    assert not none.any()
    np.testing.assert_array_equal(hidden, copy)


def layout_start(model, cache: KVCache) -> int:
    dims = dims_of(model.config, cache.batch, cache.capacity)
    return layout_of(make_stream_plan(dims, INTERPRETER)).steps


def test_tags_go_round():
    """After 2^31 and more hand-overs the count wraps, and the words' 8 bits long before."""
    config = small_config()
    model = random_model(config)
    fresh = filled_cache(config, [5], 16)
    tokens = random_tokens(config, 1)
    want = streamed(model, fresh, tokens)
    at = layout_start(model, fresh)
    for steps in (84, 85, 2**31 // 3, 2**31 - 1):
        cache = dataclasses.replace(fresh, counters=fresh.counters.at[at].set(steps))
        got = streamed(model, cache, tokens)
        assert bits(got[0]) == bits(want[0]), steps
        assert int(got[2].counters[at]) == np.int64(steps + 1).astype(np.int32)


# Interpreted, there is no ring: what is left of a tuning is how tiles are cut.
TUNINGS = {
    "small, warps that only feed": (Tuning(tile_bytes=8192, num_warps=8), [65]),
    "small, batch of 3": (Tuning(tile_bytes=8192, num_warps=8), [65, 3, 70]),
}


@pytest.mark.drawn(
    "A batch has all that one sequence has.",
    sample=["test_every_tile_shape_gives_the_same[small, batch of 3]"],
)
@pytest.mark.parametrize("name", TUNINGS)
def test_every_tile_shape_gives_the_same(name):
    tuning, lengths = TUNINGS[name]
    config = small_config(num_heads=4, num_kv_heads=2)
    model = random_model(config)
    cache, tokens = filled_cache(config, lengths, 80), random_tokens(config, len(lengths))
    want = streamed(model, cache, tokens)
    got = streamed(model, cache, tokens, tuning)
    assert_close(got[0], want[0], "fused_vs_fused")
    assert_close(newest(got[2]), newest(want[2]), "fused_vs_fused")


def test_where_a_tile_has_one_hidden_activation_words_have_one():
    config = small_config(num_layers=1, model_dim=2056)
    model = random_model(config)
    cache, tokens = filled_cache(config, [5, 0], 16), random_tokens(config, 2)
    tuning = Tuning(tile_bytes=8192)
    plan = make_stream_plan(dims_of(config, 2, 16), INTERPRETER, tuning)
    assert plan.rows == 2
    assert not plan.half2
    got = streamed(model, cache, tokens, tuning)
    check(config, got, reference(model, cache, tokens), [5, 0])


# What follows is of one shape: it is compiled once.
THREE = small_config(), 130


def test_a_full_cache_gives_nan_and_keeps_what_it_holds():
    config, capacity = THREE
    model = random_model(config)
    cache, tokens = filled_cache(config, [126, 130, 130], capacity), random_tokens(config, 3)
    before = [np.asarray(cache.k), np.asarray(cache.v)]
    lengths = cache.lengths.at[2].set(131)
    logits, token, after = streamed(model, dataclasses.replace(cache, lengths=lengths), tokens)
    want = reference(model, dataclasses.replace(cache, lengths=lengths), tokens)
    assert np.isnan(logits).all(axis=1).tolist() == [False, True, True]
    assert token.tolist()[1:] == want.token.tolist()[1:]
    assert after.lengths.tolist() == [127, 131, 132]
    for new, old in zip((after.k, after.v), before, strict=True):
        assert bits(new[:, 1:]) == bits(old[:, 1:])


def test_sequences_of_a_batch_do_not_see_each_other():
    config, capacity = THREE
    model = random_model(config)
    cache, tokens = filled_cache(config, [127, 0, 66], capacity), random_tokens(config, 3)
    logits, _, after = streamed(model, cache, tokens)
    order = np.array([2, 0, 1])
    shuffled = KVCache(cache.k[:, order], cache.v[:, order], cache.lengths[order], cache.counters)
    got, _, got_after = streamed(model, shuffled, tokens[order])
    assert bits(got) == bits(logits[order])
    assert bits([got_after.k, got_after.v]) == bits([after.k[:, order], after.v[:, order]])


def test_tokens_outside_the_vocabulary_are_clamped():
    config, capacity = THREE
    model, cache = random_model(config), filled_cache(config, [5, 5, 5], capacity)
    last = config.vocab_size - 1
    wild, tame = jnp.array([-1, last + 1, 2**31 - 1]), jnp.array([0, last, last])
    assert bits(streamed(model, cache, wild.astype(jnp.int32))[0]) == bits(
        streamed(model, cache, tame.astype(jnp.int32))[0]
    )


def test_of_equal_logits_the_lowest_token_wins():
    config = small_config()
    model, cache = random_model(config), filled_cache(config, [5, 3], 16)
    tokens = random_tokens(config, 2)
    _, best, _ = streamed(model, cache, tokens)
    head = model.head_weight.at[jnp.array([2, 99])].set(model.head_weight[best])
    # Each best row once more, before and after it.
    weights, state = kernel_inputs(model, cache)
    head = head.at[jnp.array([100, 1])].set(model.head_weight[best])
    plan = make_stream_plan(dims_of(config, 2, 16), INTERPRETER)
    for rows, want in ((head, [2, 1]), (jnp.ones_like(head), [0, 0])):
        logits, token, *_ = stream(plan)(weights._replace(head=rows), state, tokens)
        assert token.tolist() == np.argmax(logits, axis=-1).tolist() == want
