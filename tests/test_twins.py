"""Two activations in a word: how far they are rounded, and which tags are told apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.stream.twins import TWIN_TAG_BITS, joined, neighbours, parted, twin_tag

RNG = np.random.default_rng(0)
NORMAL = RNG.standard_normal((2, 4000)).astype(np.float32)


def there_and_back(first, second, tag: int = 1):
    words = jax.jit(joined)(jnp.asarray(first), jnp.asarray(second), jnp.int32(tag))
    return words, np.stack(jax.jit(parted)(words))


@pytest.mark.parametrize("scale", [1.0, 1e-20, 3e30])
@pytest.mark.parametrize("tag", range(4))
def test_twins_are_rounded_to_a_step_of_the_larger_one(scale, tag):
    given = NORMAL * np.float32(scale)
    _, got = there_and_back(given[0], given[1], tag)
    largest = np.abs(given).max(axis=0).astype(np.float64)
    step = 2.0 ** (np.floor(np.log2(largest)) - 9)
    error = np.abs(got.astype(np.float64) - given) / step
    # At the upper end of 11 bits, what would be rounded up is not.
    assert error.max() <= 1
    assert np.mean(error <= 0.5) > 0.99
    # Steps are used up: they are not smaller than said.
    assert error.max() > 0.45


def test_twins_are_closer_than_bfloat16():
    """In the mean over normal numbers, by a factor of 3."""
    _, got = there_and_back(*NORMAL)
    rounded = NORMAL.astype(jnp.bfloat16).astype(np.float32)
    ours, theirs = (np.sqrt(np.mean((x - NORMAL) ** 2)) for x in (got, rounded))
    assert 3 * ours < theirs


def test_whole_numbers_of_steps_are_exact():
    given = RNG.integers(-1023, 1024, (2, 500)).astype(np.float32)
    given[0] = np.where(np.abs(given).max(axis=0) < 512, 512, given[0])
    _, got = there_and_back(*given)
    np.testing.assert_array_equal(got, given)
    _, got = there_and_back(np.array([0, 0, -1024], np.float32), np.array([0, 3, 1], np.float32))
    np.testing.assert_array_equal(got, [[0, 0, -1024], [0, 3, 0]])


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 1])
def test_no_number_stays_none(bad, row):
    given = NORMAL[:, :8].copy()
    given[row, 3] = bad
    _, got = there_and_back(*given)
    assert np.isnan(got).any(axis=0).tolist() == [i == 3 for i in range(8)]
    assert np.isnan(got[:, 3]).all()


def test_hand_overs_that_follow_each_other_have_different_tags():
    words = [there_and_back(NORMAL[0], NORMAL[1], tag)[0] & TWIN_TAG_BITS for tag in range(-4, 8)]
    for tag, some in zip(range(-4, 8), words, strict=True):
        assert (some == twin_tag(jnp.int32(tag))).all()
    for apart in (1, 2, 3):
        for a, b in zip(words, words[apart:], strict=False):
            assert (a != b).all()


def test_a_words_tag_says_nothing_of_its_numbers():
    results = [there_and_back(NORMAL[0], NORMAL[1], tag)[1] for tag in range(4)]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_neighbours_are_told_apart(dtype):
    x = np.arange(4 * 32, dtype=dtype).reshape(4, 32)
    first, second = neighbours(jnp.asarray(x))
    np.testing.assert_array_equal(first, x.ravel()[::2])
    np.testing.assert_array_equal(second, x.ravel()[1::2])


def test_neighbours_do_not_meet():
    first, second = neighbours(jnp.float32([1, np.nan, np.inf, 2]))
    np.testing.assert_array_equal(first, [1, np.inf])
    np.testing.assert_array_equal(second, [np.nan, 2])
