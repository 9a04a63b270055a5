"""The reference model against the oracle, and against itself with and without a cache."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from numerics import assert_close
from reference_cases import (
    CONFIGS,
    DTYPES,
    oracle_weights,
    quick_jit,
    random_model,
    random_tokens,
)

from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.model import LayerAt, Transformer, gated, rms_norm
from ffjax.rope import rope_of

pytestmark = [
    pytest.mark.once(
        "A sample of families shows what a JAX makes of the model.",
        sample=[
            "test_each_layer_matches_the_oracle[two ropes, one stretched-bfloat16]",
            "test_prefill_and_steps_match_an_oracle_without_a_cache[heads normed-bfloat16]",
            "test_prefill_and_steps_match_an_oracle_without_a_cache[every scale-float32]",
            "test_each_layer_matches_the_oracle[caps, norms on both sides, GELU-bfloat16]",
            "test_the_whole_model_matches_the_oracle[every scale-float32]",
            "test_padding_leaves_no_trace",
            "test_a_sequence_that_outgrows_the_cache_gets_nan_and_harms_no_other",
            "test_weights_are_stored_stacked_once_and_in_bfloat16",
            "test_bad_input_gets_a_sentence",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

# One set of shapes for most tests, so that they share their compilations.
BATCH, COUNT, CAPACITY, CHUNK = 3, 12, 13, 5
NAME = "grouped, tied, stretched rope"  # the configuration where one is enough
WINDOWED = "every layer local"

every_config = pytest.mark.parametrize("name", CONFIGS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@quick_jit
def _whole(model, tokens):
    return model(tokens)


def whole(model, tokens) -> np.ndarray:
    return np.asarray(_whole(model, tokens))


@quick_jit
def _grow(model, tokens, cache, num_tokens):
    return model(tokens, cache, num_tokens=num_tokens)


def grow(model, tokens, cache, num_tokens=None) -> tuple[np.ndarray, KVCache]:
    # As numpy arrays: jax compiles every slice of another size anew.
    logits, cache = _grow(model, tokens, cache, num_tokens)
    return np.asarray(logits), cache


def stored(cache: KVCache) -> list[np.ndarray]:
    """Keys and values `[L, B, K, S, H]`."""
    return [np.asarray(cache.k), np.asarray(cache.v)]


def empty_cache(model, capacity: int = CAPACITY, fill: float = 0.0) -> KVCache:
    """No live position; every slot holds `fill`."""
    cache = KVCache.create(model.config, BATCH, capacity, model.dtype)
    full = jnp.asarray(np.full(cache.k.shape, fill, cache.k.dtype))
    return dataclasses.replace(cache, k=full, v=full)


@quick_jit
def one_layer(model, index, x):
    """Layer `index` over `x` `[B, T, D]`: the stream after it, keys, values `[B, T, K, H]`."""
    batch, count, _ = x.shape
    c = model.config
    weights = {name: stacked[index] for name, stacked in model.stacked_weights().items()}
    positions = jnp.broadcast_to(jnp.arange(count), (batch, count))
    local = jnp.array(c.local_layers)[index]
    at = LayerAt(index, None if c.window is None else local, weights)
    cache = empty_cache(model, count, jnp.nan)
    ropes = (rope_of(c, count, other=other) for other in (False, True))
    other = jnp.array(c.other_rope_layers)[index]
    rope = jax.tree.map(lambda most, some: jnp.where(other, some, most), *ropes)
    attend, caches = model.attention_over(cache, positions), (cache.k, cache.v)
    x, (k, v) = model.layer(at, x, positions, rope, attend, caches)
    return x, *(jnp.swapaxes(kept[index], 1, 2) for kept in (k, v))


@pytest.mark.drawn("Each configuration, in one of the dtypes; the other tests draw others.")
@every_dtype
@every_config
def test_each_layer_matches_the_oracle(name, dtype):
    model = random_model(name, dtype)
    weights = oracle_weights(model).layers
    shape = (BATCH, COUNT, model.config.model_dim)
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    assert len(weights) == model.config.num_layers
    for index, w in enumerate(weights):
        got = [np.asarray(y) for y in one_layer(model, jnp.int32(index), x)]
        for b, sequence in enumerate(x.astype(np.float64)):
            c = model.config
            want = oracle.layer(sequence, w, c, c.local_layers[index], c.rotating_layers[index])
            # What the layer adds, so that the stream passing through flatters nothing.
            assert_close(got[0][b] - x[b], want.x - sequence, f"model_vs_oracle_{dtype}")
            assert_close(got[1][b], want.keys, f"model_vs_oracle_{dtype}")
            assert_close(got[2][b], want.values, f"model_vs_oracle_{dtype}")


@pytest.mark.drawn("Each configuration, in one of the dtypes; the other tests draw others.")
@every_dtype
@every_config
def test_the_whole_model_matches_the_oracle(name, dtype):
    model = random_model(name, dtype)
    tokens = random_tokens(model.config, BATCH, COUNT)
    logits = whole(model, tokens)
    assert logits.dtype == jnp.float32
    for b, row in enumerate(tokens):
        want, _ = oracle.forward(row.tolist(), oracle_weights(model), model.config)
        assert_close(logits[b], want, f"model_vs_oracle_{dtype}")


@pytest.mark.drawn("Each configuration, in one of the dtypes; the other tests draw others.")
@every_dtype
@every_config
def test_prefill_and_steps_match_an_oracle_without_a_cache(name, dtype):
    model = random_model(name, dtype)
    weights, tolerance = oracle_weights(model), f"model_vs_oracle_{dtype}"
    tokens = random_tokens(model.config, BATCH, COUNT)
    ends = np.array([CHUNK, 2, 1], np.int32)
    prompts = tokens[:, :CHUNK]
    logits, cache = grow(model, prompts, empty_cache(model, fill=jnp.nan), ends)
    logits = logits[np.arange(BATCH), ends - 1]
    for _ in range(4):
        for b, end in enumerate(ends):
            want = oracle.next_logits(tokens[b, :end].tolist(), weights, model.config)
            assert_close(logits[b], want, tolerance)
        logits, cache = grow(model, tokens[np.arange(BATCH), ends][:, None], cache)
        logits, ends = logits[:, 0], ends + 1
    assert cache.lengths.tolist() == ends.tolist()
    for b, end in enumerate(ends):
        _, layers = oracle.forward(tokens[b, :end].tolist(), weights, model.config)
        for index, want in enumerate(layers):
            for got, kept in zip(stored(cache), (want.keys, want.values), strict=True):
                assert_close(got[index, b, :, :end].swapaxes(0, 1), kept, tolerance)


@pytest.mark.drawn("Each configuration, in one of the dtypes; the other tests draw others.")
@every_dtype
@every_config
def test_a_cache_changes_nothing(name, dtype):
    """Prefill in padded chunks and then single steps, each sequence at a pace of its own."""
    model, tolerance = random_model(name, dtype), f"cached_vs_whole_{dtype}"
    tokens = random_tokens(model.config, BATCH, COUNT)
    want = whole(model, tokens)
    cache = empty_cache(model, fill=jnp.nan)
    done = np.zeros(BATCH, np.int32)
    for width, counts in [(CHUNK, [5, 1, 4]), (CHUNK, [2, 5, 0]), *[(1, [1, 1, 1])] * 5]:
        chunk = np.full((BATCH, width), 7, np.int32)  # what is not overwritten is padding
        for b, n in enumerate(counts):
            chunk[b, :n] = tokens[b, done[b] : done[b] + n]
        num_tokens = np.array(counts, np.int32) if width > 1 else None
        logits, cache = grow(model, chunk, cache, num_tokens)
        for b, n in enumerate(counts):
            if n:
                assert_close(logits[b, :n], want[b, done[b] : done[b] + n], tolerance)
        done += np.array(counts, np.int32)
        assert cache.lengths.tolist() == done.tolist()
    assert done.tolist() == [12, 11, 9]


@every_dtype
@pytest.mark.parametrize("name", [NAME, WINDOWED, "two ropes, one stretched"])
def test_what_lies_beyond_the_live_positions_is_never_read(name, dtype):
    model = random_model(name, dtype)
    tokens = random_tokens(model.config, BATCH, CHUNK + 2)
    counts = np.array([5, 2, 1], np.int32)
    outputs = []
    for fill in (0.0, 3.0, np.inf, np.nan):
        cache = empty_cache(model, fill=fill)
        logits, cache = grow(model, tokens[:, :CHUNK], cache, counts)
        outputs.append([logits[b, :n] for b, n in enumerate(counts)])
        for t in (CHUNK, CHUNK + 1):
            logits, cache = grow(model, tokens[:, t : t + 1], cache)
            outputs[-1].append(logits)
        for b, n in enumerate(counts):
            outputs[-1] += [x[:, b, :, : n + 2] for x in stored(cache)]
    for poisoned in outputs:
        for x, y in zip(outputs[0], poisoned, strict=True):
            assert np.isfinite(x).all()
            np.testing.assert_array_equal(x, y)


def test_padding_leaves_no_trace():
    model = random_model(NAME, "float32")
    tokens = random_tokens(model.config, BATCH, CHUNK)
    counts = np.array([5, 2, 1], np.int32)
    other = tokens.copy()
    for b, n in enumerate(counts):
        other[b, n:] = (other[b, n:] + 1) % model.config.vocab_size
    kept = []
    for padded in (tokens, other):
        logits, cache = grow(model, padded, empty_cache(model), counts)
        after, cache = grow(model, tokens[:, :1], cache)
        kept.append([logits[0], logits[1, :2], logits[2, :1], after])
        for b, n in enumerate(counts):
            kept[-1] += [x[:, b, :, : n + 1] for x in stored(cache)]
    for x, y in zip(*kept, strict=True):
        np.testing.assert_array_equal(x, y)


def test_padding_may_reach_beyond_the_capacity():
    model = random_model(NAME, "float32")
    tokens = random_tokens(model.config, BATCH, COUNT)
    want = whole(model, tokens)
    cache = empty_cache(model)
    # Of the last chunk, three positions have no slot: one row's padding, and nothing else.
    for counts, first in [([5, 5, 1], [0, 0, 0]), ([5, 1, 1], [5, 5, 1]), ([2, 1, 1], [10, 6, 2])]:
        chunk = np.stack([np.resize(row[i:], CHUNK) for row, i in zip(tokens, first, strict=True)])
        logits, cache = grow(model, chunk, cache, np.array(counts, np.int32))
    assert cache.lengths.tolist() == [12, 7, 3]
    for b, (n, i) in enumerate([(2, 10), (1, 6), (1, 2)]):
        assert_close(logits[b, :n], want[b, i : i + n], "cached_vs_whole_float32")


@every_dtype
def test_a_sequence_that_outgrows_the_cache_gets_nan_and_harms_no_other(dtype):
    model = random_model(NAME, dtype)
    tokens = random_tokens(model.config, BATCH, COUNT)
    want = whole(model, tokens)
    cache = empty_cache(model, CHUNK)
    counts = np.array([CHUNK, 2, CHUNK], np.int32)
    _, cache = grow(model, tokens[:, :CHUNK], cache, counts)
    before = [x[:, ::2] for x in stored(cache)]  # the first and the third sequence
    for t in (2, 3):  # one position too many, and one more than that
        step = np.array([[tokens[0, 5]], [tokens[1, t]], [tokens[2, 5]]])
        logits, cache = grow(model, step, cache)
        assert np.isnan(logits[::2]).all()
        assert_close(logits[1, 0], want[1, t], f"cached_vs_whole_{dtype}")
        # Dropped, and not wrapped onto a position that is alive.
        for x, y in zip(before, stored(cache), strict=True):
            np.testing.assert_array_equal(x, y[:, ::2])


def test_a_prefill_that_outgrows_the_cache_gets_nan():
    model = random_model(NAME, "float32")
    tokens = random_tokens(model.config, BATCH, CHUNK)
    logits, _ = grow(model, tokens, empty_cache(model, 3))
    assert np.isnan(logits[:, 3:]).all()
    last, _ = nnx.jit(lambda m, t, c: m(t, c, last_only=True))(model, tokens, empty_cache(model, 3))
    assert np.isnan(last).all()


@every_dtype
def test_a_row_of_a_batch_equals_the_row_alone(dtype):
    model = random_model(NAME, dtype)
    tokens = random_tokens(model.config, BATCH, COUNT)
    together = whole(model, tokens)
    for b in range(BATCH):
        alone = whole(model, tokens[b : b + 1])
        assert_close(together[b], alone[0], f"cached_vs_whole_{dtype}")


def test_logits_do_not_depend_on_later_tokens():
    model = random_model(NAME, "float32")
    tokens = random_tokens(model.config, BATCH, COUNT)
    changed = tokens.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % model.config.vocab_size
    first, second = whole(model, tokens), whole(model, changed)
    np.testing.assert_array_equal(first[:, :6], second[:, :6])
    assert (first[:, 6:] != second[:, 6:]).any(axis=-1).all()


def test_a_window_sees_so_many_positions_and_no_more():
    """Three layers of a window of 4 hand a token on by 3 positions each, 9 in all."""
    model = random_model(WINDOWED, "float32")
    assert (model.config.num_layers, model.config.window) == (3, 4)
    tokens = random_tokens(model.config, BATCH, COUNT)
    for changed in (0, 1, 2):
        other = tokens.copy()
        other[:, changed] = (other[:, changed] + 1) % model.config.vocab_size
        differs = (whole(model, tokens) != whole(model, other)).any(axis=(0, 2))
        reached = np.arange(COUNT) - changed
        np.testing.assert_array_equal(differs, (reached >= 0) & (reached <= 9))


@every_dtype
def test_what_a_window_has_left_behind_is_never_read(dtype):
    model = random_model(WINDOWED, dtype)
    assert model.config.window == 4
    tokens = random_tokens(model.config, BATCH, CHUNK + 3)
    counts = np.array([5, 3, 1], np.int32)
    _, cache = grow(model, tokens[:, :CHUNK], empty_cache(model), counts)
    # Of the slots of a window of 4, the next token's own is one: three are left.
    old = np.arange(CAPACITY) <= counts[:, None] - 4  # [B, S]
    assert old.any(axis=1).tolist() == [True, False, False]
    poisoned = dataclasses.replace(
        cache,
        k=jnp.where(old[:, None, :, None], jnp.nan, cache.k),
        v=jnp.where(old[:, None, :, None], jnp.nan, cache.v),
    )
    for t in range(CHUNK, CHUNK + 3):
        clean, cache = grow(model, tokens[:, t : t + 1], cache)
        logits, poisoned = grow(model, tokens[:, t : t + 1], poisoned)
        assert np.isfinite(logits).all()
        np.testing.assert_array_equal(logits, clean)


def test_a_window_as_long_as_the_sequence_changes_nothing():
    model = random_model("grouped, untied", "float32")
    tokens = random_tokens(model.config, BATCH, COUNT)
    local = random_model("grouped, untied", "float32", config=(("window", COUNT),))
    np.testing.assert_array_equal(whole(local, tokens), whole(model, tokens))


def test_the_residual_stream_keeps_what_bfloat16_would_lose():
    """Beside a stream of a thousand, bfloat16 drops what is smaller than 2."""
    model = random_model(NAME, "bfloat16")
    shape = (BATCH, COUNT, model.config.model_dim)
    x = 1000 * np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    out = np.asarray(one_layer(model, jnp.int32(1), x)[0])
    stream = x[0].astype(np.float64)
    want = oracle.layer(stream, oracle_weights(model).layers[1], model.config)
    assert_close(out[0] - x[0], want.x - stream, "model_vs_oracle_bfloat16")


def test_logits_of_bfloat16_weights_are_float32_numbers():
    logits = whole(random_model(NAME, "bfloat16"), random_tokens(CONFIGS[NAME], BATCH, COUNT))
    assert logits.dtype == np.float32
    assert np.mean(logits != logits.astype(jnp.bfloat16).astype(np.float32)) > 0.9


def test_rms_norm_is_float32_and_has_its_epsilon_inside():
    x = jnp.array([[3.0, -4.0], [0.0, 0.0]], jnp.bfloat16)
    got = rms_norm(x, jnp.array([2.0, 1.0], jnp.bfloat16), 0.5)
    assert got.dtype == jnp.float32
    scale = 1 / np.sqrt(12.5 + 0.5)
    np.testing.assert_allclose(got, [[6 * scale, -4 * scale], [0, 0]], rtol=1e-6)


def test_norm_weights_are_added_to_their_offset_in_float32():
    """Bfloat16 would round 1 + 2^-9 to 1."""
    x, weight = jnp.array([3.0, -4.0]), jnp.array([2**-9, 0.0], jnp.bfloat16)
    scale = 1 / np.sqrt(12.5 + 0.5)
    got = rms_norm(x, weight, 0.5, 1.0)
    np.testing.assert_allclose(got, [3 * scale * (1 + 2**-9), -4 * scale], rtol=1e-6)


def test_gelu_of_bfloat16_gates_keeps_its_tail():
    """At -3, the formula's 1 + tanh is 0.003: of that bfloat16 arithmetic would leave nothing."""
    gate = jnp.linspace(-3.5, 3.5, 57).astype(jnp.bfloat16)
    up = jnp.full_like(gate, 1.5)
    x = np.asarray(gate, np.float64)
    want = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    got = gated(gate, up, "gelu_tanh")
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), 1.5 * want, rtol=2**-7)


@every_dtype
def test_the_embeddings_scale_is_rounded_to_the_weights_dtype(dtype):
    """As transformers does it, sqrt(3072) is 55.5 beside bfloat16 weights."""
    tokens = random_tokens(CONFIGS["every scale"], BATCH, COUNT)
    exact, rounded = (
        whole(random_model("every scale", dtype, config=(("embed_scale", scale),)), tokens)
        for scale in (3072**0.5, 55.5)
    )
    assert np.array_equal(exact, rounded) == (dtype == "bfloat16")


def test_residual_scales_do_not_round_what_a_block_gives():
    """In bfloat16 the product with 0.37 would have another rounding."""
    model = random_model("every scale", "bfloat16", config=(("residual_scale", 0.37),))
    block = jnp.linspace(0.1, 2.0, 37).astype(jnp.bfloat16)[None, None]
    got = model._add(jnp.zeros(block.shape), block, None)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.asarray(block, np.float64) * 0.37, rtol=1e-6)


def _operations(config: ModelConfig) -> int:
    """How many operations the model's program has, those of its loop's body included."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    lowered = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens)).lower(state, tokens)
    return lowered.as_text().count("stablehlo.")


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_offset": 0.5},
        {"post_norm": True},
        {"qk_norm": "head"},
        {"qkv_bias": True},
        {"embed_scale": 2.0},
        {"residual_scale": 2.0},
        {"logit_scale": 2.0},
        {"attn_softcap": 2.0},
        {"logit_softcap": 2.0},
        {"window": 2},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_field_at_its_default_costs_nothing(fields):
    """No product with 1 and no mask of all: Llama's program, and its numbers, are Llama's."""
    config = CONFIGS[NAME]
    assert _operations(dataclasses.replace(config, **fields)) > _operations(config)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_stored_stacked_once_and_in_bfloat16(tied):
    config = dataclasses.replace(CONFIGS[NAME], tied_embeddings=tied)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    found = {
        ".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model))
    }
    expected = {
        "embed": (101, 37),
        "final_norm": (37,),
        "layers.attn_norm": (3, 37),
        "layers.qkv": (3, (6 + 2 * 2) * 14, 37),
        "layers.attn_out": (3, 37, 6 * 14),
        "layers.mlp_norm": (3, 37),
        "layers.gate_up": (3, 2 * 53, 37),
        "layers.down": (3, 37, 53),
    }
    assert found == expected | ({} if tied else {"head": (101, 37)})
    leaves = jax.tree.leaves(nnx.state(model))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert sum(leaf.size for leaf in leaves) == config.num_params


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"qkv_bias": True}, {"layers.qkv_bias": (3, (6 + 2 * 2) * 14)}),
        ({"qk_norm": "head"}, {"layers.q_norm": (3, 14), "layers.k_norm": (3, 14)}),
        ({"qk_norm": "full"}, {"layers.q_norm": (3, 6 * 14), "layers.k_norm": (3, 2 * 14)}),
        (
            {"post_norm": True},
            {"layers.attn_post_norm": (3, 37), "layers.mlp_post_norm": (3, 37)},
        ),
        (
            {"post_norm": True, "pre_norm": False},
            {
                "layers.attn_post_norm": (3, 37),
                "layers.mlp_post_norm": (3, 37),
                "layers.attn_norm": None,
                "layers.mlp_norm": None,
            },
        ),
    ],
    ids=str,
)
def test_a_family_has_the_weights_it_asks_for_and_no_other(fields, expected):
    def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
        leaves = nnx.to_flat_state(nnx.state(model))
        return {".".join(map(str, path)): leaf.shape for path, leaf in leaves}

    config = dataclasses.replace(CONFIGS[NAME], **fields)
    found = shapes(config)
    want = {k: v for k, v in (shapes(CONFIGS[NAME]) | expected).items() if v is not None}
    assert found == want
    assert sum(map(math.prod, found.values())) == config.num_params


def test_norms_start_as_the_identity_and_biases_at_zero():
    config = dataclasses.replace(
        CONFIGS[NAME], norm_offset=0.75, post_norm=True, qk_norm="head", qkv_bias=True
    )

    @jax.jit  # drops the weights that are not returned, which would take seconds
    def start() -> dict[str, jax.Array]:
        leaves = nnx.to_flat_state(nnx.state(Transformer(config, rngs=nnx.Rngs(0))))
        named = {".".join(map(str, path)): leaf[...] for path, leaf in leaves}
        return {name: x for name, x in named.items() if "norm" in name or "bias" in name}

    started = start()
    assert len(started) == 4 + 2 + 1 + 1
    for name, values in started.items():
        assert (values == (0 if name == "layers.qkv_bias" else 0.25)).all(), name


def test_random_weights_have_the_documented_spread():
    config = ModelConfig(
        vocab_size=211,
        num_layers=2,
        model_dim=128,
        ffw_dim=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=20,
    )
    model = Transformer(config, rngs=nnx.Rngs(3), dtype=jnp.float32)
    assert model.head is not None
    spreads = {
        "embed": (model.embed, 0.02),
        "head": (model.head, 128**-0.5),
        "qkv": (model.layers.qkv, 128**-0.5),
        "attn_out": (model.layers.attn_out, 80**-0.5),
        "gate_up": (model.layers.gate_up, 128**-0.5),
        "down": (model.layers.down, 96**-0.5),
    }
    for name, (param, spread) in spreads.items():
        # The deviation of some ten thousand draws is known to 1 %.
        np.testing.assert_allclose(np.std(param[...]), spread, rtol=0.04, err_msg=name)
    again = Transformer(config, rngs=nnx.Rngs(3), dtype=jnp.float32)
    other = Transformer(config, rngs=nnx.Rngs(4), dtype=jnp.float32)
    assert np.array_equal(model.layers.qkv[...], again.layers.qkv[...])
    assert not np.array_equal(model.layers.qkv[...], other.layers.qkv[...])


BAD = {
    "one axis": (ValueError, r"Tokens come as [B, T], got shape (4,).", [0, 1, 2, 3], {}),
    "three axes": (ValueError, r"Tokens come as [B, T], got shape (1, 1, 1).", [[[0]]], {}),
    "floats": (TypeError, "Tokens are integers, got float32.", [[0.0, 1.0]], {}),
    "padding without a cache": (
        ValueError,
        "num_tokens marks padding for a cache; without a cache leave it out.",
        [[0, 1]],
        {"num_tokens": [1]},
    ),
    "another batch": (
        ValueError,
        "The cache holds 3 sequences, got tokens for 2.",
        [[0], [1]],
        {"cache": (3, "float32")},
    ),
    "another dtype": (
        TypeError,
        "Cache and weights share a dtype, got bfloat16 and float32. Make the cache with "
        "KVCache.create(model.config, batch, capacity, model.dtype).",
        [[0], [1]],
        {"cache": (2, "bfloat16")},
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_a_sentence(what):
    error, sentence, tokens, options = BAD[what]
    model, options = random_model(NAME, "float32"), dict(options)
    if "num_tokens" in options:
        options["num_tokens"] = jnp.array(options["num_tokens"])
    if "cache" in options:
        batch, dtype = options["cache"]
        options["cache"] = KVCache.create(model.config, batch, 4, jnp.dtype(dtype))
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        model(jnp.array(tokens), **options)
