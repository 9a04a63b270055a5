"""Text to token ids and back: the byte tokenizer, and what any other must offer."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from ffjax.config import ModelConfig

__all__ = ["ByteTokenizer", "StreamDecoder", "Tokenizer", "check_known"]


class StreamDecoder(Protocol):
    """Turns the tokens of one text into characters as they come."""

    def push(self, token: int) -> str:
        """The characters that this token completes; empty while one is still cut in two."""
        ...

    def push_all(self, tokens: Sequence[int]) -> str:
        """The same of several tokens, in less time than one by one."""
        ...

    def finish(self) -> str:
        """What a text cut off inside a character leaves: U+FFFD for it, or nothing."""
        ...


class Tokenizer(Protocol):
    """What a model's tokenizer offers, whatever its vocabulary."""

    @property
    def vocab_size(self) -> int:
        """V, one more than the highest token id."""
        ...

    @property
    def eot_id(self) -> int:
        """The token that ends a text; the first of `eot_ids`."""
        ...

    @property
    def eot_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: models for conversations may have several."""
        ...

    def encode(self, text: str) -> list[int]:
        """The text's token ids."""
        ...

    def split(self, text: str) -> tuple[list[int], list[int]]:
        """The token ids that `encode` puts before the text (BOS, or none), and the text's own."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; special tokens have none."""
        ...

    def stream(self) -> StreamDecoder:
        """A fresh decoder for tokens that come one by one."""
        ...


def _as_bytes(tokens: Iterable[int]) -> bytes:
    """The bytes of token ids; the end-of-text token has none."""
    out = bytearray()
    for token in tokens:
        if not 0 <= token < ByteTokenizer.vocab_size:
            raise ValueError(
                f"A byte tokenizer's ids are 0 to {ByteTokenizer.vocab_size - 1}, got {token}. "
                "Is it another model's token?"
            )
        if token != ByteTokenizer.eot_id:
            out.append(token)
    return bytes(out)


class ByteTokenizer:
    """Token ids 0 to 255 are the bytes of the text in UTF-8; 256 ends a text.

    Attributes:
        vocab_size: V, 257.
        eot_id: 256.
        eot_ids: that one.
    """

    vocab_size: int = 257
    eot_id: int = 256
    eot_ids: tuple[int, ...] = (256,)

    def encode(self, text: str) -> list[int]:
        """The bytes of the text in UTF-8, without an end-of-text token.

        A lone surrogate that `os.fsdecode` made of an undecodable byte, as in a
        command line argument, becomes that byte again.

        Args:
            text: of any length; an empty one has no tokens.

        Returns:
            Ids from 0 to 255.

        Raises:
            ValueError: the text holds another lone surrogate, which UTF-8 cannot express.
            TypeError: the text is no string.
        """
        if not isinstance(text, str):
            raise TypeError(f"A tokenizer encodes a str, got {type(text).__name__}.")
        try:
            return list(text.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError as error:
            raise ValueError(
                f"UTF-8 has no lone surrogates; the text has {text[error.start]!r} at index "
                f"{error.start}. Remove it or replace it."
            ) from None

    def split(self, text: str) -> tuple[list[int], list[int]]:
        """No token ids, for nothing stands before the text, and the text's own; see `encode`."""
        return [], self.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids.

        End-of-text tokens are left out. Bytes that are not UTF-8 become U+FFFD: a
        model may say any byte.

        Raises:
            ValueError: an id is outside 0 to 256.
        """
        return _as_bytes(tokens).decode("utf-8", "replace")

    def stream(self) -> ByteStreamDecoder:
        """A fresh decoder for the bytes of one text, as they come."""
        return ByteStreamDecoder()


class ByteStreamDecoder:
    """Decodes one text byte by byte, holding back a character until it is whole.

    What `push` and `finish` return is, joined, what `decode` returns for all the tokens.
    """

    def __init__(self):
        """Starts at the beginning of a text."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes; empty while one is still cut in two.

        Raises:
            ValueError: the id is outside 0 to 256.
        """
        return self._decoder.decode(_as_bytes([token]))

    def push_all(self, tokens: Sequence[int]) -> str:
        """The same of several tokens.

        Raises:
            ValueError: an id is outside 0 to 256.
        """
        return self._decoder.decode(_as_bytes(tokens))

    def finish(self) -> str:
        """U+FFFD if the text was cut off inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)


def check_known(what: str, tokens: Sequence[int] | np.ndarray, config: ModelConfig) -> None:
    """Checks that a model knows every token of a text.

    Args:
        what: the text, as the error is to call it.
        tokens: its token ids.
        config: the model's configuration.

    Raises:
        ValueError: it does not know one of them.
    """
    ids = np.asarray(tokens)
    outside = np.flatnonzero((ids < 0) | (ids >= config.vocab_size))
    if outside.size:
        first = int(outside[0])
        raise ValueError(
            f"Token ids of {config.name} are 0 to {config.vocab_size - 1}; {what} has "
            f"{int(ids[first])} at index {first}. Leave out of the text what the tokenizer has "
            "that token for; or is it another model's tokenizer?"
        )
