"""Tokens that the files beside tokenizer.json name; and what is wrong with such files."""

import json
import time
from pathlib import Path

import pytest
from test_hf_tokenizer import BEGIN, END, TURN, streamed, write

from ffjax.hf_tokenizer import HFTokenizer

pytestmark = pytest.mark.filterwarnings("error")

TEMPLATE = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
NEW = "<|tool|>"
ENTRY = {"content": NEW, "special": True}
SIZE = 277  # of the vocabulary of tokenizer.json
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}


def read(directory: Path, **files) -> HFTokenizer:
    return HFTokenizer.read(write(directory, **files))


def test_the_vocabulary_of_these_tests(tmp_path):
    assert read(tmp_path).vocab_size == SIZE


# Roles


@pytest.mark.parametrize(
    ("settings", "roles", "bos"),
    [
        ({}, {"bos_token": BEGIN}, BEGIN),
        ({"bos_token": ""}, {"bos_token": BEGIN}, BEGIN),
        ({"bos_token": None}, {"bos_token": BEGIN}, BEGIN),
        ({"bos_token": TURN}, {"bos_token": BEGIN}, BEGIN),  # the map wins
        ({"bos_token": TURN}, {"bos_token": {"content": BEGIN, "lstrip": False}}, BEGIN),
        # Settings of the newer format stand alone.
        ({"bos_token": TURN, "added_tokens_decoder": {}}, {"bos_token": BEGIN}, TURN),
        ({"added_tokens_decoder": {}}, {"bos_token": BEGIN}, ""),
    ],
)
def test_a_chat_begins_with_the_bos_that_transformers_takes(settings, roles, bos, tmp_path):
    tokenizer = read(
        tmp_path,
        tokenizer_config__json={**PLAIN, "chat_template": TEMPLATE, **settings},
        special_tokens_map__json=roles,
    )
    assert tokenizer.render([{"role": "user", "content": "x"}]) == f"{bos}x{END}"


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config__json": {}, "special_tokens_map__json": {"eos_token": END}},
        {"tokenizer_config__json": {}, "special_tokens_map__json": {"eos_token": {"content": END}}},
        {"tokenizer_config__json": {"eos_token": {"__type": "AddedToken", "content": END}}},
    ],
)
def test_a_text_ends_with_the_eos_of_any_file(files, tmp_path):
    assert read(tmp_path, **files).eot_ids == (1,)


def test_a_class_of_transformers_fills_roles_that_no_file_does(tmp_path):
    files = {"tokenizer_config__json": {}, "config__json": {"eos_token_id": 1}}
    assert read(tmp_path / "none", **files).special_tokens == {}
    for model_type, roles in (
        ("gemma3_text", ["<bos>", "<eos>", "<unk>", "<pad>", "<mask>"]),
        ("qwen3", ["<|endoftext|>"] * 3),
        ("olmo2", []),
    ):
        files["config__json"] = {"eos_token_id": 1, "model_type": model_type}
        tokenizer = read(tmp_path / model_type, **files)
        assert list(tokenizer.special_tokens.values()) == roles
    files["tokenizer_config__json"] = {"bos_token": None, "eos_token": END}
    files["config__json"]["model_type"] = "gemma3_text"
    tokenizer = read(tmp_path / "said", **files)
    assert "bos_token" not in tokenizer.special_tokens
    assert tokenizer.special_tokens["eos_token"] == END


# Tokens


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config__json": {**PLAIN, "added_tokens_decoder": {str(SIZE): ENTRY}}},
        {"tokenizer_config__json": {**PLAIN, "additional_special_tokens": [NEW]}},
        {"tokenizer_config__json": {**PLAIN, "extra_special_tokens": [NEW]}},
        {"tokenizer_config__json": {**PLAIN, "extra_special_tokens": {"tool_token": NEW}}},
        {"tokenizer_config__json": {**PLAIN, "tool_token": NEW}},
        {"tokenizer_config__json": {**PLAIN, "pad_token": NEW}},
        {"special_tokens_map__json": {"additional_special_tokens": [NEW]}},
        {"special_tokens_map__json": {"additional_special_tokens": [{"content": NEW}]}},
        {"special_tokens_map__json": {"pad_token": NEW}, "added_tokens__json": {NEW: SIZE}},
    ],
)
def test_a_special_token_of_any_file_is_one_token_without_text(files, tmp_path):
    tokenizer = read(tmp_path, **{"tokenizer_config__json": PLAIN, **files})
    tokens = tokenizer.encode(f"hello{NEW}world")
    assert tokens.count(SIZE) == 1
    assert tokenizer.decode(tokens) == "helloworld"
    assert "".join(streamed(tokenizer, tokens)) == "helloworld"
    assert tokenizer.vocab_size == SIZE + 1


def test_a_token_of_added_tokens_json_alone_has_text(tmp_path):
    tokenizer = read(tmp_path, tokenizer_config__json=PLAIN, added_tokens__json={NEW: SIZE})
    tokens = tokenizer.encode(f"hello{NEW}world")
    assert tokens.count(SIZE) == 1
    assert tokenizer.decode(tokens) == f"hello{NEW}world"


def test_a_role_makes_a_token_of_the_vocabulary_special(tmp_path):
    folder = write(tmp_path, tokenizer_config__json=PLAIN)
    data = json.loads((folder / "tokenizer.json").read_text())
    for token in data["added_tokens"]:
        token["special"] = token["content"] != END
    (folder / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = HFTokenizer.read(folder)
    assert tokenizer.decode([*tokenizer.encode("hello"), 1]) == "hello"
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|turn|>"}')
    tokenizer = HFTokenizer.read(folder)
    assert tokenizer.decode([*tokenizer.encode("hello"), 1]) == f"hello{END}"


def test_special_tokens_may_be_split_as_any_text(tmp_path):
    tokenizer = read(tmp_path, tokenizer_config__json={**PLAIN, "split_special_tokens": True})
    assert tokenizer.decode(tokenizer.encode(f"a{TURN}b")) == f"a{TURN}b"
    tokenizer = read(tmp_path, tokenizer_config__json=PLAIN)
    assert tokenizer.decode(tokenizer.encode(f"a{TURN}b")) == "ab"


# Ends of text


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ([2, 400], 1, (2,)),  # the model has no such row
        (-1, 2, (2,)),
        ([-1, 400], None, (1,)),  # the eos_token
        ([], 2, (2,)),
        (None, {"text_config": None}, (1,)),
        (None, {"text_config": {"eos_token_id": [2, 1]}}, (2, 1)),
    ],
)
def test_what_a_model_cannot_say_ends_no_text(generation, config, ids, tmp_path):
    config = config if isinstance(config, dict) else {"eos_token_id": config}
    files = {
        "generation_config__json": {"eos_token_id": generation},
        "config__json": config,
        "tokenizer_config__json": PLAIN,
    }
    assert HFTokenizer.read(write(tmp_path, **files), rows=SIZE).eot_ids == ids


def test_a_tokenizer_whose_ends_of_text_the_model_has_not(tmp_path):
    folder = write(tmp_path, config__json={"eos_token_id": 400}, tokenizer_config__json={})
    with pytest.raises(ValueError, match="ends a text, of the 277 that the model knows: give"):
        HFTokenizer.read(folder, rows=SIZE)


@pytest.mark.parametrize("value", ["</s>", True, [1, None], 1.5, {"id": 1}])
def test_an_end_of_text_that_is_no_id_is_a_sentence(value, tmp_path):
    folder = write(tmp_path, generation_config__json={"eos_token_id": value})
    with pytest.raises(ValueError, match=r"is a token id or a list of them; .* Give the number"):
        HFTokenizer.read(folder)


# Damaged files


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer_config__json", {"bos_token": 3}, "bos_token in .*tokenizer_config.json is 3"),
        ("tokenizer_config__json", {"bos_token": {"id": 3}}, "A token is a text, or an object"),
        ("tokenizer_config__json", {"extra_special_tokens": [3]}, "extra_special_tokens in .* 3"),
        ("tokenizer_config__json", {"extra_special_tokens": "<x>"}, "is a list of tokens, or"),
        ("tokenizer_config__json", {"added_tokens_decoder": []}, "an object of tokens by id"),
        ("tokenizer_config__json", {"added_tokens_decoder": {"x": ENTRY}}, "by 'x'"),
        ("tokenizer_config__json", {"added_tokens_decoder": {"3": NEW}}, "with a content by"),
        ("special_tokens_map__json", {"bos_token": 3}, "bos_token in .*special_tokens_map.json"),
        ("special_tokens_map__json", "{", "special_tokens_map.json is damaged: it is not JSON"),
        ("added_tokens__json", {NEW: "3"}, "has a token id for each text"),
        ("added_tokens__json", [], "added_tokens.json holds no object"),
        ("tokenizer_config__json", {"chat_template": 3}, "a list of objects with name and"),
        ("tokenizer_config__json", {"chat_template": [{"name": "x"}]}, "has .*'name': 'x'"),
        ("tokenizer_config__json", {"chat_template": {"default": None}}, "templates by name"),
    ],
)
def test_a_file_that_names_no_token_is_a_sentence(file, content, words, tmp_path):
    folder = write(tmp_path, config__json={"eos_token_id": 1}, **{file: content})
    with pytest.raises(ValueError, match=words) as caught:
        HFTokenizer.read(folder)
    assert str(caught.value).endswith(".")


# Streams


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@pytest.mark.parametrize("what", ["no characters", "special tokens", "a padded end", "U+FFFD"])
def test_a_stream_takes_time_by_the_length_of_a_run(kind, what, tmp_path):
    tokenizer = HFTokenizer.read(write(tmp_path, kind))
    [*_, last] = tokenizer.encode("é")
    run = {
        "no characters": [last],
        "special tokens": [2],
        "a padded end": [100_000],
        "U+FFFD": tokenizer.encode("\ufffd")[-3:],
    }[what]
    count = 6000 // len(run)
    start = time.perf_counter()
    pieces = streamed(tokenizer, run * count)
    seconds = time.perf_counter() - start
    expected = tokenizer.decode(run * count)
    assert "".join(pieces) == expected
    assert "".join(pieces[:-1])[: len(expected) - 40] == expected[: len(expected) - 40]
    assert seconds < 3  # by its square: 10 s and more


@pytest.mark.parametrize("before", ["", "hello", "é"])
def test_a_stream_is_right_behind_a_long_run(before, tmp_path):
    tokenizer = HFTokenizer.read(write(tmp_path))
    [*_, last] = tokenizer.encode("é")
    for count in range(1, 70, 3):
        tokens = [*tokenizer.encode(before), *[last] * count, *tokenizer.encode("🐍 é")[1:], last]
        assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens)
