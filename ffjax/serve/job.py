"""One sequence that the scheduler runs, and what is told of it as it comes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

from ffjax.broken import NotFiniteError
from ffjax.loop import NOT_FINITE
from ffjax.sampling.params import SamplingParams
from ffjax.serve.batch import Batch, Chosen
from ffjax.serve.errors import ApiError, server_error
from ffjax.text.writer import Writer

__all__ = ["Ended", "Event", "Job", "Piece"]


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """What has come since the last piece.

    Attributes:
        text: characters that are certain; there may be none.
        tokens: the new tokens' ids.
        logprobs: of each token, as the batch has them; empty where nobody asked.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """The sequence is complete.

    Attributes:
        finish_reason: "stop" or "length".
        stop_reason: the stop string, or the stop token's id.
    """

    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None


Event = Piece | Ended | ApiError


class Job:
    """A sequence that was asked for.

    The scheduler's thread changes it, but for `cancelled`, which anyone may set.

    Attributes:
        prompt: token ids, at least one.
        params: how its tokens are chosen; `max_tokens` and `seed` are given.
        eos: tokens that end a text of the model.
        tokens: the new ones, without the stop token.
        cached: tokens of the prompt that a row's cache held already.
        fed: tokens of the prompt that the device was told to feed.
        accepted: of the new tokens those that were drafts which were right.
        ordered: new tokens that the device was told to make.
        cancelled: nobody waits for it any more.
        end: how it has ended; None while it has not, or where it was cancelled.
        over: it has ended, failed or was cancelled, and nothing more is told.
        began: when it was asked for, by `time.perf_counter`.
        first: when its first token came; None before.
        last: when its last tokens came; None before.
    """

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        eos: Iterable[int],
        writer: Writer,
        tell: Callable[[Event], object],
    ):
        """Asks for a sequence.

        Args:
            prompt: token ids, at least one.
            params: with `max_tokens` and `seed`.
            eos: tokens that end a text of the model.
            writer: of its text.
            tell: is given what comes, from the scheduler's thread. The last is `Ended` or an
                error.
        """
        if params.max_tokens is None:
            raise ValueError("A job says how many tokens it gets; max_tokens is None.")
        self.prompt = prompt
        self.params = params
        self.eos = tuple(eos)
        self.tokens: list[int] = []
        self.cached = 0
        self.accepted = 0
        self.fed = 0
        self.ordered = 0
        self.cancelled = False
        self.end: Ended | ApiError | None = None
        self.over = False
        self.began = time.perf_counter()
        self.first: float | None = None
        self.last: float | None = None
        self._most = params.max_tokens
        self._stops = frozenset(params.ends(self.eos))
        self._writer = writer
        self._tell = tell

    @property
    def is_ordered(self) -> bool:
        """Whether the device was told to make as many tokens as it may get."""
        return self.ordered >= self._most

    @property
    def held(self) -> list[int]:
        """What the cache of its row holds for certain, when it leaves."""
        if isinstance(self.end, ApiError):  # what is there may be no numbers
            return []
        if isinstance(self.end, Ended) and isinstance(self.end.stop_reason, int):
            return self.prompt + self.tokens  # after all of which the stop token was chosen
        if self.tokens:  # the last one was chosen, and perhaps never fed
            return self.prompt + self.tokens[:-1]
        return self.prompt[: self.fed]

    def take(self, chosen: Iterable[Chosen], batch: Batch, now: float) -> list[Event]:
        """Takes what the device has chosen.

        What comes after an end is for nobody.

        Args:
            chosen: the next tokens.
            batch: which has chosen them.
            now: when they came, by `time.perf_counter`.

        Returns:
            What is to be told of it.
        """
        text, tokens, logprobs = "", [], []
        end: Ended | ApiError | None = None
        for one in chosen:
            token = int(one.token)
            if token == NOT_FINITE:
                end = _not_finite(len(self.tokens), batch.fault())
                break
            if token in self._stops:
                end = Ended("stop", token)
                break
            self.tokens.append(token)
            self.accepted += one.drafted
            tokens.append(token)
            if one.logprobs is not None and self.params.logprobs is not None:
                logprobs.append(one.logprobs)
            if self.params.stop:
                text += self._writer.push(token)
                if self._writer.stopped is not None:
                    end = Ended("stop", self._writer.stopped)
                    break
            count = len(self.tokens)
            if count == self._most or len(self.prompt) + count == batch.capacity:
                end = Ended("length", None)
                break
        if not self.params.stop:  # then it is done faster
            text = self._writer.push_all(tokens)
        if isinstance(end, Ended):
            text += self._writer.finish()
        if tokens:
            self.first, self.last = self.first or now, now
        events: list[Event] = []
        if text or tokens:
            events.append(Piece(text, tuple(tokens), tuple(logprobs)))
        if end is not None:
            self.end, self.over = end, True
            events.append(end)
        return events

    def tell(self, events: Iterable[Event]) -> None:
        """Tells its reader."""
        for event in events:
            self._tell(event)

    def leave(self) -> None:
        """Ends it without a word."""
        self.over = True

    def fail(self, error: ApiError) -> None:
        """Ends it with an error, where it has not ended."""
        if not self.over:
            self.end, self.over = error, True
            self._tell(error)


def _not_finite(count: int, fault: str | None) -> ApiError:
    said = str(NotFiniteError(0, count, fault)).replace(
        "those of sequence 0", "those of this request"
    )
    return server_error(said, code="not_finite")
