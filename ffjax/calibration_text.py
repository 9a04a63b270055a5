"""Sequences of tokens to calibrate with, cut from texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ffjax.tokenizer import ByteTokenizer, Tokenizer

__all__ = ["LENGTH", "SEQUENCES", "calibration_tokens"]

SEQUENCES = 128
LENGTH = 512
"""Sequences, and tokens of each, where nobody asks for others."""


def calibration_tokens(
    texts: Sequence[bytes],
    tokenizer: Tokenizer | None = None,
    *,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
) -> np.ndarray:
    """Sequences of one length, spread evenly over texts that are put one after the other.

    After each text stands end-of-text. Each sequence begins with what the tokenizer puts before a
    text (BOS), if anything. They do not overlap, and are fewer where there is too little text; a
    text of less than one sequence is one of its own length.

    Args:
        texts: the bytes of each file, UTF-8 where the tokens are not bytes.
        tokenizer: the model's, as `ffjax.load_tokenizer` returns it; None: tokens are bytes, as
            those of the shipped model.
        sequences: n, at most.
        length: T, tokens of each.

    Returns:
        int32 `[n, T]`.

    Raises:
        TypeError: the texts are no sequence of bytes.
        ValueError: there are no tokens; a text is not UTF-8; sequences or length is not positive,
            or has no room for what the tokenizer puts before a text.
    """
    if sequences < 1 or length < 1:
        raise ValueError(
            "Calibration needs at least one sequence of at least one token; got "
            f"sequences={sequences}, length={length}."
        )
    if isinstance(texts, str | bytes) or not all(isinstance(text, bytes) for text in texts):
        raise TypeError(
            "Calibration reads several texts, a list of bytes, one for each file; got "
            f"{'one' if isinstance(texts, str | bytes) else 'other things in the list'}. "
            "Path.read_bytes() has a file's."
        )
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    before: list[int] = []
    own: list[int] = []
    for i, text in enumerate(texts):
        if isinstance(tokenizer, ByteTokenizer):
            own += [*text, tokenizer.eot_id]
            continue
        try:
            before, tokens = tokenizer.split(text.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                "A model whose tokens are not bytes reads text in UTF-8; of calibration text "
                f"{i}, the byte at {error.start} is none. Convert the text."
            ) from None
        own += [*tokens, tokenizer.eot_id]
    if len(own) <= len(texts):
        raise ValueError("Calibration needs a text of at least one token; there is none.")
    each = length - len(before)
    if each < 1:
        raise ValueError(
            f"A sequence has room for the {len(before)} tokens that the tokenizer puts before a "
            f"text, and for others; of {length} tokens it has not. Choose a longer one."
        )
    each = min(each, len(own))
    count = min(sequences, len(own) // each)
    firsts = np.linspace(0, len(own) - each, count).astype(int)
    rows = [[*before, *own[first : first + each]] for first in firsts]
    return np.array(rows, np.int32)
