"""A vocabulary of bytes and merges ("gpt2" in GGUF) as the parts of a tokenizer.json."""

from __future__ import annotations

from typing import Any

from checkpoints.gguf.metadata import Metadata
from checkpoints.gguf.splits import SPLITS
from checkpoints.gguf.vocabulary import START, Vocabulary
from checkpoints.manifest import CheckpointError

__all__ = ["byte_level"]


def byte_level(metadata: Metadata, vocabulary: Vocabulary) -> tuple[dict[str, Any], bool]:
    """Normalizer, pre-tokenizer, model and decoder; and whether BOS is usual.

    Args:
        metadata: the fields.
        vocabulary: the tokens.

    Raises:
        CheckpointError: the file does not say how texts are cut, or a way that is not supported;
            or its merges are damaged.
    """
    name = metadata.text(f"{START}pre")
    if name in (None, "default"):
        raise CheckpointError(
            f"A tokenizer of bytes says how texts are cut ({START}pre); {metadata.file} does not, "
            "like other files of before May 2024. Take a newer file of the model."
        )
    if (split := SPLITS.get(name)) is None:
        raise CheckpointError(
            f"The way {name!r} of cutting texts ({START}pre) is not supported; supported: "
            f"{', '.join(SPLITS)}. The metadata of {metadata.file} asks for it. The weights alone "
            "can be loaded, and saved with another tokenizer: tokenizer_from of ffjax.save."
        )
    parts = {
        "normalizer": None if split.normalizer is None else {"type": split.normalizer},
        "pre_tokenizer": split.pre_tokenizer(),
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": split.whole_words,
            "vocab": vocabulary.ids,
            "merges": _merges(metadata, vocabulary),
        },
    }
    return parts, split.bos


def _merges(metadata: Metadata, vocabulary: Vocabulary) -> list[list[str]]:
    """The merges, each as its two halves."""
    texts = metadata.get(f"{START}merges")
    if not isinstance(texts, list):
        raise CheckpointError(
            f"A tokenizer of bytes has merges ({START}merges); the metadata of {metadata.file} has "
            "none. Take another file of the model."
        )
    merges = [text.split(" ") for text in texts]
    for text, halves in zip(texts, merges, strict=True):
        known = len(halves) == 2 and {*halves, "".join(halves)} <= vocabulary.ids.keys()
        if not known:
            raise CheckpointError(
                f"{metadata.file} is damaged: {text!r} is no merge of two of its tokens into a "
                "third. Download or copy it again."
            )
    return merges
