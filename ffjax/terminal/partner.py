"""What a chat asks of the one that answers: an `ffjax.ChatSession`, or a test's stand-in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

__all__ = ["Answer", "Message", "NewPartner", "Partner", "Pieces"]

Message = dict[str, Any]
"""With "role" and "content", both str."""


class Answer(Protocol):
    """What is known of an answer so far; see `ffjax.text.Completion`."""

    @property
    def tokens(self) -> Sequence[int]:
        """Its token ids."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the conversation before it has."""
        ...

    @property
    def cached_tokens(self) -> int:
        """How many of those the cache held already."""
        ...

    @property
    def finish_reason(self) -> str | None:
        """What ended it, "stop" or "length"; None where it was stopped from outside."""
        ...

    @property
    def compile_seconds(self) -> float:
        """Time that compiling took before the first token."""
        ...

    @property
    def accepted(self) -> int | None:
        """How many tokens were drafts that were right; None where there were no drafts."""
        ...

    @property
    def tokens_per_step(self) -> float:
        """Of the decode steps; NaN where there were none."""
        ...

    @property
    def tokens_per_second(self) -> float:
        """Of the decode steps; NaN where there were none."""
        ...


class Pieces(Iterator[str], Protocol):
    """An answer as it comes, in pieces of text."""

    @property
    def completion(self) -> Answer:
        """What is known of it so far."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


class Partner(Protocol):
    """A conversation's other side, with a cache of its own."""

    def reply(
        self,
        messages: Sequence[Message],
        sampling: Any = None,
        *,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Pieces:
        """Answers the last of the messages."""
        ...

    def close(self) -> None:
        """Frees the cache."""
        ...


NewPartner = Callable[[], Partner]
"""Makes a partner with an empty cache."""
