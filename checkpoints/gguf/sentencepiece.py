"""A vocabulary of pieces and scores ("llama" in GGUF) as the parts of a tokenizer.json.

SentencePiece joins, again and again, those two neighbours whose joint piece has the best score.
Merges in the order of scores do the same, but where one piece can be made in two ways.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from checkpoints.gguf.metadata import Metadata
from checkpoints.gguf.vocabulary import BYTE, NORMAL, START, Vocabulary
from checkpoints.manifest import CheckpointError

__all__ = ["pieces"]

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what stands for a space in a piece


def pieces(metadata: Metadata, vocabulary: Vocabulary) -> tuple[dict[str, Any], bool]:
    """Normalizer, pre-tokenizer, model and decoder; and whether BOS is usual, which it is.

    Args:
        metadata: the fields.
        vocabulary: the tokens.

    Raises:
        CheckpointError: there are no scores, or not one for each token.
    """
    first = metadata.flag(f"{START}add_space_prefix", True)
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    before = [{"type": "Prepend", "prepend": _SPACE}] if first else []
    behind = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if first else []
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": [*before, replaced]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *behind],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": vocabulary.roles["unk_token"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": BYTE in vocabulary.kinds,
            "ignore_merges": False,
            "vocab": vocabulary.ids,
            "merges": _merges(vocabulary, _scores(metadata, vocabulary)),
        },
    }
    return parts, True


def _scores(metadata: Metadata, vocabulary: Vocabulary) -> list[float]:
    scores = metadata.get(f"{START}scores")
    if not isinstance(scores, np.ndarray) or scores.size != len(vocabulary.kinds):
        raise CheckpointError(
            f"A tokenizer of pieces has a score for each token ({START}scores); the metadata of "
            f"{metadata.file} has not. Take another file of the model."
        )
    return scores.tolist()


def _merges(vocabulary: Vocabulary, scores: list[float]) -> list[list[str]]:
    """Every two pieces that make a third, the best third first."""
    ids = {t: i for t, i in vocabulary.ids.items() if vocabulary.kinds[i] == NORMAL}
    found: list[tuple[float, int, int, str, str]] = []
    for text, index in ids.items():
        score = -scores[index]
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                found.append((score, ids[left], ids[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]
