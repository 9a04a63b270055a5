"""Sampling draws from the distribution it says, and from nothing but its own key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffjax.sampling.draw import sample, sequence_keys, step_keys, words_of

pytestmark = pytest.mark.filterwarnings("error")


def _logits(batch: int, vocab: int) -> jax.Array:
    return 2 * jax.random.normal(jax.random.key(5), (batch, vocab), jnp.float32)


def test_temperature_zero_is_greedy_and_takes_the_lowest_of_equals():
    logits = jnp.array([[0.0, 3.0, 3.0, 1.0, 2.0], [5.0, -1.0, 5.0, 5.0, 0.0]])
    token = sample(logits, sequence_keys(words_of(0, 2)), 0.0)
    assert token.dtype == jnp.int32
    assert token.tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_softmax_of_logits_over_temperature(temperature):
    draws, vocab = 20_000, 7
    logits = _logits(1, vocab)
    keys = sequence_keys(words_of(11, draws))
    tokens = sample(jnp.broadcast_to(logits, (draws, vocab)), keys, temperature)
    counts = np.bincount(np.asarray(tokens), minlength=vocab)
    scaled = np.asarray(logits[0], np.float64) / temperature
    expected = np.exp(scaled - scaled.max())
    expected *= draws / expected.sum()
    # Pearson's chi-squared with 6 degrees of freedom is over 22.5 once in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 22.5


def test_a_row_depends_on_its_own_logits_and_key_alone():
    logits, keys = _logits(5, 31), sequence_keys(words_of(3, 5))
    together = sample(logits, keys, 1.0)
    alone = [int(sample(logits[b : b + 1], keys[b : b + 1], 1.0)[0]) for b in range(5)]
    assert together.tolist() == alone


def test_one_seed_gives_every_sequence_and_step_a_key_of_its_own():
    keys = sequence_keys(words_of(7, 4))
    data = np.concatenate([jax.random.key_data(step_keys(keys, i)) for i in range(3)])
    assert len({tuple(row) for row in data.tolist()}) == 12


def test_a_seed_of_its_own_gives_a_sequence_the_same_key_in_any_batch():
    in_batch = jax.random.key_data(sequence_keys(words_of((4, 9, 2), 3)))[1]
    alone = jax.random.key_data(sequence_keys(words_of((9,), 1)))[0]
    other = jax.random.key_data(sequence_keys(words_of((8,), 1)))[0]
    assert in_batch.tolist() == alone.tolist()
    assert in_batch.tolist() != other.tolist()


def _data(seed) -> list:
    return jax.random.key_data(sequence_keys(words_of(seed, 1))).tolist()


def test_seeds_that_differ_in_any_bit_are_different():
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 3 << 32, 2**63, 2**63 + 1, 2**64 - 1]
    assert len({str(_data((seed,))) for seed in seeds}) == len(seeds)
    assert len({str(_data(seed)) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("seed", [0, 7, 2**31 - 1])
def test_a_small_seed_is_what_jax_makes_of_it(seed):
    want = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 0))
    assert _data((seed,)) == [want.tolist()]


@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg"])
def test_draws_are_the_same_whatever_generator_jax_is_set_to(generator):
    logits, seeds = _logits(3, 50), (2**40, 5, 6)

    def draw(rows):
        keys = step_keys(sequence_keys(words_of(seeds[:rows], rows)), 3)
        return sample(logits[:rows], keys, 1.0).tolist()

    want = draw(3)
    with jax.default_prng_impl(generator):
        assert draw(3) == want
        assert draw(1) == want[:1]
