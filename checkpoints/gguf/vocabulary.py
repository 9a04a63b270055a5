"""The tokens of a GGUF file: their texts, what each is for, and which have a role."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from checkpoints.gguf.metadata import Metadata
from checkpoints.manifest import CheckpointError

__all__ = ["BYTE", "NORMAL", "START", "Vocabulary", "added_tokens", "read_vocabulary"]

START = "tokenizer.ggml."

# What a token is for, as the file numbers it.
NORMAL, _UNKNOWN, _CONTROL, _OWN, _UNUSED, BYTE = range(1, 7)

# Roles, as Hugging Face calls them, and the fields with their ids.
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Of Phi 3, whose other special tokens swallow the spaces after them: no field says so, and
# llama.cpp knows it by the model's name.
_KEEP_SPACES = ("<unk>", "<s>", "<|endoftext|>")
# Special tokens that end a text in every model that has them.
_END_TEXTS = {
    *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    *("<|im_end|>", "<|endoftext|>", "<end_of_turn>", "<|end|>"),
}


class Vocabulary(NamedTuple):
    """The tokens that a text can have.

    Attributes:
        ids: of each text its token, but for the rows that pad an embedding.
        kinds: what each is for, by id; `NORMAL` or `BYTE` among them.
        roles: texts by role, as in "bos_token"; None where none has it.
        ends: ids of the tokens that end a text.
    """

    ids: dict[str, int]
    kinds: list[int]
    roles: dict[str, str | None]
    ends: list[int]


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """Reads the tokens.

    Args:
        metadata: the fields.

    Raises:
        CheckpointError: there are none, or they contradict each other.
    """
    file = metadata.file
    texts = metadata.get(f"{START}tokens")
    if not isinstance(texts, list) or not texts:
        raise CheckpointError(
            f"A tokenizer has tokens ({START}tokens); the metadata of {file} has none. Take a file "
            "of the model with its tokenizer."
        )
    kinds = metadata.get(f"{START}token_type")
    kinds = [NORMAL] * len(texts) if kinds is None else np.asarray(kinds).tolist()
    if len(kinds) != len(texts):
        raise CheckpointError(
            f"{file} is damaged: it has {len(texts)} tokens and {len(kinds)} types of tokens. "
            "Download or copy it again."
        )
    ids: dict[str, int] = {}
    for i, text in enumerate(texts):
        # Rows of the embedding beyond the tokenizer's have names that no text can spell.
        if kinds[i] == _UNUSED and text == f"[PAD{i}]":
            continue
        if text in ids:
            raise CheckpointError(
                f"A token's text is there once; in {file} tokens {ids[text]} and {i} are both "
                f"{text!r}. Take another file of the model."
            )
        ids[text] = i
    roles = {role: _role(metadata, field, texts) for role, field in _ROLES.items()}
    ends = [metadata.get(START + field) for field in _ENDS]
    ends += [ids[text] for text in sorted(_END_TEXTS & ids.keys()) if kinds[ids[text]] == _CONTROL]
    known = [end for end in ends if isinstance(end, int) and 0 <= end < len(texts)]
    if not known:
        raise CheckpointError(
            f"A text ends with a token ({START}eos_token_id); the metadata of {file} names none. "
            "Take another file of the model."
        )
    return Vocabulary(ids, kinds, roles, list(dict.fromkeys(known)))


def _role(metadata: Metadata, field: str, texts: list[str]) -> str | None:
    """The text of the token with a role."""
    index = metadata.get(START + field)
    # Some files have -1 for none, read as the largest number there is.
    if not isinstance(index, int) or not 0 <= index < len(texts):
        return None
    return texts[index]


def added_tokens(vocabulary: Vocabulary, swallow: bool = False) -> list[dict[str, Any]]:
    """The added_tokens of tokenizer.json: those that a text may spell out, in the order of ids.

    Args:
        vocabulary: the tokens.
        swallow: whether they take the spaces after them along, as Phi 3's do.
    """
    special = {text for text in vocabulary.roles.values() if text is not None}
    return [
        {
            "id": index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": swallow and text not in _KEEP_SPACES,
            "normalized": False,
            "special": text in special or vocabulary.kinds[index] in (_UNKNOWN, _CONTROL),
        }
        for text, index in vocabulary.ids.items()
        if vocabulary.kinds[index] in (_UNKNOWN, _CONTROL, _OWN) and text
    ]
