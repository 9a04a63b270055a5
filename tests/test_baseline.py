"""The XLA baseline computes every family: what the reference says, out of arrays of its own."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import filled_cache, random_tokens
from numerics import assert_close, assert_same_choice
from reference_cases import CONFIGS, random_model

from ffjax.benchmark import inputs
from ffjax.benchmark.baseline import LayerCaches, baseline_step, split_cache, split_weights
from ffjax.benchmark.check import observe
from ffjax.benchmark.contenders import baseline
from ffjax.benchmark.inputs import first_tokens, started_cache
from ffjax.config import ModelConfig
from ffjax.decode import reference_step

pytestmark = [
    pytest.mark.once(
        "What is timed and how it is printed is arithmetic; a sample runs the programs.",
        sample=[
            "test_the_baseline_says_what_the_reference_says[two ropes, one stretched-batch 3]",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

CAPACITY, RING, STEPS = 40, 16, 4
# Every field in which families differ is in one of these.
FAMILIES = (
    "every layer local",
    "biases, the second layer local",
    "every bias",
    "heads normed",
    "norms after the blocks, projections normed",
    "every scale",
    "caps, norms on both sides, GELU",
    "two ropes, one stretched",
    "part of a head rotated, LongRoPE",  # beyond its context, which a ring is not
    "every second layer without positions, YaRN",
)


@pytest.fixture(autouse=True, scope="module")
def _small_and_quick() -> Iterator[None]:
    """Rings of a multiple of 16 slots, which few steps pass around; programs compiled in haste."""
    careful = jax.config.values["jax_disable_most_optimizations"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "_CAPACITY_STEP", RING)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", careful)


def _poisoned(config: ModelConfig, cache: LayerCaches) -> LayerCaches:
    """NaN keys, and values that would show, in every slot that the next query does not see."""

    def poisoned(layer: jax.Array, local: bool, poison: float) -> jax.Array:
        slots = layer.shape[2]
        seen = np.zeros((len(cache.lengths), slots), bool)
        for row, length in enumerate(cache.lengths.tolist()):
            first = max(0, length + 1 - (config.window or 0)) if local else 0
            seen[row, np.arange(first, length) % slots] = True
        return jnp.where(seen[:, None, :, None], layer, poison)

    def each(layers: tuple[jax.Array, ...], poison: float) -> tuple[jax.Array, ...]:
        pairs = zip(layers, config.local_layers, strict=True)
        return tuple(poisoned(layer, local, poison) for layer, local in pairs)

    return LayerCaches(each(cache.k, jnp.nan), each(cache.v, 1e4), cache.lengths, cache.capacity)


# Before, at and beyond every window, and where a ring begins again.
@pytest.mark.drawn("Each configuration, with one of the batches.")
@pytest.mark.parametrize(
    "starts",
    [([1], [3], [RING - 2], [25]), ([2, 4, 25], [CAPACITY - STEPS, 0, RING - 1])],
    ids=["batch 1", "batch 3"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_baseline_says_what_the_reference_says(name, starts):
    model, config = random_model(name, "bfloat16"), CONFIGS[name]
    weights = split_weights(model)
    reference = jax.jit(functools.partial(reference_step, model))
    step = jax.jit(functools.partial(baseline_step, config))
    for lengths in starts:
        cache, tokens = filled_cache(config, lengths, CAPACITY), random_tokens(config, len(lengths))
        own = _poisoned(config, split_cache(config, cache, STEPS))
        sizes = [RING if local else CAPACITY for local in config.local_layers]
        assert [k.shape[2] for k in own.k] == [v.shape[2] for v in own.v] == sizes
        for taken in range(1, STEPS + 1):
            want, out = reference(cache, tokens), step(weights, own, tokens)
            assert_close(out.logits, want.logits, "cached_vs_whole_bfloat16")
            assert_same_choice(out.logits, want.logits, "cached_vs_whole_bfloat16")
            assert out.token.tolist() == out.logits.argmax(-1).tolist()
            assert out.cache.lengths.tolist() == [n + taken for n in lengths]
            cache, own, tokens = want.cache, out.cache, want.token
        for row, length in enumerate(lengths):
            new = np.arange(length, length + STEPS)
            for stack, layers in ((cache.k, own.k), (cache.v, own.v)):
                for there, here in zip(np.asarray(stack), layers, strict=True):
                    written = np.asarray(here)[row][:, new % here.shape[2]]
                    assert_close(written, there[row][:, new], "cached_vs_whole_bfloat16")


def test_a_local_layers_ring_holds_the_last_positions_and_zeros():
    config = CONFIGS["biases, the second layer local"]
    lengths = [CAPACITY, 25, 7, 0]
    cache = filled_cache(config, lengths, CAPACITY)
    own = split_cache(config, cache, STEPS)
    for stack, layers in ((cache.k, own.k), (cache.v, own.v)):
        whole = np.asarray(stack, np.float32)
        want = np.zeros((len(lengths), config.num_kv_heads, RING, config.head_dim), np.float32)
        for row, length in enumerate(lengths):
            for position in range(max(0, length - RING), length):
                want[row, :, position % RING] = whole[1, row, :, position]
        np.testing.assert_array_equal(np.asarray(layers[1], np.float32), want)
        assert layers[0].shape == whole[0].shape


def test_a_loop_through_a_ring_can_be_rewound_and_run_again():
    """A ring of 16 would hold the window, but not what these 12 steps overwrite of it."""
    position, capacity = 52, 64
    model = random_model("every layer local", "bfloat16", config=(("window", 12),))
    ours = baseline(model)
    cache = started_cache(model.config, 2, position, capacity)
    assert ours.adopt(cache).k[0].shape[2] == 2 * RING
    assert observe(ours, cache, first_tokens(model.config, 2), capacity - position).repeats
