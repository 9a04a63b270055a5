"""The likeliest tokens, found group by group, are those of a stable sort; by a kernel, too."""

import jax.numpy as jnp
import numpy as np
import pytest
from logprob_cases import check_likeliest, check_log_probs

from pallas_kernels.gpu import INTERPRETER
from pallas_kernels.logprobs import ordered, unordered

pytestmark = [
    pytest.mark.once(
        "Vocabularies are many; a sample shows what a JAX makes of the interpreted kernel.",
        sample=[
            "test_the_likeliest_tokens_are_those_of_a_stable_sort[20-41]",
            "test_the_likeliest_tokens_are_those_of_a_stable_sort[5-8193]",
            "test_the_kernel_tells_log_probabilities_of_every_row[257-0]",
            "test_the_kernel_tells_log_probabilities_of_every_row[41-20]",
            "test_logits_come_back_from_the_numbers_that_they_are_ordered_by",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]


# Of a few tokens, of as many that the last group is not full, and the presets' vocabularies.
@pytest.mark.drawn("Each vocabulary, and each number.")
@pytest.mark.parametrize("vocab", [41, 8191, 8193, 32000, 128256])
@pytest.mark.parametrize("best", [1, 5, 20])
def test_the_likeliest_tokens_are_those_of_a_stable_sort(vocab, best):
    check_likeliest(vocab, best)


@pytest.mark.parametrize("best", [70, 140])
def test_as_many_as_there_are_groups_and_more_than_a_group_holds(best):
    check_likeliest(70 * 128 - 3, best)


@pytest.mark.parametrize(("vocab", "best"), [(41, 20), (257, 0), (4097, 1), (9000, 5), (32000, 20)])
def test_the_kernel_tells_log_probabilities_of_every_row(vocab, best):
    check_log_probs(vocab, best, INTERPRETER)


def test_logits_come_back_from_the_numbers_that_they_are_ordered_by():
    values = np.array([-np.inf, -2.5, -1e-40, -0.0, 0.0, 1e-40, 7, np.inf, np.nan], np.float32)
    numbers = np.asarray(ordered(jnp.asarray(values)))
    assert (np.diff(numbers.astype(np.int64)) > 0).all()
    back = np.asarray(unordered(jnp.asarray(numbers)))
    assert (back[:-1].view(np.int32) == values[:-1].view(np.int32)).all() and np.isnan(back[-1])
