"""The tokenizer of a GGUF file gives the tokens of the tokenizer.json that it was made of."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_gguf
from gguf_vocabularies import SPACE, byte_vocabulary, fields_of, trained_bytes, trained_pieces
from hf_models import MODELS, HFModel
from tokenizers import Tokenizer

import checkpoints
import ffjax
from checkpoints.gguf import read_header
from checkpoints.gguf.file import GGUFFile
from checkpoints.gguf.tokenizer import tokenizer_files
from ffjax.hf_tokenizer import HFTokenizer
from ffjax.text.defaults import default_sampling

pytestmark = pytest.mark.filterwarnings("error")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]

TEXTS = [
    "",
    "It's 12345 o'clock, I'LL say: don't! We'd rather 1,024.75",
    "x_1y22 helloWorld HTTPServer 1 22 333 4444 55555",
    "\tfor i in range(10):\n        print(f'{i}')\n\n\n  # a/b//c\n/ ... ???\r\n\r\n x   y    z  ",
    "Übermäßig naïve cafe\u0301 café 日本語の文章 مرحبا Привет, мир! 😀👍🏽 ²³ ½ Ⅷ ٣٤ ǅungla",
    "<|im_start|>user\nhello<|im_end|>\n<think> a </think><|endoftext|>b",
    "   leading\n \n trailing   \n",
    "'s 'S'LL 're't I'LLabc we'LLabc abcdabcaabbccdd dcbadcba abacadbcbd",
    "what?\n/ or?\n/x",
]

# How texts are cut, as tokenizer.json of the models says it: none of this is ours.
_GPT2 = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]
_PLAIN = [{**_GPT2[0], "use_regex": False}]
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = [{"type": "Digits", "individual_digits": True}, *_GPT2]


def _split(pattern: str) -> list[dict[str, Any]]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [cut, *_PLAIN]


# By the name in the GGUF file: how it cuts, whether whole words are tokens, and what comes first.
CUTS = {
    "gpt-2": (_GPT2, False, None),
    "smollm": (_DIGITS, False, None),
    "starcoder": (_DIGITS, False, None),
    "refact": (_DIGITS, False, None),
    "llama-bpe": (_split(_LLAMA3), True, None),
    "llama3": (_split(_LLAMA3), True, None),
    "llama-v3": (_split(_LLAMA3), True, None),
    "dbrx": (_split(_LLAMA3), False, None),
    "smaug-bpe": (_split(_LLAMA3), False, None),
    "gpt-4o": (_split(_GPT4O), False, None),
    "qwen2": (_split(_QWEN2), False, {"type": "NFC"}),
    "tekken": (_split(_TEKKEN), True, None),
}


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    data = trained_bytes(SPECIAL)
    data["added_tokens"][-1]["special"] = False  # <think> has a text
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    # Words that merges do not reach: only who asks for whole words finds them.
    for word in ("Ġrather", "ĠhelloWorld", "Ġ333"):
        assert vocab.setdefault(word, len(vocab)) == len(vocab) - 1
    assert len(merges) > 400
    return data


def a_model(rows: int) -> HFModel:
    return HFModel(5, {**MODELS["tied"].settings, "vocab_size": rows, "num_hidden_layers": 1})


def written(tmp_path: Path, rows: int = 2000, **fields: Any) -> Path:
    return write_gguf(tmp_path / "x.gguf", a_model(rows), dtype="BF16", **fields)


def reads(file: Path) -> HFTokenizer:
    tokenizer = ffjax.load_tokenizer(file, GGUFFile.open(file).config)
    assert isinstance(tokenizer, HFTokenizer)
    return tokenizer


def check(found: HFTokenizer, data: dict[str, Any]) -> None:
    """Whether a tokenizer is that of a tokenizer.json, for all texts."""
    wanted = Tokenizer.from_str(json.dumps(data))
    for text in TEXTS:
        ids = wanted.encode(text).ids
        assert found.encode(text) == ids, text
        assert found.decode(ids) == wanted.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", CUTS)
def test_byte_level_tokens_are_those_of_tokenizer_json(name, trained, tmp_path):
    data = copy.deepcopy(trained)
    steps, data["model"]["ignore_merges"], data["normalizer"] = CUTS[name]
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    fields = fields_of(data, "gpt2", pre=name, eos_token_id=2, add_bos_token=False)
    found = reads(written(tmp_path, **fields))
    check(found, data)
    assert found.eot_ids == (2, 0)
    assert found.vocab_size == len(data["model"]["vocab"])


def test_the_cuts_differ_in_these_texts(trained):
    seen = set()
    for steps, whole_words, normalizer in CUTS.values():
        data = {**trained, "normalizer": normalizer}
        data["model"] = {**data["model"], "ignore_merges": whole_words}
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        tokenizer = Tokenizer.from_str(json.dumps(data))
        seen.add(json.dumps([tokenizer.encode(text).ids for text in TEXTS]))
    assert len(seen) == 7  # of twelve names, some cut alike


# SentencePiece


def joined(text: str, vocab: dict[str, int], control: set[str]) -> list[str]:
    """SentencePiece's rule, letter by letter: the best joint piece, the leftmost of equals."""
    pieces = list(text)
    while True:
        best = None
        for i in range(len(pieces) - 1):
            index = vocab.get(both := pieces[i] + pieces[i + 1])
            if index is not None and both not in control and (best is None or index < best[0]):
                best = index, i
        if best is None:
            break
        pieces[best[1] : best[1] + 2] = ["".join(pieces[best[1] : best[1] + 2])]
    return pieces


def as_ids(text: str, vocab: dict[str, int], special: list[str], first: bool) -> list[int]:
    """The token ids of a text without special tokens."""
    text = (SPACE * first + text).replace(" ", SPACE) if text else ""
    ids = []
    control = {*special, *(t for t in vocab if t.startswith("<0x"))}
    for piece in joined(text, vocab, control):
        if piece in vocab:
            ids.append(vocab[piece])
        else:
            ids += [vocab[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return ids


PIECES = ["<unk>", "<s>", "</s>", "[INST]"]


@pytest.fixture(scope="module")
def trained_spm() -> dict[str, Any]:
    return trained_pieces(PIECES)


@pytest.mark.parametrize("first", [True, False])
def test_pieces_are_those_of_sentencepiece(first, trained_spm, tmp_path):
    vocab = trained_spm["model"]["vocab"]
    more = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    # Where the file does not say it, a space comes first, and BOS before it.
    said = {} if first else {"add_space_prefix": False, "add_bos_token": False}
    found = reads(written(tmp_path, **fields_of(trained_spm, "llama", **more, **said)))
    assert found.eot_ids == (2,)
    for text in [text for text in TEXTS if "<|" not in text]:
        bos, own = found.split(text)
        assert own == as_ids(text, vocab, PIECES, first), text
        assert bos == ([1] if first and text else [])
        if not first or not text.startswith(" "):
            assert found.decode(own) == text
    assert found.encode("[INST]") == [1] * first + [3]
    assert found.special_tokens["unk_token"] == "<unk>"


def test_special_tokens_of_phi3_swallow_the_spaces_behind_them(tmp_path):
    """As its tokenizer.json has them, and no field of the file says: `rstrip`."""
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>", "<|end|>", "<|assistant|>"]
    data = trained_pieces(special)
    more = {"bos_token_id": 1, "eos_token_id": 3, "unknown_token_id": 0}
    fields = fields_of(data, "llama", **more)
    model = HFModel(5, {**MODELS["phi3"].settings, "vocab_size": 2000}, "phi3")
    text = "<|user|>\nabc<|end|>\n<|assistant|>\n"
    ids = reads(write_gguf(tmp_path / "p.gguf", model, **fields)).encode(text)
    llama = reads(written(tmp_path, **fields)).encode(text)
    newline = data["model"]["vocab"]["<0x0A>"]
    assert (ids.count(newline), llama.count(newline)) == (0, 3)
    for found in (ids, llama):
        assert [special[i] for i in found if i < len(special)] == [
            *("<s>", "<|user|>", "<|end|>", "<|assistant|>")
        ]
    kept = reads(tmp_path / "p.gguf").encode("<|endoftext|>\n")
    assert kept.count(newline) == 1


def test_pieces_never_make_a_byte(trained_spm, tmp_path):
    data = copy.deepcopy(trained_spm)
    for text in ("<", ">", "<0", "x4", "<0x4", "1>"):
        data["model"]["vocab"].setdefault(text, len(data["model"]["vocab"]))
    more = {"bos_token_id": 1, "eos_token_id": 2, "add_bos_token": False}
    found = reads(written(tmp_path, **fields_of(data, "llama", **more)))
    assert data["model"]["vocab"]["<0x41>"] not in found.encode("x<0x41>")
    assert data["model"]["vocab"]["<0x4"] in found.encode("x<0x41>")


def test_a_token_of_the_users_own_is_found_in_the_text(trained_spm, tmp_path):
    # As Gemma has runs of spaces: found before anything is cut, and never made of pieces.
    data = copy.deepcopy(trained_spm)
    for text in ("   ", "\n\n"):
        index = data["model"]["vocab"][text] = len(data["model"]["vocab"])
        data["added_tokens"].append({"id": index, "content": text, "special": False})
    more = {"bos_token_id": 1, "eos_token_id": 2, "add_space_prefix": False}
    found = reads(written(tmp_path, **fields_of(data, "llama", **more)))
    ids = found.encode("x   y\n\nz")
    assert index in ids
    assert index - 1 in ids
    assert found.decode(ids) == "x   y\n\nz"


# What is around a text, and beside it


@pytest.mark.parametrize(
    ("fields", "before", "behind"),
    [
        ({"pre": "gpt-2"}, [], []),
        ({"pre": "llama-bpe"}, [1], []),  # where the file does not say it
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
        ({"pre": "gpt-2", "add_bos_token": True, "add_eos_token": True}, [1], [2]),
    ],
)
def test_what_comes_before_and_behind_a_text(fields, before, behind, trained, tmp_path):
    more = {"bos_token_id": 1, "eos_token_id": 2}
    found = reads(written(tmp_path, **fields_of(trained, "gpt2", **more, **fields)))
    own = found.encode_rendered("ab")
    assert found.encode("ab") == before + own + behind


def test_a_conversion_keeps_the_same_tokenizer_and_template(trained, tmp_path):
    fields = fields_of(trained, "gpt2", pre="qwen2", eos_token_id=2, padding_token_id=0)
    fields["tokenizer__chat_template"] = (
        "{{ bos_token }}{% for m in messages %}<{{ m.content }}>{% endfor %}"
    )
    file = written(tmp_path, **fields)
    checkpoints.convert_gguf(file, tmp_path / "ours")
    direct = reads(file)
    kept = ffjax.load_tokenizer(tmp_path / "ours", GGUFFile.open(file).config)
    assert isinstance(kept, HFTokenizer)
    for text in TEXTS:
        assert kept.encode(text) == direct.encode(text)
    assert kept.eot_ids == direct.eot_ids == (2, 0)
    said = [{"role": "user", "content": "hello"}]
    assert kept.render(said) == direct.render(said) == "<hello>"
    assert kept.special_tokens == direct.special_tokens


def test_several_templates(trained, tmp_path):
    fields = fields_of(trained, "gpt2", pre="gpt-2", eos_token_id=2)
    fields |= {
        "tokenizer__chat_templates": ["rag", "tool_use"],
        "tokenizer__chat_template": "plain",
        "tokenizer__chat_template.rag": "rag",
        "tokenizer__chat_template.tool_use": "tools",
    }
    found = reads(written(tmp_path, **fields))
    assert sorted(found.chat_templates) == ["default", "rag", "tool_use"]
    said = [{"role": "user", "content": "hello"}]
    assert found.render(said) == "plain"
    assert found.render(said, template="rag") == "rag"


def test_rows_that_pad_the_embedding_are_no_tokens(trained, tmp_path):
    fields = fields_of(trained, "gpt2", pre="gpt-2", eos_token_id=2)
    count = len(fields["tokenizer__ggml__tokens"])
    fields["tokenizer__ggml__tokens"] += [f"[PAD{count + k}]" for k in range(3)]
    fields["tokenizer__ggml__token_type"] += [5, 5, 5]
    found = reads(written(tmp_path, **fields))
    assert found.vocab_size == count
    assert found.decode([count + 1]) == ""


def test_tokens_that_end_a_text(trained, tmp_path):
    more = {"eos_token_id": 0, "eot_token_id": 1, "eom_token_id": -1}
    found = reads(written(tmp_path, **fields_of(trained, "gpt2", pre="gpt-2", **more)))
    assert found.eot_ids == (0, 1, 2)  # <|im_end|> by its name


def test_how_tokens_are_to_be_chosen(trained, tmp_path):
    fields = fields_of(trained, "gpt2", pre="gpt-2", eos_token_id=2)
    wanted = {"temp": 0.6, "top_k": 20, "top_p": 0.95}
    file = written(tmp_path, **fields, **{f"general__sampling__{k}": v for k, v in wanted.items()})
    checkpoints.convert_gguf(file, tmp_path / "ours")
    for path in (file, tmp_path / "ours"):
        asked = default_sampling(path)
        assert (asked.temperature, asked.top_k, asked.top_p) == (0.6, 20, 0.95)
    assert default_sampling(written(tmp_path, **fields)) == ffjax.SamplingParams()


# What cannot come in


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"pre": "kimi-k2"}, "The way 'kimi-k2' of cutting texts .* supported: gpt-2, smollm,"),
        ({"pre": None}, r"says how texts are cut \(tokenizer.ggml.pre\); .* does not"),
        ({"pre": "default"}, "like other files of before May 2024"),
        ({"model": "t5"}, 'tokenizer.ggml.model "t5" is not supported; supported: gpt2, llama'),
        ({"model": None}, "tokenizer.ggml.model null is not supported"),
        ({"model": 3}, "tokenizer.ggml.model of .* is a text, got 3"),
        ({"tokens": None}, "Take a file of the model with its tokenizer"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "tokens 0 and 1 are both 'a'"),
        ({"token_type": [1]}, r"it has \d+ tokens and 1 types of tokens"),
        ({"merges": None}, "has merges .* has none"),
        ({"merges": ["a z"]}, "'a z' is no merge of two of its tokens into a third"),
        ({"eos_token_id": None, "token_type": None}, "A text ends with a token .* names none"),
        ({"add_bos_token": 1}, "add_bos_token of .* is true or false, got 1"),
        ({"model": "llama"}, "has a score for each token .* has not"),
    ],
)
def test_tokenizers_that_are_not_supported(fields, match, tmp_path):
    more = {f"tokenizer__ggml__{name}": value for name, value in fields.items()}
    file = write_gguf(tmp_path / "x.gguf", "tied", **{**byte_vocabulary(), **more})
    with pytest.raises(checkpoints.CheckpointError, match=match) as caught:
        tokenizer_files(read_header(file))
    assert str(file) in str(caught.value)
    assert str(caught.value).endswith(".")

    def read(done: int, total: int) -> None:
        raise AssertionError("Weights were read before the tokenizer was refused.")

    with pytest.raises(checkpoints.CheckpointError, match=match):
        checkpoints.convert_gguf(file, tmp_path / "out", progress=read)
    assert [one.name for one in tmp_path.iterdir()] == ["x.gguf"]
    checkpoints.load(file)  # the weights are none the worse for it
