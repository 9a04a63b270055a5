"""Fused steps of several tokens a sequence, interpreted, against the model."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import QUICK_COMPILE, dims_of, filled_cache, random_model, small_config
from flax import nnx
from numerics import assert_close
from quantize_cases import FOR_KERNELS, kernel_config
from spec_cases import alone, check_buffers
from step_cases import bits
from stream_cases import FAMILIES, check_several, env_of, machine

from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.decode import DecodeOutput, fused_step, reference_step
from pallas_kernels.stream import kv_splits
from pallas_kernels.stream.plan import LOT
from pallas_kernels.stream.planner import make_stream_plan

pytestmark = [
    pytest.mark.once(
        "A sample of shapes shows what a JAX makes of the interpreted kernel.",
        sample=[
            "test_several_tokens_match_the_model[gemma3-2]",
            "test_a_step_refuses_what_is_not_its_own",
        ],
    ),
    pytest.mark.by_numpy(but=["test_several_tokens_match_the_model[gemma3-2]"]),
    pytest.mark.filterwarnings("error"),
]

# Around the window of 40 and a tile's end at 64, and where new positions are in two tiles.
LENGTHS = {2: [0, 39, 63, 100], 3: [38, 126], 4: [61, 40], 8: [57]}


@functools.partial(jax.jit, static_argnums=(0, 5), compiler_options=QUICK_COMPILE)
def _step(graph, params, cache, tokens, live, fused: bool) -> DecodeOutput:
    model = nnx.merge(graph, params)
    if fused:
        return fused_step(model, cache, tokens, live, interpret=True)
    return reference_step(model, cache, tokens, live)


def step(model, cache, tokens, live=None, *, fused: bool) -> DecodeOutput:
    return _step(*nnx.split(model), cache, tokens, live, fused)


def start(config: ModelConfig, lengths: list[int], tokens: int, capacity: int = 140):
    """A cache in the middle of its life, NaN where nobody may read; and tokens `[B, T]`."""
    cache = filled_cache(config, lengths, capacity, tokens=tokens)
    shape = len(lengths), tokens
    return cache, jax.random.randint(jax.random.key(5), shape, 0, config.vocab_size)


# With all columns in use, and with other numbers of tokens. `test_gpu_tokens.py` has all.
BOTH = [(name, 8) for name in ("mistral", "olmo2", "gemma2", "gemma3")]
BOTH += [("gemma3", 2), ("mistral", 2), ("qwen2", 3), ("granite", 3), ("qwen3", 4), ("olmo3", 2)]


@pytest.mark.drawn(
    "Each mechanism once, with 2, 3 and 8 tokens; below are 4.",
    sample=[
        "test_several_tokens_match_the_model[gemma3-2]",
        "test_several_tokens_match_the_model[olmo2-8]",
        "test_several_tokens_match_the_model[gemma2-8]",
        "test_several_tokens_match_the_model[qwen2-3]",
        "test_several_tokens_match_the_model[granite-3]",
    ],
)
@pytest.mark.parametrize(("name", "tokens"), BOTH)
def test_several_tokens_match_the_model(name, tokens):
    config, lengths = small_config(**FAMILIES[name]), LENGTHS[tokens]
    model = random_model(config)
    cache, some = start(config, lengths, tokens)
    # How many count is always said: without it there would be a program more. Others below lack it.
    every = jnp.full(len(lengths), tokens, jnp.int32)
    got, want = (step(model, cache, some, every, fused=fused) for fused in (True, False))
    check_several(got, want, cache, tokens)
    if tokens < 8:  # a sample: each takes a compilation
        made = got.logits, got.token, got.cache
        check_buffers(alone(model, cache, some), model, cache, some, made)
    # Another step reads what this one has stored, of each sequence's first ones alone.
    live = jnp.arange(len(lengths)) % tokens
    after = [n + k for n, k in zip(lengths, live.tolist(), strict=True)]
    got, want = (step(model, cache, some, live, fused=fused) for fused in (True, False))
    assert got.cache.lengths.tolist() == after
    other = (some + 7) % config.vocab_size
    before = got.cache
    got, want = (step(model, out.cache, other, every, fused=out is got) for out in (got, want))
    check_several(got, want, before, tokens)


def test_several_tokens_are_what_they_are_one_by_one():
    """Also for a cache that steps of one token go on with, and in turn."""
    config = small_config(num_kv_heads=2)
    model, lengths = random_model(config), [62, 5]
    cache, some = start(config, lengths, 4)
    out = step(model, cache, some, fused=True)
    single, logits = cache, []
    for t in range(4):
        one = step(model, single, some[:, t], fused=True)
        single = one.cache
        logits.append(one.logits)
    assert_close(out.logits, jnp.stack(logits, axis=1), "fused_vs_model")
    for fused_cache in (out.cache, single):
        behind = step(model, fused_cache, some[:, 0], fused=True)
        want = step(model, fused_cache, some[:, 0], fused=False)
        assert_close(behind.logits, want.logits, "fused_vs_model")
        twice = step(model, behind.cache, some, fused=True)
        want = step(model, behind.cache, some, fused=False)
        assert_close(twice.logits, want.logits, "fused_vs_model")


@pytest.mark.drawn(
    "The fewest and the most queries.",
    sample=[
        "test_however_many_queries_share_a_head[heads1-8]",
        "test_however_many_queries_share_a_head[heads3-2]",
    ],
)
@pytest.mark.parametrize(
    ("heads", "tokens"), [((1, 1), 2), ((4, 4), 8), ((12, 2), 8), ((16, 1), 2)]
)
def test_however_many_queries_share_a_head(heads, tokens):
    config = small_config(num_heads=heads[0], num_kv_heads=heads[1], head_dim=32, num_layers=1)
    model, lengths = random_model(config), [63]
    cache, some = start(config, lengths, tokens)
    got, want = (step(model, cache, some, fused=fused) for fused in (True, False))
    check_several(got, want, cache, tokens)


@pytest.mark.drawn(
    "Mixed weights have matrices of int8.",
    sample=[
        "test_several_tokens_of_quantized_weights_match_the_model[int4 and its head]",
        "test_several_tokens_of_quantized_weights_match_the_model[mixed]",
    ],
)
@pytest.mark.parametrize("name", ["int8", "int4 and its head", "mixed"])
def test_several_tokens_of_quantized_weights_match_the_model(name):
    model = random_model(kernel_config(FOR_KERNELS[name]))
    cache, some = start(model.config, [63], 8)
    got, want = (step(model, cache, some, fused=fused) for fused in (True, False))
    check_several(got, want, cache, 8)


def test_tokens_that_a_full_cache_has_no_slot_for_get_nan():
    config = small_config()
    model, lengths = random_model(config), [61, 20]
    cache, some = start(config, lengths, 4, capacity=64)
    got, want = (step(model, cache, some, fused=fused) for fused in (True, False))
    assert np.isnan(got.logits[0, 3]).all()
    there = ~np.isnan(np.asarray(want.logits))
    assert there.any(axis=-1).tolist() == [[True, True, True, False], [True] * 4]
    assert_close(got.logits[there], want.logits[there], "fused_vs_model")
    assert got.cache.lengths.tolist() == [65, 24]
    live = step(model, cache, some, jnp.array([3, 4]), fused=True)
    assert live.cache.lengths.tolist() == [64, 24]
    assert bits(live.logits) == bits(got.logits)


def test_a_step_refuses_what_is_not_its_own():
    config = small_config()
    model = random_model(config)
    cache, some = start(config, [5], 4)
    with pytest.raises(ValueError, match="made for another number of tokens"):
        fused_step(model, cache, some[:, :2], interpret=True)
    plain = KVCache.create(config, 1, 64)
    with pytest.raises(ValueError, match=r"tokens=4\)"):
        fused_step(model, plain, some, interpret=True)
    with pytest.raises(NotImplementedError, match="1 sequences of 9"):
        fused_step(model, plain, jnp.zeros((1, 9), jnp.int32), interpret=True)
    with pytest.raises(ValueError, match=r"shape \[1\]; got \[2\]"):
        fused_step(model, cache, some, jnp.array([1, 2]), interpret=True)
    with pytest.raises(TypeError, match="integers"):
        fused_step(model, cache, some, jnp.array([1.0]), interpret=True)


# What programs are told of their parts: no interpreted step reads it


def told(monkeypatch, plan, lengths: list[int]) -> np.ndarray:
    """The rows of all programs' tables, for each of these lengths: [lengths, P, kinds, rows, 8]."""
    written = []
    monkeypatch.setattr(kv_splits.ptx, "write_row", lambda at, words, there: written.append(words))
    monkeypatch.setattr(kv_splits.access, "meet", lambda: None)

    def rows(length, program):
        written.clear()
        env = dataclasses.replace(env_of(plan, 0), lengths=(length,), program=program)
        kv_splits.make_part_table(env, jnp.int32(0))
        return jnp.stack([jnp.stack(words, axis=1) for words in written])

    of_all = jax.vmap(jax.vmap(rows, (None, 0)), (0, None))
    programs = jnp.arange(plan.programs)
    run = jax.jit(of_all, compiler_options=QUICK_COMPILE)
    return np.asarray(run(jnp.array(lengths, jnp.int32), programs))


def seen_of(row: np.ndarray, plan) -> np.ndarray:
    """How often each query of the part's head sees each position, as `CacheFeed` has it."""
    d, cut = plan.dims, plan.attention
    unit, live, tiles, new, slot, query, _, position = row.tolist()
    first, lots, spare = query & 0xFF, query >> 8 & 0xFF, query >> 16
    assert tiles == -(-(live + new) // cut.block)
    start = unit * 8 // d.head_dim - slot * d.capacity
    made = np.zeros((d.queries, d.capacity + d.tokens), int)
    if new:
        assert (new, start + live) == (d.tokens, position)
    else:
        assert live % cut.block == 0
    assert 1 <= lots <= cut.abreast
    for n in range(first, min(first + LOT * lots, d.queries)):
        token = n // d.q_per_kv
        begin = max(token - spare, 0) if d.features.window is not None else 0
        made[n, start + begin : start + (live + token + 1 if new else live)] += 1
    return made


@pytest.mark.parametrize(
    ("window", "tokens", "heads", "programs"),
    [(1, 2, 3, 7), (3, 8, 1, 7), (40, 8, 16, 7), (300, 3, 2, 7), (None, 4, 4, 7), (40, 8, 12, 40)],
)
def test_every_query_sees_its_window_once(window, tokens, heads, programs, monkeypatch):
    fields = {} if window is None else {"window": window, "window_pattern": (True, False)}
    config = small_config(num_heads=heads, **fields)
    plan = make_stream_plan(dims_of(config, 1, 700, tokens), machine(programs))
    edge = window or 256
    lengths = sorted({0, 1, *range(max(edge - 9, 0), edge + 2), 256, 511, 512, 695, 700, 703})
    tables = told(monkeypatch, plan, lengths)
    for length, programs in zip(lengths, tables, strict=True):
        for kind in range(programs.shape[1]):  # local ones after the others
            rows = [row for table in programs[:, kind] for row in table[1 : 1 + table[0, 0]]]
            sees = np.sum([seen_of(row, plan) for row in rows], axis=0)
            length = min(length, 700)  # a full cache's new positions have no slot
            last = length + np.arange(plan.dims.queries)[:, None] // plan.dims.q_per_kv
            position = np.arange(sees.shape[1])
            wanted = position <= last
            if kind == 1 and window is not None:
                wanted &= position > last - window
            assert np.array_equal(sees, wanted), (length, kind)
