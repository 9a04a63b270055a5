"""Bytes in, the same bytes out; a stream shows no half character."""

import numpy as np
import pytest

from ffjax.tokenizer import ByteTokenizer, StreamDecoder, Tokenizer

pytestmark = pytest.mark.filterwarnings("error")

# Annotated by the protocols, so that the type checker compares them too.
TOKENIZER: Tokenizer = ByteTokenizer()
EOT = 256

TEXTS = ["", "def f():\n\treturn 1\r\n", "é ß €", "日本語", "🐍🐍", "a\0b\x7f", "\ufeffbom"]


def streamed(tokens) -> list[str]:
    decoder: StreamDecoder = TOKENIZER.stream()
    return [*(decoder.push(token) for token in tokens), decoder.finish()]


def test_ids_are_the_bytes_of_utf8_and_end_of_text_comes_after_them():
    assert TOKENIZER.vocab_size == 257
    assert TOKENIZER.eot_id == EOT
    assert TOKENIZER.encode("aé€") == [97, 195, 169, 226, 130, 172]


@pytest.mark.parametrize("text", TEXTS)
def test_decode_and_stream_undo_encode(text):
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode(tokens) == text
    assert "".join(streamed(tokens)) == text


def test_a_stream_holds_a_character_back_until_it_is_whole():
    assert streamed(TOKENIZER.encode("a€🐍")) == ["a", "", "", "€", "", "", "", "🐍", ""]


def test_a_stream_cut_off_inside_a_character_says_so_at_the_end():
    assert streamed(TOKENIZER.encode("a€")[:-1]) == ["a", "", "", "\ufffd"]


def test_a_stream_joined_is_what_decode_returns_for_any_bytes():
    random = np.random.default_rng(0)
    for _ in range(200):
        # Many lead and continuation bytes: valid, cut off and impossible sequences.
        tokens = random.choice([65, 128, 191, 195, 226, 240, 255, EOT], 12).tolist()
        assert "".join(streamed(tokens)) == TOKENIZER.decode(tokens)


def test_end_of_text_has_no_characters():
    assert TOKENIZER.decode([EOT, 97, EOT, 98, EOT]) == "ab"


@pytest.mark.parametrize("token", [-1, 257, 128_000])
def test_an_id_of_another_vocabulary_is_refused(token):
    with pytest.raises(ValueError, match=f"0 to 256, got {token}"):
        TOKENIZER.decode([97, token])
    with pytest.raises(ValueError, match=f"0 to 256, got {token}"):
        TOKENIZER.stream().push(token)


def test_ids_may_be_those_of_an_array():
    assert TOKENIZER.decode(list(np.array([97, 98], np.int32))) == "ab"


def test_bytes_that_came_in_by_the_command_line_come_back():
    assert TOKENIZER.encode(b"a\xff".decode("utf-8", "surrogateescape")) == [97, 255]


def test_what_utf8_cannot_express_is_refused_with_its_place():
    with pytest.raises(ValueError, match=r"'\\ud800' at index 2"):
        TOKENIZER.encode("ab\ud800")
    with pytest.raises(TypeError, match="encodes a str, got bytes"):
        TOKENIZER.encode(b"ab")  # type: ignore[arg-type]
