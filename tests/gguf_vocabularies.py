"""Vocabularies for GGUF files in tests, as fields of their metadata."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

__all__ = ["SPACE", "byte_vocabulary", "fields_of", "trained_bytes", "trained_pieces"]

SPACE = "\u2581"
_TEXT = """It's 12345 o'clock, I'LL say: don't! We'd rather 1,024.75 x_1y22 helloWorld HTTPServer
\tfor i in range(10):\n        print(f"{i}")\n\n\n  # a/b//c\n/ ... ???\r\n\r\n x   y    z
Übermäßig naïve cafe\u0301 日本語の文章 مرحبا Привет, мир! 😀👍🏽 ²³ ½ Ⅷ ٣٤ ǅungla ñandú
"""

_NORMAL, _CONTROL, _OWN, _UNUSED, _BYTE = 1, 3, 4, 5, 6


def byte_vocabulary() -> dict[str, Any]:
    """A few letters, for models with few tokens."""
    tokens = ["<|endoftext|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ċ", "ab"]
    return {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": "gpt-2",
        "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__token_type": [_CONTROL] * 2 + [_NORMAL] * (len(tokens) - 2),
        "tokenizer__ggml__merges": ["a b"],
        "tokenizer__ggml__eos_token_id": 1,
        "tokenizer__chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    }


def trained_bytes(special: list[str]) -> dict[str, Any]:
    """A byte-level tokenizer.json whose merges cross words, digits and lines.

    It cuts nothing before BPE, so that whoever reads its merges shows in the tokens how he cuts.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # What one way of cutting joins, and another parts.
    across = [f"{a}{b}" for a in _TEXT.split(" ") for b in (" ", "\n", "1", "'s", "  ")]
    across += ["I'LLabc", "we'LLabc", "q'LLabc", "what?\n/ or?\n/x"] * 5
    tokenizer.train_from_iterator([_TEXT, *across * 2], trainer)
    return json.loads(tokenizer.to_str())


def trained_pieces(special: list[str]) -> dict[str, Any]:
    """A tokenizer.json with pieces of texts in which a mark stands for the space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    random = Random(0)
    # Of few letters, so that a word can be cut in several ways.
    drawn = ["".join(random.choices("abcd", k=random.randint(3, 9))) for _ in range(300)]
    words = [f" {word}" for word in [*_TEXT.replace("日本語", "").split(), *drawn]]
    tokenizer.train_from_iterator(words * 2, trainer)
    return json.loads(tokenizer.to_str())


def fields_of(data: dict[str, Any], kind: str, **more: Any) -> dict[str, Any]:
    """The fields of a GGUF file for a tokenizer.json.

    Args:
        data: the file.
        kind: "gpt2" or "llama".
        more: fields of the tokenizer, without "tokenizer.ggml.".
    """
    vocab = data["model"]["vocab"]
    texts = sorted(vocab, key=vocab.__getitem__)
    kinds = {one["content"]: _CONTROL if one["special"] else _OWN for one in data["added_tokens"]}
    types = [
        _BYTE if kind == "llama" and re.fullmatch("<0x..>", text) else kinds.get(text, _NORMAL)
        for text in texts
    ]
    fields: dict[str, Any] = {"model": kind, "tokens": texts, "token_type": types}
    if kind == "gpt2":
        merges = data["model"]["merges"]
        fields["merges"] = [one if isinstance(one, str) else " ".join(one) for one in merges]
    else:
        fields["scores"] = [-float(i) for i in range(len(texts))]
    fields |= more
    return {f"tokenizer__ggml__{name}": value for name, value in fields.items()}
