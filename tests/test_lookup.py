"""Drafts from the text itself, and which of them are kept, against plain Python."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffjax import Lookup
from ffjax.speculation.accept import kept_tokens

pytestmark = [
    pytest.mark.once(
        "A sample of texts shows what a JAX makes of the search.",
        sample=[
            "test_drafts_are_those_of_plain_python",
            "test_drafts_are_kept_up_to_the_first_wrong_one[4]",
            "test_a_lookup_refuses_numbers_out_of_range",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]


def draft(text: list[int], least: int, most: int, count: int) -> list[int]:
    """What followed the longest run that ends the text and stands in it before, of equals the last.

    Empty where there is none.
    """
    for size in range(min(most, len(text) - 1), least - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[len(text) - size :]:
                going = list(text)
                for _ in range(count):  # a text that meets its own end goes on with the draft
                    going.append(going[end + len(going) - len(text)])
                return going[len(text) :]
    return []


@pytest.mark.parametrize(
    ("least", "most", "tokens"), [(3, 8, 8), (1, 1, 2), (2, 5, 4), (1, 8, 8), (4, 4, 3)]
)
def test_drafts_are_those_of_plain_python(least, most, tokens):
    rng = random.Random(tokens + 8 * most)
    lookup = Lookup(min_match=least, max_match=most, tokens=tokens)
    find = jax.jit(lookup.drafts)
    found = 0
    for _ in range(300):
        # Few different tokens match often, and many now and then.
        vocab, slots = rng.choice([1, 2, 3, 6, 40]), 48
        lengths = [rng.randint(1, slots) for _ in range(3)]
        known = np.array([[rng.randrange(vocab) for _ in range(slots)] for _ in lengths], np.int32)
        drafts, counts, _ = find(known, jnp.array(lengths, jnp.int32))
        pairs = zip(known, lengths, np.asarray(drafts), counts.tolist(), strict=True)
        for row, length, mine, count in pairs:
            want = draft(row[:length].tolist(), least, most, tokens - 1)
            assert mine[:count].tolist() == want
            found += bool(want)
    assert 100 < found < 800  # of 900


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ([1, 2, 3, 9, 8, 7, 6, 1, 2, 3], [9, 8, 7, 6]),
        ([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], [8, 1, 2, 3]),  # the latest of equals
        ([5, 1, 2, 3, 9, 1, 2, 3, 8, 5, 1, 2, 3], [9, 1, 2, 3]),  # the longest of all
        ([4, 7, 7, 7, 7], [7, 7, 7, 7]),
        ([1, 2, 1, 2, 1, 2], [1, 2, 1, 2]),  # round and round
        ([0, 0, 0], []),  # beyond the text there are noughts, too
        ([1], []),
        ([1, 2, 3, 4, 5], []),
    ],
)
def test_a_draft_is_how_it_went_on(text, want):
    known = jnp.zeros((1, 32), jnp.int32).at[0, : len(text)].set(jnp.array(text))
    drafts, counts, _ = Lookup(min_match=3, tokens=5).drafts(known, jnp.array([len(text)]))
    assert drafts[0, : int(counts[0])].tolist() == want


@pytest.mark.parametrize("tokens", [2, 4, 8])
def test_drafts_are_kept_up_to_the_first_wrong_one(tokens):
    chosen = np.arange(10, 10 + tokens)
    for right in range(tokens):
        drafts = chosen[:-1].copy()
        drafts[right:] += 1  # those after a wrong one may be right or not
        for later in (drafts, np.where(np.arange(tokens - 1) > right, chosen[:-1], drafts)):
            for count in range(tokens):
                for room in (0, 1, right, tokens, 99):
                    numbers = (jnp.array([one], jnp.int32) for one in (count, room))
                    kept = kept_tokens(chosen[None], jnp.array([later]), *numbers)
                    assert kept.tolist() == [min(min(right, count) + 1, room)]


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"min_match": 0}, ValueError, "min_match=0"),
        ({"min_match": 9}, ValueError, "min_match at most max_match"),
        ({"max_match": 65}, ValueError, "1 to 64 tokens"),
        ({"tokens": 1}, ValueError, "2 tokens of a sequence or more; got tokens=1"),
        ({"min_match": 2.5}, TypeError, r"min_match of a Lookup is an integer, got 2\.5"),
        ({"tokens": True}, TypeError, "got True"),
    ],
)
def test_a_lookup_refuses_numbers_out_of_range(fields, error, says):
    with pytest.raises(error, match=says):
        Lookup(**fields)
