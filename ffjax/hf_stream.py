"""Text from tokens that come one by one, with a Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["REPLACEMENT", "HFStreamDecoder"]

REPLACEMENT = "\ufffd"  # what decoding puts where bytes are not, or not yet, a character

# A character is cut into four bytes at most, so that of the characters at the end of a text at
# most three may still become another.
_OPEN = 3
# Characters not shown before some of them are, and tokens held before some are let go. A text of
# bytes that are no characters takes time by its length that way, not by its square.
_MOST_UNSHOWN = 8
_MOST_HELD = 32
# Tokens that say the open characters, and at least one more, however they are cut.
_KEPT = 16


class HFStreamDecoder:
    """Decodes one text token by token, holding back a character until it is whole.

    A token's text depends on those before it: the first word of a text may lose its space, a
    character may be cut into several tokens. So each time the last few tokens are decoded
    together, and what they say beyond what was shown is what the new one adds.

    What `push` and `finish` return is, joined, what `decode` returns for all the tokens, as long
    as they are UTF-8. Where bytes are not, both have U+FFFD for them; a vocabulary whose rare
    characters are single bytes ("<0xE2>") has it, in `decode` alone, for their neighbours too.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        is_silent: Callable[[int], bool],
        byte_of: Callable[[int], int | None],
    ):
        """Starts at the beginning of a text.

        Args:
            decode: the text of token ids.
            is_silent: whether decoding leaves a token out, whatever stands beside it.
            byte_of: the byte that a token is, in a vocabulary that has rare characters so.
        """
        self._decode, self._is_silent, self._byte_of = decode, is_silent, byte_of
        self._context: list[int] = []  # the tokens of the last piece
        self._held: list[int] = []  # the tokens not shown yet, or not to the end
        self._said = ""  # what has been shown of both

    def push(self, token: int) -> str:
        """The characters that this token completes; empty while one is still cut in two.

        Raises:
            ValueError: the id is negative.
        """
        token = int(token)
        if self._is_silent(token):
            return ""
        self._held.append(token)
        return self._take(at_end=False)

    def push_all(self, tokens: Sequence[int]) -> str:
        """The same of several tokens: their text is decoded once, and not for each of them.

        Raises:
            ValueError: an id is negative.
        """
        heard = [token for token in map(int, tokens) if not self._is_silent(token)]
        if not heard:
            return ""
        if any(self._byte_of(token) is not None for token in heard):
            # One byte that is missing at the end would cost the whole characters before it.
            return "".join([self.push(token) for token in heard])
        self._held += heard
        return self._take(at_end=False)

    def finish(self) -> str:
        """What a text cut off inside a character leaves: U+FFFD for it, or nothing."""
        return self._take(at_end=True)

    def _take(self, *, at_end: bool) -> str:
        now = self._decode(self._context + self._held)
        if not now.startswith(self._said):
            # Bytes that are not UTF-8 have changed what their neighbours say.
            self._context, self._said, now = [], "", self._decode(self._held)
        if not at_end:
            if len(now) <= len(self._said):
                return ""
            if now.endswith(REPLACEMENT) and not self._holds_whole_characters():
                return self._take_settled(now)
        piece = now[len(self._said) :]
        self._context, self._held = self._held or self._context, []
        self._said = self._decode(self._context)
        return piece

    def _holds_whole_characters(self) -> bool:
        """Whether the tokens held are bytes, and they UTF-8 to the end: of U+FFFD itself."""
        values = [self._byte_of(token) for token in self._held]
        found = [value for value in values if value is not None]
        if len(found) < len(values) or len(found) > _MOST_HELD:
            return False
        try:
            return bool(bytes(found).decode("utf-8"))
        except UnicodeDecodeError:
            return False

    def _take_settled(self, now: str) -> str:
        """Of a text that ends inside a character or not with one: what nothing changes any more."""
        if len(now) - len(self._said) < _MOST_UNSHOWN:
            return ""
        piece = now[len(self._said) : -_OPEN]
        self._said = now[:-_OPEN]
        if len(self._held) > _MOST_HELD:
            tail = self._held[-_KEPT:]
            text = self._decode(tail)
            if len(text) > _OPEN and text[-_OPEN:] == now[-_OPEN:]:
                self._context, self._held, self._said = [], tail, text[:-_OPEN]
        return piece
