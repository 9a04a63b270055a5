"""Rounding of weights near the ends of what numbers can hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffjax.formats import INT8, int4
from ffjax.rounding import expand, round_matrix

_round = jax.jit(round_matrix, static_argnums=1)


@pytest.mark.parametrize("format", [INT8, int4(32), int4(128)])
def test_a_power_of_two_changes_the_scales_alone(format):
    """From the least magnitudes to the largest whose scales are ordinary numbers."""
    weight = np.random.default_rng(7).standard_normal((4, 256)).astype(np.float32)
    integers, scale = _round(weight, format)
    for power in (-110, -60, -1, 60, 120):
        others, other = _round(np.ldexp(weight, power), format)
        np.testing.assert_array_equal(others, integers)
        np.testing.assert_array_equal(
            np.asarray(other, np.float32), np.ldexp(np.asarray(scale, np.float32), power)
        )


@pytest.mark.once(
    "Numbers are as extreme with any Python.",
    sample=["test_extreme_weights_are_no_zeros_and_not_infinite[20-1e-36-format1]"],
)
@pytest.mark.drawn("Any two of a format, a size and a spread.", pairs=True)
@pytest.mark.parametrize("format", [INT8, int4(32)])
@pytest.mark.parametrize("size", [3e38, 1e30, 1e25, 1e-30, 1e-36, 2e-38])
@pytest.mark.parametrize("spread", [0, 20, 60])
def test_extreme_weights_are_no_zeros_and_not_infinite(format, size, spread):
    """Groups far apart, and within a group; what is off is off by a scale of its own at most."""
    rng = np.random.default_rng(8)
    weight = rng.uniform(-1, 1, (8, 256)) * 2.0 ** -rng.integers(0, spread + 1, (8, 256))
    weight = (weight * size).astype(np.float32)
    weight[np.abs(weight) < 2.0**-126] = 0  # what devices take for zero
    integers, scale = _round(weight, format)
    found = np.asarray(expand(integers, scale, format, jnp.float32), np.float64)
    assert np.isfinite(found).all()
    groups = (8, 1, 256) if format.group_size is None else (8, -1, format.group_size)
    scale = np.abs(np.asarray(scale, np.float64).reshape(groups[0], -1, 1))
    off = np.abs(found - weight).reshape(groups)
    # int4 may choose integers of which the largest magnitude is beyond by three quarters.
    assert (off <= scale * (0.51 if format.group_size is None else 2.1)).all()
    largest = np.abs(weight.astype(np.float64)).reshape(groups).max(axis=-1, keepdims=True)
    assert (scale[largest > 0] > 0).all()
    assert (scale <= np.maximum(largest / 5, 2.0**-125)).all()
