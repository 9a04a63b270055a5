"""The comparisons themselves: what they measure, and that they can fail."""

import jax.numpy as jnp
import numpy as np
import pytest
from numerics import TOLERANCES, assert_close, assert_same_choice, relative_error, worst_error

pytestmark = pytest.mark.filterwarnings("error")

# Limits of 1 % and 4 %.
NAME = "cached_vs_whole_bfloat16"


def rows() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)


def test_errors_are_those_of_the_worst_row():
    want = np.array([[3.0, 4.0], [30.0, 40.0]])
    got = want + np.array([[0.0, 0.05], [0.0, 0.05]])
    assert relative_error(got, want) == pytest.approx(0.05 / 5)
    assert worst_error(got, want) == pytest.approx(0.05 / np.sqrt(12.5))
    assert relative_error(want, want) == worst_error(want, want) == 0
    assert relative_error(np.zeros(3), np.zeros(3)) == 0
    assert relative_error(np.ones(3), np.zeros(3)) == np.inf


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_float_dtype_is_taken_as_it_is(dtype):
    x = jnp.dtype(dtype).type(1.5) * np.ones(4, jnp.dtype(dtype))
    assert relative_error(x, np.full(4, 1.5)) == 0
    assert relative_error(x, np.full(4, 1.0)) == 0.5


def test_an_error_within_the_limits_passes():
    assert_close(rows() * 1.005, rows(), NAME)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_close(value):
    got = rows()
    got[7, 3] = value
    for x, y in ((got, rows()), (rows(), got), (got, got)):
        with pytest.raises(AssertionError, match=r"relative error inf .*worst element inf"):
            assert_close(x, y, NAME)


def test_one_wrong_row_cannot_hide_among_right_ones():
    got = rows()
    got[7] *= 1.02
    with pytest.raises(AssertionError, match=r"relative error 0\.02 "):
        assert_close(got, rows(), NAME)


def test_one_wrong_element_cannot_hide_in_its_row():
    want = np.ones((1, 4096))
    got = want.copy()
    got[0, 5] += 0.1
    assert relative_error(got, want) < TOLERANCES[NAME].relative
    with pytest.raises(AssertionError, match=r"worst element 0\.1 "):
        assert_close(got, want, NAME)


def test_other_shapes_are_not_broadcast():
    with pytest.raises(AssertionError, match=r"Shapes differ: got \(50, 64\), want \(1, 64\)"):
        assert_close(rows(), rows()[:1], NAME)
    with pytest.raises(AssertionError, match="Nothing to compare"):
        assert_close(rows()[:0], rows()[:0], NAME)


def test_choices_may_differ_in_a_near_tie_alone():
    want = np.array([[1.0, 0.98, -1.0, -1.0]])
    assert_same_choice(want, want, NAME)
    assert_same_choice(want[:, [1, 0, 2, 3]], want, NAME)
    with pytest.raises(AssertionError, match="Row 0 chooses token 2, the reference 0: 2 above"):
        assert_same_choice(want[:, [2, 1, 0, 3]], want, NAME)
    with pytest.raises(AssertionError, match="chooses token 0"):
        assert_same_choice(np.full((1, 4), np.nan), want[:, [2, 1, 0, 3]], NAME)


def test_every_tolerance_is_a_number_with_a_reason():
    for name, tolerance in TOLERANCES.items():
        assert 0 < tolerance.relative <= tolerance.worst <= 0.2, name
        assert tolerance.relative < 0.05, name  # a twentieth would hide a missing term
        assert len(tolerance.why) > 20, name
