"""Stop strings over token borders, against an oracle that sees the whole text at once."""

import random

import pytest

from ffjax.sampling.params import SamplingParams
from ffjax.text.stop_strings import StopStrings
from ffjax.text.writer import Writer
from ffjax.tokenizer import ByteTokenizer


def _oracle(text: str, strings: list[str]) -> tuple[str, str | None]:
    """Looks after every character, as slowly as can be."""
    for end in range(1, len(text) + 1):
        found = [string for string in strings if text[:end].endswith(string)]
        if found:
            match = max(found, key=len)
            return text[: end - len(match)], match
    return text, None


def _cuts(draw: random.Random, text: str) -> list[str]:
    at = sorted(draw.randrange(len(text) + 1) for _ in range(draw.randrange(len(text) + 1)))
    return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]


def test_however_a_text_is_cut_it_ends_where_the_oracle_says():
    draw = random.Random(5)
    ended = 0
    for _ in range(4000):
        text = "".join(draw.choices("ab c", k=draw.randrange(24)))
        strings = [
            "".join(draw.choices("ab c", k=draw.randrange(1, 6)))
            for _ in range(draw.randrange(1, 4))
        ]
        expected, match = _oracle(text, strings)
        stops = StopStrings(strings)
        shown = [stops.push(piece) for piece in _cuts(draw, text)]
        assert "".join([*shown, stops.finish()]) == expected
        assert stops.found == match
        including = StopStrings(strings, include=True)
        shown = [including.push(piece) for piece in _cuts(draw, text)]
        assert "".join([*shown, including.finish()]) == expected + (match or "")
        ended += match is not None
    assert 1000 < ended < 3900


def test_only_what_may_still_become_a_stop_string_is_held_back():
    draw = random.Random(6)
    for _ in range(500):
        text = "".join(draw.choices("abc", k=20))
        strings = ["".join(draw.choices("abc", k=draw.randrange(2, 7))) for _ in range(2)]
        expected, _ = _oracle(text, strings)
        stops, shown = StopStrings(strings), ""
        for i, character in enumerate(text):
            shown += stops.push(character)
            if stops.found:
                break
            so_far = text[: i + 1]
            held = so_far[len(shown) :]
            # Some continuation makes a match of it, and a longer end would make none.
            assert held == "" or any(string.startswith(held) for string in strings)
            longer = [so_far[j:] for j in range(len(shown))]
            assert not any(string.startswith(end) for string in strings for end in longer)
        assert expected.startswith(shown)


def test_without_stop_strings_nothing_is_held_back():
    stops = StopStrings(())
    assert [stops.push(piece) for piece in ("a", "", "bc")] == ["a", "", "bc"]
    assert stops.finish() == ""


def test_a_match_before_the_least_number_of_tokens_is_passed_over():
    tokenizer = ByteTokenizer()
    for least, text, stopped in [
        (0, "x", ";"),
        (1, "x", ";"),
        (2, "x;y", ";"),
        (4, "x;y;", None),
        # One that began before and ends after is a match.
        (3, "x;y", ";"),
    ]:
        writer = Writer(tokenizer, [], SamplingParams(stop=";", min_tokens=least))
        shown = "".join(writer.push(token) for token in b"x;y;") + writer.finish()
        assert (shown, writer.stopped) == (text, stopped)
    writer = Writer(tokenizer, [], SamplingParams(stop="ab", min_tokens=1))
    assert [writer.push(token) for token in b"xab"] == ["x", "", ""]
    assert writer.stopped == "ab"


def test_a_stop_string_ends_in_the_middle_of_what_a_token_says():
    """As "x.\\nUser" does, of which "\\n" ends the text."""
    stops = StopStrings(["\n"])
    assert stops.push("x.\nUser") == "x."
    assert stops.found == "\n"
    assert stops.push("more") == stops.finish() == ""


@pytest.mark.parametrize("strings", [["é"], ["日本", "本"]])
def test_characters_of_several_bytes_make_a_stop_string(strings):
    tokenizer = ByteTokenizer()
    text = "aé日本é"
    expected, match = _oracle(text, strings)
    writer = Writer(tokenizer, [], SamplingParams(stop=strings))
    shown = [writer.push(token) for token in tokenizer.encode(text)]
    assert "".join(shown) + writer.finish() == expected == writer.text
    assert writer.stopped == match
