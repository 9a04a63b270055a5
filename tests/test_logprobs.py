"""The likeliest tokens, found group by group, are those that a stable sort finds."""

import pytest
from logprob_cases import check_likeliest

pytestmark = pytest.mark.filterwarnings("error")


# Of a few tokens, of as many that the last group is not full, and the presets' vocabularies.
@pytest.mark.parametrize("vocab", [41, 8191, 8193, 32000, 128256])
@pytest.mark.parametrize("best", [1, 5, 20])
def test_the_likeliest_tokens_are_those_of_a_stable_sort(vocab, best):
    check_likeliest(vocab, best)


@pytest.mark.parametrize("best", [70, 140])
def test_as_many_as_there_are_groups_and_more_than_a_group_holds(best):
    check_likeliest(70 * 128 - 3, best)
