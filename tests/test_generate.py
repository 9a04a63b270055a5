"""Generation against the plainest thing that could generate: the reference, no cache."""

import dataclasses
import gc
import math
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from flax import nnx

from ffjax.cache import KVCache
from ffjax.config import ModelConfig, preset
from ffjax.generation import generate
from ffjax.loop import BLOCK, Loop
from ffjax.model import Transformer
from ffjax.prefill.padded import chunk_sizes
from ffjax.requests import Request
from ffjax.sampling.draw import sample, sequence_keys, step_keys, words_of
from ffjax.streaming import stream

pytestmark = [
    pytest.mark.once(
        "A sample shows what a JAX makes of the programs; the rest is what they are given.",
        sample=[
            "test_generate_is_step_by_step_argmax_without_a_cache[short]",
            "test_stream_is_generate[1.0-9]",
            "test_like_requests_compile_once",
            "test_a_stream_that_is_left_holds_no_cache",
            "test_prefill_and_decode_update_the_cache_in_place",
            "test_bad_input_gets_a_sentence",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

# Prime sizes where possible: a swapped axis cannot hide.
CONFIG = ModelConfig(
    name="tiny",
    vocab_size=53,
    num_layers=2,
    model_dim=48,
    ffw_dim=80,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    max_context=400,
)
SHORT = [7, 3, 41]
# Longer than both sizes of chunk, and a multiple of neither.
LONG = [(5 * i * i + i) % 53 for i in range(301)]


@pytest.fixture(scope="module")
def model() -> Transformer:
    # Float32: greedy choices then hang on no rounding that a batch could change.
    return Transformer(CONFIG, rngs=nnx.Rngs(1), dtype=jnp.float32)


def _without_cache(model, prompt, count, temperature=0.0, seed=0):
    """Feeds the whole sequence again for every token."""
    key = sequence_keys(words_of((seed,), 1))
    width = len(prompt) + count  # one shape, one compilation
    forward = nnx.jit(lambda model, tokens: model(tokens))
    tokens = list(prompt)
    for i in range(count):
        padded = jnp.array([tokens + [0] * (width - len(tokens))])
        logits = forward(model, padded)[:, len(tokens) - 1]
        tokens.append(int(sample(logits, step_keys(key, i), temperature)[0]))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["short", "long"])
def test_generate_is_step_by_step_argmax_without_a_cache(model, prompt):
    count = 2 * BLOCK + 3
    out = generate(model, [prompt], count)
    assert out.tokens == [_without_cache(model, prompt, count)]
    assert out.finish_reasons == ["length"]
    assert out.implementation == "xla"
    assert out.steps == 3 * BLOCK  # whole blocks
    assert out.prefill_seconds > 0
    assert out.tokens_per_second > 0


def test_one_new_token_needs_no_decode_step(model):
    out = generate(model, SHORT, 1)
    assert out.tokens == [_without_cache(model, SHORT, 1)]
    assert out.finish_reasons == ["length"]
    assert (out.steps, out.decode_seconds) == (0, 0.0)
    assert math.isnan(out.tokens_per_second)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_of_different_lengths_equals_each_alone(model, temperature):
    prompts = [LONG, SHORT, LONG[:33], [0], LONG[:32]]
    seeds = [3, 1, 4, 1, 5]
    together = generate(model, prompts, 12, temperature=temperature, seed=seeds)
    for prompt, seed, row in zip(prompts, seeds, together.tokens, strict=True):
        alone = generate(model, [prompt], 12, temperature=temperature, seed=[seed])
        assert row == alone.tokens[0]


def test_more_sequences_than_the_kernel_takes_run_on_the_reference(model):
    out = generate(model, [SHORT] * 9, 3)
    assert out.tokens == [_without_cache(model, SHORT, 3)] * 9


@pytest.mark.parametrize("prompts", [SHORT, np.array(SHORT), jnp.array(SHORT), np.array([SHORT])])
def test_prompts_come_as_lists_or_arrays(model, prompts):
    assert generate(model, prompts, 4).tokens == generate(model, [SHORT], 4).tokens


def test_temperature_draws_the_documented_tokens(model):
    out = generate(model, SHORT, 2 * BLOCK, temperature=0.9, seed=[6])
    assert out.tokens[0] == _without_cache(model, SHORT, 2 * BLOCK, temperature=0.9, seed=6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_default_prng_impl", "rbg"),
        ("jax_default_prng_impl", "unsafe_rbg"),
        ("jax_random_seed_offset", 3),
        ("jax_threefry_partitionable", False),
        ("jax_high_dynamic_range_gumbel", True),
    ],
)
def test_no_setting_of_jax_changes_what_is_drawn(model, name, value):
    def draw():
        return generate(model, [SHORT, SHORT], 6, temperature=1.0, seed=[2**40, 5]).tokens

    expected, before = draw(), jax.config.values[name]
    jax.config.update(name, value)
    try:
        assert draw() == expected
    finally:
        jax.config.update(name, before)


def test_seeds_may_be_an_array(model):
    def draw(seed):
        return generate(model, [SHORT, SHORT], 6, temperature=1.0, seed=seed).tokens

    assert draw(np.array([2**63, 4], np.uint64)) == draw([2**63, 4])


def test_a_seed_repeats_and_another_differs(model):
    def draw(seed):
        return generate(model, [SHORT, SHORT], 16, temperature=1.0, seed=seed).tokens

    first = draw(1)
    assert draw(1) == first
    assert draw(2) != first
    assert first[0] != first[1]  # the same prompt twice is two draws


def test_the_stop_token_ends_its_sequence_and_is_not_returned(model):
    free = generate(model, [SHORT, LONG], 30).tokens
    stop = free[0][5]
    cut = [row.index(stop) if stop in row else 30 for row in free]
    out = generate(model, [SHORT, LONG], 30, stop_token=stop)
    assert out.tokens == [row[:n] for row, n in zip(free, cut, strict=True)]
    assert out.finish_reasons == ["stop" if n < 30 else "length" for n in cut]
    assert cut[0] <= 5


def test_the_device_stops_when_every_sequence_has(model):
    stop = generate(model, SHORT, 1).tokens[0][0]
    out = generate(model, SHORT, 300, stop_token=stop)
    assert (out.tokens, out.finish_reasons, out.steps) == ([[]], ["stop"], 0)
    tokens = generate(model, SHORT, 300).tokens[0]
    late = next(token for i, token in enumerate(tokens) if i and token != stop)
    out = generate(model, SHORT, 300, stop_token=late)
    assert out.steps == -(-tokens.index(late) // BLOCK) * BLOCK < 300


def test_any_of_several_stop_tokens_ends_a_sequence(model):
    free = generate(model, [SHORT, LONG], 30).tokens
    # The first of each row's own: one sequence ends at the one, one at the other.
    stops = [free[0][6], free[1][9], free[0][6]]
    cut = [min(row.index(stop) for stop in stops if stop in row) for row in free]
    assert free[0][cut[0]] != free[1][cut[1]]
    for run in (generate, lambda *args, **options: _streamed(stream(*args, **options))):
        out = run(model, [SHORT, LONG], 30, stop_token=stops)
        assert out.tokens == [row[:n] for row, n in zip(free, cut, strict=True)]
        assert out.finish_reasons == ["stop", "stop"]
        assert out.steps == -(-max(cut) // BLOCK) * BLOCK < 30  # the device knows all of them
    assert generate(model, [SHORT, LONG], 30, stop_token=()).tokens == free


def _streamed(steps):
    assert list(steps)
    return steps.output


def test_a_request_holds_each_stop_token_once():
    def held(stop_token, config=CONFIG):
        [ends] = Request.checked(config, SHORT, 4, 0.0, 0, stop_token, None).stop_tokens
        return ends

    assert held(None) == held([]) == ()
    assert held(np.int64(7)) == (7,)
    assert held([7, 0, 7, 52]) == (7, 0, 52)
    wide = dataclasses.replace(CONFIG, vocab_size=100)
    assert held([*range(64), 0], wide) == tuple(range(64))
    with pytest.raises(ValueError, match="up to 64 tokens; stop_token has 65 different ones"):
        held(range(65), wide)


@pytest.mark.drawn("Each number of tokens, greedy or drawn.")
@pytest.mark.parametrize("count", [1, 2, BLOCK, BLOCK + 1, BLOCK + 2, 3 * BLOCK])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_is_generate(model, count, temperature):
    prompts = [SHORT, LONG]
    # The long prompt's third token, where there is one, stops it before the other.
    free = generate(model, prompts, count, temperature=temperature, seed=2).tokens
    options = {"temperature": temperature, "seed": 2, "stop_token": free[1][min(2, count - 1)]}
    whole = generate(model, prompts, count, **options)
    steps = stream(model, prompts, count, **options)
    rows = list(steps)
    came = [[row[b] for row in rows if row[b] is not None] for b in range(2)]
    assert came == whole.tokens
    assert steps.output.tokens == whole.tokens
    assert steps.output.finish_reasons == whole.finish_reasons
    assert steps.implementation == whole.implementation


class _Watched:
    """An array on the device that notes when it is read."""

    def __init__(self, result: jax.Array, events: list[str]):
        self._result = result
        self._events = events

    def __array__(self, *args, **kwargs) -> np.ndarray:
        self._events.append("read")
        return np.asarray(self._result)


def test_the_stream_orders_the_next_block_before_it_reads_the_last(model, monkeypatch):
    events = []
    decode = Loop.decode

    def watched(self):
        events.append("order")
        made = decode(self)
        return made._replace(tokens=_Watched(made.tokens, events))

    monkeypatch.setattr(Loop, "decode", watched)
    steps = stream(model, SHORT, 4 * BLOCK + 1)
    next(steps)
    assert events == ["order"]  # the first token comes while the first block runs
    next(steps)
    # The second block is ordered before the first is read, and the third before the reader has
    # the first one's tokens.
    assert events == ["order"] * 2 + ["read", "order"]
    assert len(list(steps)) == 4 * BLOCK - 1
    assert events == ["order"] * 2 + ["read", "order"] * 2 + ["read"] * 2


@pytest.mark.parametrize("run", [generate, lambda *args, **kw: list(stream(*args, **kw))])
def test_after_an_end_no_block_is_ordered(model, monkeypatch, run):
    """At an end the device has one block that it did not need, and never two."""
    [tokens] = generate(model, SHORT, 4 * BLOCK).tokens
    ordered, decode = [], Loop.decode
    monkeypatch.setattr(Loop, "decode", lambda loop: ordered.append(0) or decode(loop))
    for at in range(2 * BLOCK + 2):
        if tokens[at] in tokens[:at]:
            continue
        ordered.clear()
        run(model, SHORT, 4 * BLOCK, stop_token=tokens[at])
        needed = -(-at // BLOCK)
        assert len(ordered) == needed + 1, at


def test_a_stream_that_is_left_holds_no_cache(model, monkeypatch):
    """Without the collector of circles, which may come late."""
    prefill, loops = Loop.prefill, []
    monkeypatch.setattr(
        Loop, "prefill", lambda loop: loops.append(weakref.ref(loop)) or prefill(loop)
    )
    gc.disable()
    try:
        for row in stream(model, SHORT, 20):
            assert row
            break
        assert [loop() for loop in loops] == [None]
    finally:
        gc.enable()


def test_breaking_off_a_stream_keeps_what_came_and_harms_nothing(model):
    whole = generate(model, SHORT, 20).tokens[0]
    steps = stream(model, SHORT, 20)
    came = [next(steps)[0] for _ in range(BLOCK)]
    steps.close()
    assert list(steps) == []
    assert steps.output.tokens == [came] == [whole[:BLOCK]]
    assert steps.output.finish_reasons == [None]
    assert generate(model, SHORT, 20).tokens[0] == whole


def test_a_stream_that_is_closed_or_read_to_its_end_holds_no_cache(model, monkeypatch):
    prefill, loops = Loop.prefill, []
    monkeypatch.setattr(
        Loop, "prefill", lambda loop: loops.append(weakref.ref(loop)) or prefill(loop)
    )
    closed, read = (stream(model, SHORT, 20) for _ in range(2))
    next(closed)
    closed.close()
    assert len(list(read)) == 20
    gc.collect()
    assert [loop() for loop in loops] == [None, None]
    assert len(read.output.tokens[0]) == 20


def test_ctrl_c_inside_a_stream_ends_it_and_leaves_the_model_whole(model, monkeypatch):
    whole = generate(model, SHORT, 4 * BLOCK).tokens[0]
    decode = Loop.decode
    calls = []

    def interrupted(self):
        calls.append(self)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decode(self)

    monkeypatch.setattr(Loop, "decode", interrupted)
    steps = stream(model, SHORT, 4 * BLOCK)
    came = []
    with pytest.raises(KeyboardInterrupt):
        came.extend(row[0] for row in steps)
    assert next(steps, None) is None
    assert steps.output.tokens[0] == whole[: BLOCK + 1]
    monkeypatch.setattr(Loop, "decode", decode)
    assert generate(model, SHORT, 4 * BLOCK).tokens[0] == whole
    assert [row[0] for row in stream(model, SHORT, 4 * BLOCK)] == whole


@pytest.mark.parametrize(
    ("run", "others"), [(generate, 3), (lambda *args, **kw: list(stream(*args, **kw)), 4)]
)
def test_like_requests_compile_once(model, run, others):
    def ask(prompt, count, temperature, seed, stop):
        run(model, [prompt], count, temperature=temperature, seed=seed, stop_token=stop)

    ask(LONG, 9, 1.0, 0, None)
    with compilations() as compiled:
        # Other lengths, counts and options, the same chunks and rounded capacity.
        ask(LONG[:290], 40, 0.5, 3, 7)
        ask(LONG[:290], 40, 0.5, 3, range(20))
    assert compiled == []
    with compilations() as compiled:
        run(model, [SHORT] * others, 9, temperature=1.0)  # another batch: the counter does count
    assert compiled


@pytest.mark.parametrize("committed", [False, True])
def test_all_is_compiled_before_the_clock_starts(model, committed):
    if committed:  # as a model is that was loaded
        graph, state = nnx.split(model)
        model = nnx.merge(graph, jax.device_put(state, jax.devices()[0]))
    request = Request.checked(CONFIG, [LONG] * 2, 20, 0.0, 0, None, None)
    loop = Loop(model, request)
    with compilations() as compiled:
        loop.prefill()
        loop.decode()
        loop.decode()
    assert compiled == []


def test_a_capacity_given_is_shared_by_requests_of_any_length(model):
    generate(model, SHORT, 9, capacity=390)
    generate(model, LONG, 9, capacity=390)
    with compilations() as compiled:
        generate(model, LONG[:100], 17, capacity=390)
    assert compiled == []


def test_chunks_hold_the_prompt_and_keep_the_scores_small():
    wide = preset("llama3.2-1b")
    for config, batch, capacity in [(CONFIG, 1, 512), (wide, 8, 16_384), (wide, 1, 131_072)]:
        for longest in [1, 31, 32, 33, 255, 256, 257, 300, 2000]:
            sizes = chunk_sizes(config, longest, batch, capacity)
            assert sum(sizes) >= longest > sum(sizes[1:])
            assert len(set(sizes)) <= 2
            scores = 4 * batch * config.num_heads * max(sizes) * capacity
            assert scores <= 1 << 30 or max(sizes) == 32
    assert chunk_sizes(CONFIG, 300, 1, 512) == [256, 256]
    assert chunk_sizes(CONFIG, 288, 1, 512) == [32, 256]


def test_last_only_logits_are_the_last_of_all_logits(model):
    tokens = jnp.array([LONG[:6], LONG[6:12]])
    counts = jnp.array([6, 2], jnp.int32)
    whole, grown = model(tokens, KVCache.create(CONFIG, 2, 8, jnp.float32), num_tokens=counts)
    cache = KVCache.create(CONFIG, 2, 8, jnp.float32)
    last, same = model(tokens, cache, num_tokens=counts, last_only=True)
    assert last.shape == (2, CONFIG.vocab_size)
    np.testing.assert_allclose(last, jnp.stack([whole[0, 5], whole[1, 1]]), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(same.lengths, grown.lengths)
    np.testing.assert_allclose(
        model(tokens, last_only=True), model(tokens)[:, -1], rtol=1e-5, atol=1e-6
    )


BAD = {
    "no prompts": ((ValueError, "at least one prompt; the list of prompts is empty"), [[], 4]),
    "empty prompt": ((ValueError, "at least one token; prompt 1 is empty"), [[[1], []], 4]),
    "text": ((TypeError, "list of token ids; the prompt is str. Encode it"), ["def", 4]),
    "text in list": ((TypeError, "list of token ids; prompt 0 is str"), [["def", [1]], 4]),
    "no list": ((TypeError, r"flat list of integer token ids; .*shape \(\)"), [5.0, 4]),
    "floats": ((TypeError, "flat list of integer token ids; .*float64"), [[1.0, 2.0], 4]),
    "ragged": ((TypeError, "prompt 0 nests lists"), [[[[1], [2, 3]], [1]], 4]),
    "id too large": (
        (ValueError, "Token ids of tiny are 0 to 52; prompt 1 has 53 at index 2"),
        [[[1], [0, 52, 53]], 4],
    ),
    "id negative": ((ValueError, "the prompt has -1 at index 0"), [[-1, 3], 4]),
    "context": (
        (ValueError, "301 tokens and 100 new ones need 401 positions; tiny was made for 400"),
        [[SHORT, LONG], 100],
    ),
    "capacity": (
        (ValueError, "3 tokens and 8 new ones need 11 positions; the capacity given is 10"),
        [SHORT, 8, {"capacity": 10}],
    ),
    "capacity zero": (
        (ValueError, "capacity must be at least 1, got 0"),
        [SHORT, 8, {"capacity": 0}],
    ),
    "no tokens": ((ValueError, "max_new_tokens must be at least 1, got 0"), [SHORT, 0]),
    "half a token": ((TypeError, "max_new_tokens is an integer, got 1.5"), [SHORT, 1.5]),
    "cold": (
        (ValueError, r"temperature must be 0 \(greedy\).*got -0.1"),
        [SHORT, 4, {"temperature": -0.1}],
    ),
    "nan": (
        (ValueError, "temperature must be 0.*got nan"),
        [SHORT, 4, {"temperature": float("nan")}],
    ),
    "warm": (
        (TypeError, "temperature is a number, got 'warm'"),
        [SHORT, 4, {"temperature": "warm"}],
    ),
    "stop": (
        (ValueError, "stop_token must be in the vocabulary of tiny, 0 to 52; got 53"),
        [SHORT, 4, {"stop_token": 53}],
    ),
    "one stop of several": (
        (ValueError, r"stop_token\[1\] must be at least 0, got -1"),
        [SHORT, 4, {"stop_token": (3, -1)}],
    ),
    "half a stop": (
        (TypeError, r"stop_token\[0\] is an integer, got 0.5"),
        [SHORT, 4, {"stop_token": [0.5]}],
    ),
    "stop at a text": (
        (TypeError, "a token id, a sequence of them, or None; got 'end'. Encode"),
        [SHORT, 4, {"stop_token": "end"}],
    ),
    "seed": (
        (ValueError, "A seed is an integer from 0 to 2\\^64 - 1, got -1"),
        [SHORT, 4, {"seed": -1}],
    ),
    "large seed": (
        (ValueError, "A seed is an integer from 0 to 2\\^64 - 1, got 18446744073709551616"),
        [SHORT, 4, {"seed": 2**64}],
    ),
    "large seeds": ((ValueError, "A seed is an integer"), [SHORT, 4, {"seed": [2**70]}]),
    "half a seed": (
        (TypeError, "A seed is an integer from 0 to 2\\^64 - 1, got 0.5"),
        [SHORT, 4, {"seed": 0.5}],
    ),
    "seed of a text": (
        (TypeError, "A seed is an integer from 0 to 2\\^64 - 1, got '12'"),
        [SHORT, 4, {"seed": "12"}],
    ),
    "seeds": ((ValueError, "there are 2 for 1 prompts"), [SHORT, 4, {"seed": [1, 2]}]),
    "name": (
        (
            ValueError,
            "implementation is one of 'pallas', 'pallas_mosaic_gpu', 'xla' or None, got 'cuda'",
        ),
        [SHORT, 4, {"implementation": "cuda"}],
    ),
    "batch": (
        (ValueError, "1 to 8 sequences; there are 9 prompts"),
        [[SHORT] * 9, 4, {"implementation": "pallas"}],
    ),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("run", [generate, stream])
def test_bad_input_gets_a_sentence(model, run, what):
    (error, message), (prompts, count, *options) = BAD[what]
    with pytest.raises(error, match=message):
        run(model, prompts, count, **(options[0] if options else {}))


def test_a_named_implementation_that_cannot_run_here_raises(model):
    # Float32 weights: the fused kernel cannot run them on any device.
    with pytest.raises(NotImplementedError, match=r"The fused kernel .*implementation='xla'"):
        generate(model, SHORT, 4, implementation="pallas")


def test_prefill_and_decode_update_the_cache_in_place(model):
    request = Request.checked(CONFIG, [SHORT, LONG], 20, 0.0, 0, None, None)
    loop = Loop(model, request, None)
    pointers = {array.unsafe_buffer_pointer() for array in (loop._cache.k, loop._cache.v)}
    loop.prefill()
    loop.decode()
    loop.decode()
    now = {array.unsafe_buffer_pointer() for array in (loop._cache.k, loop._cache.v)}
    assert now == pointers
