"""Rotary position embedding against complex rotations, and what it must keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from numerics import assert_close

from ffjax.config import (
    AnyRopeScaling,
    LinearRopeScaling,
    LongRopeScaling,
    ModelConfig,
    RopeScaling,
    YarnRopeScaling,
    preset,
)
from ffjax.loop import BLOCK, slots_for
from ffjax.rope import apply_rope, inverse_frequencies, rope_of

pytestmark = pytest.mark.filterwarnings("error")

SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)


def config(head_dim: int, theta: float, scaling: AnyRopeScaling | None, **fields) -> ModelConfig:
    return ModelConfig(
        vocab_size=11,
        **{"num_layers": 1, **fields},
        model_dim=13,
        ffw_dim=17,
        num_heads=3,
        num_kv_heads=1,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
    )


CONFIGS = {
    "plain": config(64, 10_000.0, None),
    "plain, small": config(14, 300.0, None),
    "stretched": config(22, 500.0, SCALING),
    "stretched evenly": config(26, 700.0, LinearRopeScaling(factor=8.0)),
    "by YaRN": config(26, 40.0, YarnRopeScaling(factor=8.0, original_context=64, beta_fast=4.0)),
    "a part": config(26, 700.0, None, rotary_pairs=5),
    "llama3.2-1b": preset("llama3.2-1b"),
    "llama3.1-8b": preset("llama3.1-8b"),
}
every_config = pytest.mark.parametrize("name", CONFIGS)
rope = jax.jit(apply_rope)


@every_config
def test_frequencies_are_the_formulas_rounded_once(name):
    got = inverse_frequencies(CONFIGS[name])
    assert got.dtype == np.float32
    assert got.shape == (CONFIGS[name].head_dim // 2,)
    # Within one unit in the last place: two ways to write a power in float64.
    wanted = np.zeros_like(got)  # what is not rotated
    angles = oracle.rope_angles(CONFIGS[name])
    wanted[: len(angles)] = angles
    np.testing.assert_array_max_ulp(got, wanted, maxulp=1)


def test_stretching_keeps_short_waves_and_stretches_long_ones():
    plain = inverse_frequencies(config(64, 10_000.0, None)).astype(np.float64)
    scaled = inverse_frequencies(config(64, 10_000.0, SCALING)).astype(np.float64)
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 64 / 4, wavelength > 64 / 1
    between = ~short & ~long
    assert min(short.sum(), long.sum(), between.sum()) >= 3  # or this test would test nothing
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    ratio = scaled / plain
    assert ((ratio[between] > 1 / 8) & (ratio[between] < 1)).all()
    assert (np.diff(ratio[between]) < 0).all()


def test_a_factor_of_one_stretches_nothing():
    none = RopeScaling(factor=1, low_freq_factor=1, high_freq_factor=4, original_context=64)
    np.testing.assert_array_max_ulp(
        inverse_frequencies(config(64, 10_000.0, none)),
        inverse_frequencies(config(64, 10_000.0, None)),
        maxulp=1,
    )


def test_an_even_stretching_divides_every_frequency():
    plain = inverse_frequencies(config(64, 10_000.0, None))
    scaled = inverse_frequencies(config(64, 10_000.0, LinearRopeScaling(factor=8.0)))
    np.testing.assert_array_equal(scaled, plain / 8)  # a power of two: exactly


@pytest.mark.parametrize("scaling", [None, SCALING, LinearRopeScaling(factor=8.0)])
def test_local_layers_have_their_own_base_and_are_not_stretched(scaling):
    c = config(22, 10_000.0, scaling, rope_theta_local=300.0, window=2)
    plain = inverse_frequencies(config(22, 300.0, None))
    np.testing.assert_array_equal(inverse_frequencies(c, other=True), plain)
    np.testing.assert_array_equal(
        inverse_frequencies(c), inverse_frequencies(config(22, 10_000.0, scaling))
    )
    np.testing.assert_array_max_ulp(
        plain, np.array(oracle.rope_angles(c, local=True), np.float32), maxulp=1
    )


@every_config
def test_without_a_base_of_their_own_local_layers_rotate_as_all_do(name):
    c = dataclasses.replace(CONFIGS[name], window=2)
    np.testing.assert_array_equal(inverse_frequencies(c, other=True), inverse_frequencies(c))


@pytest.mark.parametrize(
    ("tolerance", "positions"),
    [("rope_near", [[0, 1, 2], [9, 5, 7]]), ("rope_far", [[4096, 257, 65_537], [131_071, 0, 3]])],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_config
def test_heads_turn_as_complex_numbers_do(name, dtype, tolerance, positions):
    c = CONFIGS[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 5, c.head_dim)).astype(jnp.dtype(dtype))
    got = np.asarray(rope(x, np.array(positions, np.int32), inverse_frequencies(c)))
    assert got.dtype == np.float32
    angles = inverse_frequencies(c).astype(np.float64).tolist()
    want = [
        [[oracle.rotate(h.astype(np.float64), p, angles) for h in heads] for heads, p in rows]
        for rows in (zip(x[b], positions[b], strict=True) for b in range(2))
    ]
    assert_close(got, np.array(want), tolerance)


@every_config
def test_position_zero_turns_nothing(name):
    c = CONFIGS[name]
    x = np.random.default_rng(1).standard_normal((1, 2, 3, c.head_dim)).astype(np.float32)
    got = rope(x, np.zeros((1, 2), np.int32), inverse_frequencies(c))
    np.testing.assert_array_equal(got, x)


@every_config
def test_scores_depend_on_the_distance_alone(name):
    c = CONFIGS[name]
    rng = np.random.default_rng(2)
    query, key = rng.standard_normal((2, 1, 1, 1, c.head_dim)).astype(np.float32)
    frequencies = inverse_frequencies(c)

    def score(i: int, j: int) -> float:
        a = rope(query, np.array([[i]], np.int32), frequencies)
        b = rope(key, np.array([[j]], np.int32), frequencies)
        return float(np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64)))

    scale = float(np.linalg.norm(query) * np.linalg.norm(key))
    assert abs(score(17, 12) - score(5, 0)) < 1e-5 * scale
    assert abs(score(105, 100) - score(5, 0)) < 1e-4 * scale
    assert abs(score(17, 12) - score(12, 17)) > 1e-3 * scale  # the sign matters
    assert abs(score(17, 12) - score(17, 11)) > 1e-3 * scale


def test_positions_beyond_256_are_told_apart_for_bfloat16_heads():
    """Bfloat16 would round 257 to 256, and 40,001 to 39,936."""
    c = CONFIGS["llama3.2-1b"]
    x = np.ones((1, 4, 1, c.head_dim), jnp.bfloat16)
    positions = np.array([[256, 257, 40_000, 40_001]], np.int32)
    got = np.asarray(rope(x, positions, inverse_frequencies(c)))[0, :, 0]
    for near, next_ in ((0, 1), (2, 3)):
        # The first pair turns by one radian a position.
        assert abs(got[near, 0] - got[next_, 0]) > 0.1


LONG = LongRopeScaling(
    short_factors=(1.0, 2.0, 4.0),
    long_factors=(8.0, 16.0, 32.0),
    original_context=64,
    attention_factor=1.5,
)


def test_the_caches_size_says_which_factors_long_rope_takes():
    c = config(8, 100.0, LONG, rotary_pairs=3)
    plain = inverse_frequencies(config(8, 100.0, None, rotary_pairs=3))
    for capacity, factors in ((1, LONG.short_factors), (64, LONG.short_factors)):
        np.testing.assert_array_equal(inverse_frequencies(c, capacity)[:3], plain[:3] / factors)
    np.testing.assert_array_equal(inverse_frequencies(c, 65)[:3], plain[:3] / LONG.long_factors)
    with pytest.raises(ValueError, match=r"depend on the cache: .* Up to 64 slots have the short"):
        inverse_frequencies(c)


def test_what_is_not_rotated_is_not_scaled():
    rope = rope_of(config(8, 100.0, LONG, rotary_pairs=3), 9)
    assert rope.inv_freq[3] == 0
    assert rope.scale is not None
    assert rope.scale.tolist() == [1.5, 1.5, 1.5, 1.0]
    x = np.random.default_rng(3).standard_normal((1, 1, 1, 8)).astype(np.float32)
    got = np.asarray(rope_of_positions(x, rope))
    np.testing.assert_array_equal(got[..., [3, 7]], x[..., [3, 7]])
    norms = np.linalg.norm(got.reshape(2, 4), axis=0) / np.linalg.norm(x.reshape(2, 4), axis=0)
    np.testing.assert_allclose(norms, rope.scale, rtol=1e-6)


def rope_of_positions(x, how):
    return rope(x, np.array([[7]], np.int32), *how)


def test_layers_that_know_no_positions_turn_nothing():
    c = config(8, 100.0, None, num_layers=4, rope_pattern=(True, False))
    other = rope_of(c, 9, other=True)
    x = np.random.default_rng(4).standard_normal((1, 1, 1, 8)).astype(np.float32)
    np.testing.assert_array_equal(rope_of_positions(x, other), x)
    assert (inverse_frequencies(c) > 0).all()


def test_layers_of_another_rotation_are_not_scaled():
    scaling = YarnRopeScaling(factor=4.0, original_context=64, attention_factor=1.5)
    c = config(8, 100.0, scaling, window=3, rope_theta_local=9.0)
    assert np.asarray(rope_of(c, 9).scale).tolist() == [1.5] * 4
    assert np.asarray(rope_of(c, 9, other=True).scale).tolist() == [1.0] * 4


@pytest.mark.parametrize("original", [4096, 8192])
def test_what_fits_the_original_context_but_for_a_block_takes_the_short_factors(original):
    """As docs/huggingface.md says: caches are larger than what is asked for."""
    assert slots_for(original - BLOCK) == original
    assert slots_for(original - BLOCK + 1) > original
