"""Two activations in a word: how far they are rounded, and which tags are told apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.stream.half2 import (
    HALF2_TAG_BITS,
    PLAIN,
    RESIDUAL,
    even_and_odd,
    half2_tag,
    pack_half2,
    unpack_half2,
)

RNG = np.random.default_rng(0)
NORMAL = RNG.standard_normal((2, 4000)).astype(np.float32)
FORMATS = {"plain": PLAIN, "residual": RESIDUAL}
every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def there_and_back(both, form=PLAIN, tag: int = 1):
    """Words of two activations, and what is read from them."""
    first, second = (jnp.asarray(x, jnp.float32) for x in both)
    words = jax.jit(pack_half2, static_argnums=3)(first, second, jnp.int32(tag), form)
    got = np.stack(jax.jit(unpack_half2, static_argnums=1)(words, form))
    return words, got * np.float32(form.unit)


# What a format's numbers have: bits, and the step that all share near 0.
BITS = {PLAIN: 9, RESIDUAL: 10}
LEAST = {PLAIN: 2.0**-28, RESIDUAL: 2.0**-9}
LARGEST = {PLAIN: (2.0**16 - 2.0**6) ** 2, RESIDUAL: 2.0**21 - 2.0**11}


@every_format
@pytest.mark.parametrize("scale", [1.0, 16.0])
@pytest.mark.parametrize("ratio", [1, 128, 1024, 4096, 2**14])
@pytest.mark.parametrize("tag", range(4))
def test_both_halves_keep_their_bits_whatever_their_neighbour_is(form, scale, ratio, tag):
    given = NORMAL * np.float32(scale)
    given[0] *= np.float32(ratio)
    _, got = there_and_back(given, form, tag)
    size = np.abs(given.astype(np.float64))
    if form.root:  # which is rounded, to a bit more
        step = np.sqrt(size) * 2.0 ** (np.floor(np.log2(np.sqrt(size))) - BITS[form] + 1)
    else:  # near 0 all share a step
        step = 2.0 ** (np.floor(np.log2(np.maximum(size, LEAST[form]))) - BITS[form] + 1)
    error = np.abs(got.astype(np.float64) - given) / step
    assert error.max() <= 0.5 + 2e-3
    # Steps are used up: they are not smaller than said.
    assert (error > 0.45).any(axis=1).all()


@every_format
def test_all_numbers_of_the_range_keep_their_bits(form):
    low, high = np.log2(LEAST[form]), np.log2(LARGEST[form])
    given = np.sign(NORMAL) * 2.0 ** RNG.uniform(low, high, NORMAL.shape)
    _, got = there_and_back(given, form)
    relative = np.abs(got.astype(np.float64) / given.astype(np.float32) - 1)
    assert 0.9 < relative.max() * 2.0 ** BITS[form] <= 1 + 2e-3


@pytest.mark.parametrize(("form", "times"), [(PLAIN, 1.95), (RESIDUAL, 3.6)])
def test_half2_is_closer_than_bfloat16(form, times):
    """In the mean over normal numbers: they have a bit more, or two."""
    _, got = there_and_back(NORMAL, form)
    rounded = NORMAL.astype(jnp.bfloat16).astype(np.float32)
    ours, theirs = (np.sqrt(np.mean((x - NORMAL) ** 2)) for x in (got, rounded))
    assert times * ours < theirs


def test_the_smallest_embeddings_are_closer_than_bfloat16_in_the_residual():
    """Of a standard deviation of 2^-9, where its step is the same for nearly all."""
    given = NORMAL * np.float32(2.0**-9)
    _, got = there_and_back(given, RESIDUAL)
    rounded = given.astype(jnp.bfloat16).astype(np.float32)
    ours, theirs = (np.sqrt(np.mean((x - given) ** 2)) for x in (got, rounded))
    assert 2 * ours < theirs


@every_format
def test_a_word_of_nothing_but_a_tag_is_zeros(form):
    words, got = there_and_back([[0, 0], [0, 1e-38]], form, 2)
    np.testing.assert_array_equal(words, np.asarray(half2_tag(jnp.int32(2))))
    np.testing.assert_array_equal(got, np.zeros((2, 2)))
    words, got = there_and_back([[0.0], [0.0]], form, 3)
    np.testing.assert_array_equal(words, [HALF2_TAG_BITS])
    assert (there_and_back([[-0.0, 0], [0, -0.0]], form)[1] == 0).all()


@every_format
def test_what_is_too_small_becomes_zero_and_what_is_too_large_infinite(form):
    tiny = 2.0**-49 if form.root else 2.0**-20
    top = LARGEST[form]
    _, got = there_and_back([[tiny, -tiny, -top, 3e38], [-tiny, tiny, top, -1.01 * top]], form)
    assert (got[:, :2] == 0).all()
    np.testing.assert_array_equal(got[:, 2], [-top, top])
    np.testing.assert_array_equal(got[:, 3], [np.inf, -np.inf])


@every_format
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 1])
def test_no_number_stays_none(form, bad, row):
    given = NORMAL[:, :8].copy()
    given[row, 3] = bad
    _, got = there_and_back(given, form)
    assert (~np.isfinite(got)).any(axis=0).tolist() == [i == 3 for i in range(8)]
    assert np.isnan(got[row, 3]) == np.isnan(bad)
    assert np.isfinite(got[1 - row, 3])


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFFC00000])
def test_a_nan_of_any_bits_stays_one(bits):
    given = np.full((2, 1), bits, np.uint32).view(np.float32)
    _, got = there_and_back(given)
    assert np.isnan(got).all()


def test_hand_overs_that_follow_each_other_have_different_tags():
    words = [there_and_back(NORMAL, PLAIN, tag)[0] & HALF2_TAG_BITS for tag in range(-4, 8)]
    for tag, some in zip(range(-4, 8), words, strict=True):
        assert (some == half2_tag(jnp.int32(tag))).all()
    for apart in (1, 2, 3):
        for a, b in zip(words, words[apart:], strict=False):
            assert (a != b).all()


def test_a_words_tag_says_nothing_of_its_numbers():
    results = [there_and_back(NORMAL, PLAIN, tag)[1] for tag in range(4)]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_neighbours_are_told_apart(dtype):
    x = np.arange(4 * 32, dtype=dtype).reshape(4, 32)
    first, second = even_and_odd(jnp.asarray(x))
    np.testing.assert_array_equal(first, x.ravel()[::2])
    np.testing.assert_array_equal(second, x.ravel()[1::2])


def test_neighbours_do_not_meet():
    first, second = even_and_odd(jnp.float32([1, np.nan, np.inf, 2]))
    np.testing.assert_array_equal(first, [1, np.inf])
    np.testing.assert_array_equal(second, [np.nan, 2])
