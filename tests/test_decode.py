"""The selector, and what a step shares with the model and the cache: their buffers."""

import dataclasses
import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import QUICK_COMPILE, filled_cache, random_model, random_tokens, small_config
from flax import nnx

from ffjax import decode
from ffjax.cache import KVCache
from ffjax.decode import (
    decode_step,
    decode_weights,
    fused_step,
    resolve_implementation_config,
    why_not_fused,
    why_not_fused_config,
)
from ffjax.model import Transformer
from ffjax.said import say_once
from pallas_kernels.gpu import INTERPRETER
from pallas_kernels.launch import named_weights
from pallas_kernels.stream.plan import LAYER_SEGMENTS, Segment

pytestmark = pytest.mark.filterwarnings("error")

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU cannot do")


@pytest.fixture(scope="module")
def model():
    return random_model(small_config())


@pytest.fixture
def cache(model):
    return filled_cache(model.config, [5, 0], 20)


@pytest.fixture
def tokens(model):
    return random_tokens(model.config, 2)


@on_cpu
def test_without_a_name_a_cpu_takes_the_reference_and_says_so_once(model, cache, tokens, caplog):
    say_once.cache_clear()  # another test may have made it speak
    with caplog.at_level(logging.INFO, logger="ffjax"):
        got = decode_step(model, cache, tokens)
        decode_step(model, cache, tokens)
    [message] = [record.getMessage() for record in caplog.records if record.name == "ffjax"]
    assert message.startswith("decode_step uses 'xla': The fused kernel runs on NVIDIA GPUs")
    assert "this is cpu (cpu)" in message
    want = decode_step(model, cache, tokens, implementation="xla")
    assert got.logits.tolist() == want.logits.tolist()


@on_cpu
def test_a_named_kernel_that_cannot_run_raises_the_reason(model, cache, tokens):
    with pytest.raises(NotImplementedError, match=r"NVIDIA GPUs of .* this is cpu.*Use impl") as e:
        decode_step(model, cache, tokens, implementation="pallas")
    assert str(e.value) == why_not_fused(model, cache.batch, cache.capacity)
    assert str(e.value) == why_not_fused_config(model.config, jnp.bfloat16, 2, cache.capacity)
    with pytest.raises(NotImplementedError, match="runs on NVIDIA GPUs"):
        fused_step(model, cache, tokens)


def test_a_device_that_can_takes_the_kernel(model, cache, tokens, caplog, monkeypatch):
    took = object()
    monkeypatch.setattr(decode.Gpu, "of", lambda device: INTERPRETER)
    monkeypatch.setattr(decode, "fused_step", lambda *arguments, **how: took)
    say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="ffjax"):
        assert decode_step(model, cache, tokens) is took
    assert "uses 'pallas'" in caplog.text
    assert decode_step(model, cache, tokens, implementation="pallas") is took
    assert decode_step(model, cache, tokens, implementation="xla") is not took


def test_the_kernels_former_name_is_taken_with_a_warning(model, cache, tokens, monkeypatch):
    took, former = object(), "pallas_stream"
    monkeypatch.setattr(decode.Gpu, "of", lambda device: INTERPRETER)
    monkeypatch.setattr(decode, "fused_step", lambda *arguments, **how: took)
    with pytest.warns(FutureWarning, match=f"implementation='{former}' is called 'pallas' now"):
        assert decode_step(model, cache, tokens, implementation=former) is took  # pyright: ignore[reportArgumentType]


def test_a_model_the_kernel_cannot_hold_is_refused(monkeypatch):
    wide = small_config(num_layers=1, model_dim=16_384)
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(wide, rngs=nnx.Rngs(0))))
    shapes = nnx.merge(graph, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), state))
    monkeypatch.setattr(decode.Gpu, "of", lambda device: INTERPRETER)
    assert why_not_fused(shapes, 1, 8) is None
    reason = why_not_fused(shapes, 2, 8)
    assert reason is not None
    assert "this model has 16384" in reason


def test_a_model_that_does_not_exist_can_be_asked_about(monkeypatch):
    """One that no memory could hold: nothing of it is made."""
    vast = small_config(num_layers=10_000, model_dim=16_384, vocab_size=10**6)
    asked = vast, "bfloat16", 2, 10**6
    monkeypatch.setattr(decode.Gpu, "of", lambda device: INTERPRETER)
    assert resolve_implementation_config(*asked) == "xla"
    one = vast, "bfloat16", 1, 10**6
    assert why_not_fused_config(*one) is None
    assert resolve_implementation_config(*one) == "pallas"
    reason = why_not_fused_config(*asked)
    assert reason is not None
    assert "this model has 16384" in reason
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        resolve_implementation_config(*asked, "pallas")
    assert "these are float32" in (why_not_fused_config(vast, jnp.float32, 1, 8) or "")
    assert "there are 9" in (why_not_fused_config(vast, jnp.bfloat16, 9, 8) or "")
    assert resolve_implementation_config(vast, jnp.float32, 1, 8) == "xla"
    assert resolve_implementation_config(*asked, "xla") == "xla"


def test_a_limit_of_the_kernel_is_raised_on_any_device(tokens):
    wide = random_model(small_config(head_dim=48))
    with pytest.raises(NotImplementedError, match="these have 48"):
        fused_step(wide, filled_cache(wide.config, [0, 0], 8), tokens, interpret=True)


def test_an_unknown_name_is_refused(model, cache, tokens):
    with pytest.raises(
        ValueError, match="one of 'pallas', 'pallas_mosaic_gpu', 'xla' or None, got 'cuda'"
    ):
        decode_step(model, cache, tokens, implementation="cuda")  # pyright: ignore[reportArgumentType]


def test_inputs_that_do_not_fit_are_refused(model, cache, tokens):
    with pytest.raises(ValueError, match=r"shape \[2\], or several, \[2, T\]; got \[3\]"):
        decode_step(model, cache, jnp.zeros((3,), jnp.int32))
    with pytest.raises(ValueError, match=r"\[2, T\]; got \[2, 1, 1\]"):
        decode_step(model, cache, tokens[:, None, None])
    several = decode_step(model, cache, tokens[:, None])
    assert several.logits.shape == (2, 1, model.config.vocab_size)
    with pytest.raises(TypeError, match="Tokens are integers, got float32"):
        decode_step(model, cache, tokens.astype(jnp.float32))
    wide = KVCache.create(model.config, 2, 8, jnp.float32)
    with pytest.raises(TypeError, match="share a dtype, got float32 and bfloat16"):
        decode_step(model, wide, tokens)


def test_a_list_is_no_array_of_a_cache(model, cache, tokens):
    listed = dataclasses.replace(cache, lengths=cache.lengths.tolist())
    with pytest.raises(TypeError, match=r"lengths are int32, got list\. Make the cache with"):
        decode_step(model, listed, tokens)


# Each with what the length of `counters`, which the fused kernel compares, does not tell.
OTHER_CACHES = {
    "fewer layers": (
        lambda c: dataclasses.replace(c, k=c.k[:1], v=c.v[:1]),
        r"= \[2, B, 1, S, 64\]; got \[1, 2, 1, 20, 64\]\. Make the cache with KVCache\.create",
    ),
    "more key heads": (
        lambda c: dataclasses.replace(c, k=c.k.repeat(2, 2), v=c.v.repeat(2, 2)),
        r"got \[2, 2, 2, 20, 64\]",
    ),
    "smaller heads": (
        lambda c: dataclasses.replace(c, k=c.k[..., :32], v=c.v[..., :32]),
        r"got \[2, 2, 1, 20, 32\]",
    ),
    "slots before heads": (
        lambda c: dataclasses.replace(c, k=c.k.swapaxes(2, 3), v=c.v.swapaxes(2, 3)),
        r"got \[2, 2, 20, 1, 64\]",
    ),
    "a layer": (lambda c: dataclasses.replace(c, k=c.k[0]), r"got \[2, 1, 20, 64\]"),
    "fewer values": (
        lambda c: dataclasses.replace(c, v=c.v[:, :, :, :8]),
        r"as many values as keys, \[2, 2, 1, 20, 64\]; got values \[2, 2, 1, 8, 64\]",
    ),
    "one length": (
        lambda c: dataclasses.replace(c, lengths=c.lengths[:1]),
        r"for 2 sequences has lengths of shape \[2\]; got \[1\]",
    ),
    "no counters": (
        lambda c: dataclasses.replace(c, counters=c.counters[:0]),
        r"for 2 sequences has counters of shape \[\d+\]; got \[0\]",
    ),
    "wide values": (
        lambda c: dataclasses.replace(c, v=c.v.astype(jnp.float32)),
        "share a dtype, got float32 and bfloat16",
    ),
    "lengths of floats": (
        lambda c: dataclasses.replace(c, lengths=c.lengths.astype(jnp.float32)),
        "A cache's lengths are int32, got float32",
    ),
    "short lengths": (
        lambda c: dataclasses.replace(c, lengths=c.lengths.astype(jnp.int16)),
        "A cache's lengths are int32, got int16",
    ),
    "counters of bits": (
        lambda c: dataclasses.replace(c, counters=c.counters.astype(jnp.uint32)),
        "A cache's counters are int32, got uint32",
    ),
}
STEPS = {
    "reference": functools.partial(decode_step, implementation="xla"),
    "fused": functools.partial(fused_step, interpret=True),
}


@pytest.mark.parametrize("what", OTHER_CACHES)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_another_models_cache_is_refused(model, cache, tokens, what, step):
    other, sentence = OTHER_CACHES[what]
    with pytest.raises((ValueError, TypeError), match=sentence):
        step(model, other(cache), tokens)
    with pytest.raises((ValueError, TypeError), match=sentence):
        jax.eval_shape(functools.partial(step, model), other(cache), tokens)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_negative_length_that_can_be_seen_is_refused(model, cache, tokens, step):
    for lengths in (jnp.array([5, -3], jnp.int32), np.array([5, -3], np.int32)):
        with pytest.raises(ValueError, match="0 or more, got -3 for sequence 1"):
            step(model, dataclasses.replace(cache, lengths=lengths), tokens)


@pytest.mark.once(
    "The other step shows it.",
    sample=["test_a_negative_length_that_is_traced_counts_as_zero[reference]"],
)
@pytest.mark.by_numpy
@pytest.mark.parametrize("name", STEPS)
def test_a_negative_length_that_is_traced_counts_as_zero(model, tokens, name):
    """It writes its own first slot and no other sequence's."""
    step = STEPS[name]
    empty = filled_cache(model.config, [5, 0], 20)
    jitted = jax.jit(functools.partial(step, model), compiler_options=QUICK_COMPILE)
    want = jitted(empty, tokens)
    for length in (-1, -20, -(2**31)):
        below = dataclasses.replace(empty, lengths=jnp.array([5, length], jnp.int32))
        for got, wanted in zip(
            jax.tree.leaves(jitted(below, tokens)), jax.tree.leaves(want), strict=True
        ):
            assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes()


@pytest.mark.parametrize(
    "fields",
    [
        {"tied_embeddings": False},
        {"tied_embeddings": True},
        {
            **{"qkv_bias": True, "attn_out_bias": True, "mlp_bias": True},
            **{"qk_norm": "head", "post_norm": True},
        },
        {"qk_norm": "full", "post_norm": True, "pre_norm": False},
    ],
    ids=["untied", "tied", "all there is", "norms after alone"],
)
def test_the_kernels_read_the_models_own_buffers(fields):
    model = random_model(small_config(**fields))
    weights = decode_weights(model, 16)
    own = {name: p for name, p in vars(model.layers).items() if isinstance(p, nnx.Param)}
    own |= {"embed": model.embed, "final_norm": model.final_norm}
    own["head"] = model.embed if model.head is None else model.head
    given = {name for name, array in weights._asdict().items() if array is not None}
    assert set(own) == given - {"inv_freq"}
    # A weight has one name, down to the kernel's copies.
    assert set(named_weights(weights)) == given
    assert {segment.matrix for segment in (*LAYER_SEGMENTS, Segment.HEAD)} <= set(own)
    for name, param in own.items():
        view = getattr(weights, name)
        assert view.unsafe_buffer_pointer() == param[...].unsafe_buffer_pointer(), name
    # And there is no weight that the kernels are not given.
    assert len(jax.tree.leaves(nnx.state(model))) == len(own) - (model.head is None)


@pytest.mark.parametrize("implementation", ["fused", "xla"])
def test_a_donated_cache_is_updated_in_place(model, tokens, implementation):
    graph, params = nnx.split(model)

    def step(params, cache, tokens):
        model = nnx.merge(graph, params)
        if implementation == "fused":
            return fused_step(model, cache, tokens, interpret=True)
        return decode_step(model, cache, tokens, implementation="xla")

    cache = filled_cache(model.config, [5, 0], 20)
    kept = jax.tree.map(jnp.copy, cache)
    before = [x.unsafe_buffer_pointer() for x in (cache.k, cache.v)]
    jitted = jax.jit(step, donate_argnames="cache", compiler_options=QUICK_COMPILE)
    out = jitted(params, cache, tokens)
    assert [x.unsafe_buffer_pointer() for x in (out.cache.k, out.cache.v)] == before
    assert cache.k.is_deleted()
    assert cache.v.is_deleted()
    live = np.arange(20)[:, None] < np.asarray(kept.lengths)[:, None, None, None]
    for new, old in ((out.cache.k, kept.k), (out.cache.v, kept.v)):
        assert np.where(live, new, 0).tobytes() == np.where(live, old, 0).tobytes()
