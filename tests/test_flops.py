"""A prompt's operations and the rate of dense products, against counts by hand and by XLA."""

import dataclasses

import jax
import pytest
from bench_cases import CONFIG, FAMILY

from ffjax.benchmark.dense_rate import DenseRate, default_size, dense_rate
from ffjax.benchmark.flops import prompt_flops, visible_pairs
from ffjax.benchmark.inputs import random_model
from ffjax.benchmark.span import Span
from ffjax.benchmark.timing import Samples
from ffjax.config import PRESETS, ModelConfig
from ffjax.formats import INT8, WeightFormats

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("length", [1, 6, 7, 8, 40])
@pytest.mark.parametrize("window", [None, 1, 7, 99])
def test_pairs_are_those_that_a_query_sees(length, window):
    back = length if window is None else window
    pairs = sum(1 for q in range(length) for k in range(length) if q - back < k <= q)
    assert visible_pairs(length, window) == pairs


def test_operations_by_hand():
    """Matrices [96 + 32, 48], [48, 64], [160, 48] and [48, 80], three layers, a head [101, 48]."""
    flops = prompt_flops(CONFIG, [5, 2])
    weights = (64 + 2 * 32) * 48 + 48 * 64 + 160 * 48 + 48 * 80
    assert flops.products == 2 * 7 * 3 * weights
    assert flops.attention == 3 * 4 * 64 * (15 + 3)
    assert flops.head == 2 * 2 * 101 * 48
    assert flops.total == flops.products + flops.attention + flops.head


def test_windows_are_counted_in_local_layers_alone():
    """Layers 0 and 2 of three see 7 positions."""
    flops = prompt_flops(FAMILY, [20])
    assert flops.attention == 4 * 64 * (2 * (28 + 13 * 7) + 210)
    # A tied head multiplies as well, and the embedding is looked up.
    assert flops.head == 2 * 101 * 48


def test_the_format_of_weights_changes_no_count():
    quantized = dataclasses.replace(CONFIG, weights=WeightFormats.of_layers(INT8, INT8))
    assert prompt_flops(quantized, [9]) == prompt_flops(CONFIG, [9])


def test_a_model_of_8b_needs_two_operations_a_weight_and_token():
    config = PRESETS["llama3.1-8b"]
    flops = prompt_flops(config, [8192])
    tables = 2 * config.vocab_size * config.model_dim
    assert flops.products == pytest.approx(2 * 8192 * (config.num_params - tables), rel=1e-3)


def test_the_count_is_about_xlas():
    """The reference computes all scores, and XLA counts norms and softmax: one layer, one head."""
    config = ModelConfig(
        vocab_size=512,
        num_layers=1,
        model_dim=256,
        ffw_dim=512,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
    )
    model, length = random_model(config), 64

    def whole(tokens):
        return model(tokens)

    cost = jax.jit(whole).lower(jax.ShapeDtypeStruct((1, length), "int32")).compile()
    counted = cost.cost_analysis()
    assert counted is not None
    ours = prompt_flops(config, [length])
    hidden = 4 * 2 * 64 * (length**2 - visible_pairs(length, None))
    heads = (length - 1) * ours.head
    assert counted["flops"] == pytest.approx(ours.total + hidden + heads, rel=0.1)


def test_the_rate_is_operations_over_the_median_second():
    rate = DenseRate(10, Samples((1.0, 4.0, 2.0)))
    assert rate.flops_per_second == 1000
    assert rate.product.spread == 1.5


def test_the_rate_is_measured():
    rate = dense_rate(64, repetitions=3)
    assert rate.size == 64
    assert len(rate.product.seconds) == 3
    assert rate.flops_per_second > 0


def test_a_gpu_multiplies_larger_matrices():
    class Device:
        platform = "gpu"

    assert default_size(Device) == 8192
    assert default_size(jax.devices("cpu")[0]) == 1024


def test_lengths_are_evenly_spread():
    assert Span(7, 7).lengths(3) == (7, 7, 7)
    assert Span(10, 1500).lengths(8) == (10, 223, 436, 649, 861, 1074, 1287, 1500)
    assert Span(1, 2).lengths(2) == (1, 2)
    assert (str(Span(7, 7)), str(Span(10, 1500))) == ("7", "10-1500")
