"""The text and the bytes of single tokens, for log-probabilities."""

from __future__ import annotations

import functools
import re

from ffjax.hf_stream import REPLACEMENT
from ffjax.hf_tokenizer import HFTokenizer
from ffjax.tokenizer import ByteTokenizer, Tokenizer

__all__ = ["TokenTexts"]

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_KEPT = 1 << 16


class TokenTexts:
    """What each token of a tokenizer says by itself.

    A token that is part of a character has U+FFFD for a text, and its bytes tell the truth; special
    tokens, which no answer shows, have their name.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Of a tokenizer."""
        self._tokenizer = tokenizer
        self.of = functools.lru_cache(maxsize=_KEPT)(self._of)

    def _of(self, token: int) -> tuple[str, bytes | None]:
        """A token's text, and its bytes in UTF-8; None where they are not known."""
        if isinstance(self._tokenizer, ByteTokenizer):
            if token >= 256:
                return "<|endoftext|>", b""
            return bytes([token]).decode("utf-8", "replace"), bytes([token])
        try:
            # After itself it keeps the space that a text's first word may lose.
            alone = self._tokenizer.decode([token])
            text = self._tokenizer.decode([token, token])[len(alone) :]
        except ValueError:
            return "", None
        name = self._name(token)
        if not text:
            return (name, name.encode()) if name else ("", b"")
        if REPLACEMENT not in text:
            return text, text.encode()
        if name and (found := _BYTE.fullmatch(name)):
            return text, bytes([int(found[1], 16)])
        table = _byte_letters()
        if name and all(letter in table for letter in name):
            own = bytes(table[letter] for letter in name)
            if own.decode("utf-8", "replace") == alone:
                return alone, own
        return text, None

    def _name(self, token: int) -> str | None:
        return self._tokenizer.name_of(token) if isinstance(self._tokenizer, HFTokenizer) else None


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The letters by which vocabularies over bytes (GPT-2's and later ones) write each byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    return letters | {chr(256 + i): byte for i, byte in enumerate(hidden)}
