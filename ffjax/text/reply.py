"""What has come of one reply, token by token, and what ends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ffjax.text.asked import Asked
from ffjax.text.completion import Completion
from ffjax.text.writer import Writer
from ffjax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ffjax.decode import Implementation
    from ffjax.generation import FinishReason
    from ffjax.live.made import Chosen
    from ffjax.prefill.choice import Prefill

__all__ = ["Reply"]


class Reply:
    """Takes the device's tokens of one sequence until it ends.

    Attributes:
        asked: what was asked for.
        read: every token that was taken, the stop token too.
        finish_reason: why it has ended; None as long as it has not.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        asked: Asked,
        *,
        cached_tokens: int,
        implementation: Implementation,
        prefill: Prefill,
        compile_seconds: float,
        speculates: bool = False,
    ):
        """Starts without a token.

        Args:
            tokenizer: the model's.
            asked: the prompt, and how to go on from it.
            cached_tokens: how many of the prompt's tokens are not fed.
            implementation: of the decode steps.
            prefill: of the prefill.
            compile_seconds: spent on compiling for it.
            speculates: whether steps may take drafts.
        """
        self.asked = asked
        self.read: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._stop_reason: int | str | None = None
        # A model of bytes ends a text with one of its own; a request may add others.
        params = asked.params
        self._stops = frozenset(params.ends(tokenizer.eot_ids))
        self._writer = Writer(tokenizer, asked.prompt, params)
        self._logprobs = []
        self._how = {
            "cached_tokens": cached_tokens,
            "implementation": implementation,
            "prefill": prefill,
            "compile_seconds": compile_seconds,
        }
        self._start = self._first = self._last = 0.0
        self._accepted = 0 if speculates else None
        self._closed = False

    def started(self, now: float) -> None:
        """Notes when the device got its first order, by `time.perf_counter`."""
        self._start = self._first = self._last = now

    @property
    def tokens(self) -> list[int]:
        """The new tokens, without a stop token."""
        return self.read[:-1] if isinstance(self._stop_reason, int) else self.read

    def take(self, chosen: Chosen, now: float) -> str:
        """Takes the next token; returns the characters that it makes certain.

        Args:
            chosen: the token, a finite one.
            now: when it was here.
        """
        if not self.read:
            self._first = now
        self._last = now
        self.read.append(chosen.token)
        if self._accepted is not None:
            self._accepted += chosen.drafted
        if chosen.token in self._stops:
            self.finish_reason, self._stop_reason = "stop", chosen.token
            return self._finish()
        if self.asked.params.logprobs is not None:
            self._logprobs.append(chosen.logprobs)
        piece = self._writer.push(chosen.token)
        if self._writer.stopped is not None:
            self.finish_reason, self._stop_reason = "stop", self._writer.stopped
        elif len(self.read) == self.asked.params.max_tokens:
            self.finish_reason = "length"
        return piece if self.finish_reason is None else piece + self._finish()

    def broken_off(self) -> None:
        """Lets the text end where it is, unless it has ended."""
        self._finish()

    def _finish(self) -> str:
        if self._closed:
            return ""
        self._closed = True
        return self._writer.finish()

    def completion(self) -> Completion:
        """What has come so far."""
        params = self.asked.params
        return Completion(
            text=self._writer.text,
            tokens=list(self.tokens),
            prompt_tokens=len(self.asked.prompt),
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            logprobs=None if params.logprobs is None else list(self._logprobs),
            seed=params.seed or 0,
            prefill_seconds=self._first - self._start,
            decode_seconds=self._last - self._first,
            accepted=self._accepted,
            **self._how,
        )
