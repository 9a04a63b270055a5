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


@pytest.mark.parametrize("scale", [1.0, 1e-2, 3e3])
@pytest.mark.parametrize("ratio", [1, 128, 1024, 4096, 2**16, 2**-14])
@pytest.mark.parametrize("tag", range(4))
def test_twins_keep_9_bits_each_whatever_their_neighbour_is(scale, ratio, tag):
    given = NORMAL * np.float32(scale)
    given[0] *= np.float32(ratio)
    _, got = there_and_back(given[0], given[1], tag)
    step = 2.0 ** (np.floor(np.log2(np.abs(given.astype(np.float64)))) - 8)
    error = np.abs(got.astype(np.float64) - given) / step
    assert error.max() <= 0.5 + 2.0**-31 / step.min()
    # Steps are used up: they are not smaller than said.
    assert (error > 0.45).any(axis=1).all()


def test_twins_are_closer_than_bfloat16():
    """In the mean over normal numbers, by a factor of 2: they have a bit more."""
    _, got = there_and_back(*NORMAL)
    rounded = NORMAL.astype(jnp.bfloat16).astype(np.float32)
    ours, theirs = (np.sqrt(np.mean((x - NORMAL) ** 2)) for x in (got, rounded))
    assert 1.95 * ours < theirs


def test_numbers_of_9_bits_are_exact():
    given = RNG.integers(256, 512, (2, 500)) * 2.0 ** RNG.integers(-8, 24, (2, 500))
    given = (given * RNG.choice([-1, 1], given.shape)).astype(np.float32)
    _, got = there_and_back(*given)
    np.testing.assert_array_equal(got, given)


def test_a_word_of_nothing_but_a_tag_is_zeros():
    words, got = there_and_back(np.float32([0, -0.0]), np.float32([0, 1e-38]), 2)
    np.testing.assert_array_equal(words, np.asarray(twin_tag(jnp.int32(2))))
    np.testing.assert_array_equal(got, np.zeros((2, 2)))


def test_what_is_too_small_becomes_zero_and_what_is_too_large_infinite():
    top = 511 * 2.0**23
    given = np.array([[1e-38, -(2.0**-34), -top, 3e38], [-1e-12, 2.0**-41, top, -(2.0**32)]])
    _, got = there_and_back(*given.astype(np.float32))
    np.testing.assert_array_equal(got, [[0, 0, -top, np.inf], [0, 0, top, -np.inf]])
    # Half a step more is rounded up, and so to infinity.
    _, got = there_and_back(np.float32([-top - 2.0**22]), np.float32([top + 2.0**22 - 256]))
    np.testing.assert_array_equal(got, np.float32([[-np.inf], [top]]))


def test_small_numbers_are_exact_to_a_step_that_all_share():
    given = (NORMAL * np.float32(2.0**-26)).astype(np.float32)
    _, got = there_and_back(*given)
    error = np.abs(got.astype(np.float64) - given)
    assert (error <= np.abs(given) * 2.0**-9 + 2.0**-31).all()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 1])
def test_no_number_stays_none(bad, row):
    given = NORMAL[:, :8].copy()
    given[row, 3] = bad
    _, got = there_and_back(*given)
    assert (~np.isfinite(got)).any(axis=0).tolist() == [i == 3 for i in range(8)]
    assert np.isnan(got[row, 3]) == np.isnan(bad)
    assert np.isfinite(got[1 - row, 3])


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFFC00000])
def test_a_nan_of_any_bits_stays_one(bits):
    given = np.full((2, 1), bits, np.uint32).view(np.float32)
    _, got = there_and_back(*given)
    assert np.isnan(got).all()


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
