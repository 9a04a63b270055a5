"""The characters of one text, from tokens as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from ffjax.sampling.params import SamplingParams
from ffjax.text.stop_strings import StopStrings
from ffjax.tokenizer import Tokenizer

__all__ = ["Writer"]

# Tokens of a prompt that a new one's text may hang on: a word's space, a character cut in two.
_CONTEXT = 256
# Of those, the last ones are taken one by one: where a prompt ends inside a character, the whole
# characters before it have been said then, and are not said again with the text.
_ONE_BY_ONE = 16


class Writer:
    """Writes one text that goes on from a prompt.

    What `push` and `finish` return is, joined, the text: no character is split, and no stop string
    is shown. A word that follows the prompt keeps its space, since the prompt's last tokens go
    through the same decoder.

    Attributes:
        text: what has been returned, joined.
        count: tokens that have come.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], params: SamplingParams):
        """Starts after a prompt.

        Args:
            tokenizer: the model's.
            prompt: the prompt's token ids; its text is not returned.
            params: `stop`, `include_stop_str_in_output` and `min_tokens` count here.
        """
        self._decoder = tokenizer.stream()
        context = [*prompt[-_CONTEXT:]]
        self._decoder.push_all(context[:-_ONE_BY_ONE])
        for token in context[-_ONE_BY_ONE:]:
            self._decoder.push(token)
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._least = params.min_tokens
        self.text = ""
        self.count = 0

    @property
    def stopped(self) -> str | None:
        """The stop string that has ended the text; None: none has."""
        return self._stops.found

    def push(self, token: int) -> str:
        """The characters that are certain with another token; empty once the text has ended."""
        if self.stopped is not None:
            return ""
        self.count += 1
        return self._add(self._decoder.push(token))

    def push_all(self, tokens: Sequence[int]) -> str:
        """The same of several tokens of a text that no stop string can end."""
        self.count += len(tokens)
        return self._add(self._decoder.push_all(tokens))

    def finish(self) -> str:
        """What was held back of a text that ends here.

        A text that ends inside a character ends with U+FFFD for it.
        """
        if self.stopped is not None:
            return ""
        return self._add(self._decoder.finish()) + self._write(self._stops.finish())

    def _add(self, piece: str) -> str:
        return self._write(self._stops.push(piece, may_end=self.count > self._least))

    def _write(self, piece: str) -> str:
        self.text += piece
        return piece
