"""The likeliest tokens, found in two stages, are those that a stable sort finds."""

import pytest
from logprob_cases import check_likeliest

pytestmark = pytest.mark.filterwarnings("error")


# Of a few tokens, a prime number, what falls into groups, and the presets' vocabularies.
@pytest.mark.parametrize("vocab", [41, 4099, 4096, 32000, 49152, 128256])
@pytest.mark.parametrize("best", [0, 1, 5, 20])
def test_the_likeliest_tokens_are_those_of_a_stable_sort(vocab, best):
    check_likeliest(vocab, best)


def test_more_than_a_group_holds():
    check_likeliest(4096, 1500)
