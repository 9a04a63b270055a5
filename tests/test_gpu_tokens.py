"""Fused steps of several tokens a sequence on a GPU, against the reference."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import filled_cache, random_model, small_config
from flax import nnx
from numerics import assert_close
from quantize_cases import FOR_KERNELS, kernel_config
from stream_cases import FAMILIES

from ffjax.cache import KVCache
from ffjax.config import ModelConfig, preset
from ffjax.decode import DecodeOutput, Implementation, Kernel, decode_step
from ffjax.formats import INT8, WeightFormats, int4
from ffjax.quantization import quantized_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("error", "ignore:The Pallas Triton backend:DeprecationWarning"),
]

TOKENS = {2: [0, 39, 63, 300], 3: [38, 517], 4: [253, 40], 8: [505]}
# Deep and narrow, as small trained models are.
DEEP = {
    "num_layers": 30,
    "model_dim": 576,
    "ffw_dim": 1536,
    "num_heads": 9,
    "num_kv_heads": 3,
    "vocab_size": 4096,
}


class Split(NamedTuple):
    """A model in the parts that jit takes."""

    config: ModelConfig
    graph: Any
    params: Any


def split(config: ModelConfig) -> Iterator[Split]:
    parts = Split(config, *nnx.split(random_model.__wrapped__(config)))
    yield parts
    for array in jax.tree.leaves(parts.params):
        array.delete()


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="cache")
def step(
    implementation: Implementation, graph, params, cache: KVCache, tokens, live
) -> DecodeOutput:
    model = nnx.merge(graph, params)
    return decode_step(model, cache, tokens, live, implementation=implementation)


def started(config: ModelConfig, lengths: list[int], tokens: int, capacity: int) -> KVCache:
    cache = filled_cache(config, lengths, capacity)  # NaN where nobody may read
    made = KVCache.create(config, len(lengths), 1, tokens=tokens)
    return dataclasses.replace(cache, wide_counters=made.wide_counters)


def stored(cache: KVCache, lengths: list[int], tokens: int) -> np.ndarray:
    """Keys and values of the new positions."""
    at = jnp.array(lengths)[:, None] + jnp.arange(tokens)
    b = jnp.arange(len(lengths))[:, None]
    return np.asarray(jnp.stack([x[:, b, :, at] for x in (cache.k, cache.v)]).astype(jnp.float32))


def check(
    parts: Split,
    lengths: list[int],
    tokens: int,
    capacity: int,
    tolerance: str,
    kernel: Kernel = "pallas",
) -> None:
    """Two steps, of which the first one's last token does not count."""
    some = jax.random.randint(
        jax.random.key(7), (2, len(lengths), tokens), 0, parts.config.vocab_size
    )
    live = jnp.full((len(lengths),), tokens - 1)
    after = [n + tokens - 1 for n in lengths]
    seen = []
    names: tuple[Implementation, ...] = (kernel, kernel, "xla")
    for name in names:
        cache = started(parts.config, lengths, tokens, capacity)
        first = step(name, parts.graph, parts.params, cache, some[0], live)
        assert first.cache.lengths.tolist() == after
        logits, token = np.asarray(first.logits), np.asarray(first.token)
        second = step(name, parts.graph, parts.params, first.cache, some[1], None)
        new = stored(second.cache, after, tokens)
        seen.append((logits, np.asarray(second.logits), new, token, np.asarray(second.token)))
        assert second.cache.lengths.tolist() == [n + tokens for n in after]
        del cache, first, second
    got, again, want = seen
    assert [x.tobytes() for x in got] == [x.tobytes() for x in again]
    for ours, theirs in zip(got[:3], want[:3], strict=True):
        assert_close(ours, theirs, tolerance)
    assert got[3].tolist() == got[0].argmax(axis=-1).tolist()
    assert got[4].tolist() == got[1].argmax(axis=-1).tolist()


@pytest.mark.parametrize("kernel", get_args(Kernel))
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", ["llama", *FAMILIES])
def test_several_tokens_of_every_family(name, tokens, kernel):
    config = small_config(**FAMILIES.get(name, {"num_heads": 4, "num_kv_heads": 2}))
    close = "fused_vs_model" if config.num_layers <= 4 else "fused_vs_model_deep"
    for parts in split(config):
        check(parts, TOKENS[tokens], tokens, 640, close, kernel)


@pytest.mark.parametrize("heads", [(1, 1), (8, 4), (12, 2), (16, 2), (16, 1)])
@pytest.mark.parametrize("head_dim", [32, 128, 256])
def test_however_many_queries_share_a_head(heads, head_dim):
    sizes = {"num_heads": heads[0], "num_kv_heads": heads[1], "head_dim": head_dim}
    for parts in split(small_config(**sizes)):
        check(parts, [445], 8, 600, "fused_vs_model")
        check(parts, [30, 200], 3, 600, "fused_vs_model")


@pytest.mark.parametrize("name", FOR_KERNELS)
@pytest.mark.parametrize("tokens", [2, 8])
def test_several_tokens_of_quantized_weights(name, tokens):
    for parts in split(kernel_config(FOR_KERNELS[name])):
        check(parts, [60] * (8 // tokens), tokens, 140, "fused_vs_model")


# Rows of 576 inputs are no whole groups of int4.
@pytest.mark.parametrize(
    "formats", [WeightFormats(), WeightFormats.of_layers(INT8), WeightFormats(down=int4())]
)
@pytest.mark.parametrize("tokens", [2, 8])
@pytest.mark.parametrize("kernel", get_args(Kernel))
def test_several_tokens_of_a_deep_narrow_model(formats, tokens, kernel):
    config = quantized_config(small_config(**DEEP), formats)
    for parts in split(config):
        check(parts, [200], tokens, 300, "fused_vs_model_deep", kernel)


@pytest.mark.parametrize(
    "name", ["llama3.2-1b", "llama3.1-8b", "gemma3-1b", "qwen3-0.6b", "olmo2-1b", "gemma2-2b"]
)
def test_several_tokens_of_real_shapes(name):
    for parts in split(preset(name)):
        check(parts, [4093], 8, 4352, "fused_vs_model_deep")
        check(parts, [127, 1020], 4, 4352, "fused_vs_model_deep")


@pytest.mark.parametrize("weights", [INT8, int4()])
def test_several_tokens_of_quantized_real_shapes(weights):
    for parts in split(quantized_config(preset("llama3.2-1b"), WeightFormats.of_layers(weights))):
        check(parts, [513], 8, 1024, "fused_vs_model_deep")


def test_steps_of_one_and_of_several_tokens_in_turn():
    """Each kind has its own exchange, whose tags go on from where its last step left them."""
    config = small_config(**DEEP)
    for parts in split(config):
        some = jax.random.randint(jax.random.key(7), (60, 2, 4), 0, config.vocab_size)
        ended = []
        names: tuple[Implementation, ...] = ("pallas", "pallas", "xla")
        for name in names:
            cache, logits = started(config, [100, 37], 4, 400), []
            for i in range(60):
                given = (some[i], (i + jnp.arange(2)) % 4) if i % 3 else (some[i, :, 0], None)
                out = step(name, parts.graph, parts.params, cache, *given)
                cache = out.cache
                logits.append(np.asarray(out.logits))
            ended.append((logits, cache.lengths.tolist()))
        got, again, want = ended
        assert [x.tobytes() for x in got[0]] == [x.tobytes() for x in again[0]]
        assert got[1] == want[1]
        for ours, theirs in zip(got[0], want[0], strict=True):
            assert_close(ours, theirs, "fused_vs_model_deep")


@pytest.mark.parametrize("kernel", get_args(Kernel))
@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_hidden_states_of_a_deep_model(tokens, kernel):
    """As a draft head reads them, low, middle and high; beside the embedding and the last one."""
    config, layers = small_config(**DEEP), (2, 15, 27, 0, 30)
    lengths = {1: [300], 2: [0, 39, 63, 300], 8: [505]}[tokens]
    shape = (len(lengths), tokens) if tokens > 1 else (len(lengths),)
    some = jax.random.randint(jax.random.key(7), shape, 0, config.vocab_size)
    for parts in split(config):

        @functools.partial(jax.jit, static_argnums=0)
        def seen(name, params, cache, graph=parts.graph):
            model = nnx.merge(graph, params)
            return decode_step(model, cache, some, hidden_layers=layers, implementation=name).hidden

        cache = started(config, lengths, max(tokens, 2), 640)
        got, again, want = (
            np.asarray(seen(name, parts.params, cache)) for name in (kernel, kernel, "xla")
        )
        assert got.shape == (*shape, 5, config.model_dim)
        assert got.tobytes() == again.tobytes()
        for place in range(len(layers)):  # each on its own scale
            assert_close(got[..., place, :], want[..., place, :], "fused_vs_model_deep")
