"""A draft model of the user's own, as speculation."""

from __future__ import annotations

import dataclasses
import numbers
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from ffjax.config import ModelConfig
    from ffjax.model import Transformer
    from ffjax.requests import Request

__all__ = [
    "MOST_BY_ITSELF",
    "Draft",
    "check_draft",
    "check_draft_capacity",
    "check_draft_context",
    "shortest_context",
]

MOST_BY_ITSELF = 4
"""T where nobody says it, at most: each draft costs a step of the draft model, right or wrong."""


@dataclasses.dataclass(frozen=True, eq=False)
class Draft:
    """Speculation with a draft model: a small one of the same vocabulary writes ahead.

    The model's own quantized self is one, too: `ffjax.Draft(ffjax.quantize(model, "int4"))`. It is
    right most of the time, and saves less, since its steps are not so much faster.

    A draft is the token that the draft model would choose in the model's place: with the same
    noise, penalties, filters and logits processors. So where both agree, it is right, drawn or
    greedy.

    Attributes:
        model: the draft model, on the device of the model. Its tokens have to mean what the
            model's mean; of that, the size of the vocabulary is looked at.
        tokens: T, tokens that a step of the model takes of each sequence, T - 1 drafts and the one
            that is certain; B * T is 8 at most. None: 4 for up to 2 sequences, 2 for up to 4.

    Raises:
        ValueError: `tokens` is below 2.
        TypeError: it is no integer, or the model no `ffjax.Transformer`.
    """

    model: Transformer
    tokens: int | None = None

    def __post_init__(self):
        from ffjax.model import Transformer

        if not isinstance(self.model, Transformer):
            raise TypeError(
                f"A Draft takes a ffjax.Transformer, as ffjax.load returns; got {self.model!r}."
            )
        if self.tokens is None:
            return
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, numbers.Integral):
            raise TypeError(f"tokens of a Draft is an integer, got {self.tokens!r}.")
        object.__setattr__(self, "tokens", int(self.tokens))
        if self.tokens < 2:
            raise ValueError(
                "A step that speculates takes 2 tokens of a sequence or more; got "
                f"tokens={self.tokens}. Give more, or leave speculation out."
            )


def check_draft(draft: Draft, model: Transformer) -> None:
    """Refuses a draft model that cannot write ahead of a model.

    Raises:
        ValueError: its vocabulary has another size, or it is on another device.
    """
    from ffjax.decode import device_of

    mine, theirs = draft.model.config, model.config
    if mine.vocab_size != theirs.vocab_size:
        raise ValueError(
            f"A draft model has the vocabulary of the model: {mine.name} has {mine.vocab_size} "
            f"tokens, {theirs.name} has {theirs.vocab_size}. Take another draft model."
        )
    if (place := device_of(draft.model)) != (device := device_of(model)):
        raise ValueError(
            f"A draft model is on the device of the model: {mine.name} is on {place}, "
            f"{theirs.name} on {device}. Put both on one."
        )


def check_draft_context(draft: Draft, request: Request) -> None:
    """Refuses a request that goes beyond what a draft model was made for.

    Raises:
        ValueError: it does.
    """
    config = draft.model.config
    pairs = zip(request.prompts, request.limits, strict=True)
    need = max(len(prompt) + limit for prompt, limit in pairs)
    if need > config.max_context:
        raise ValueError(
            f"Prompt and new tokens need {need} positions; the draft model {config.name} was made "
            f"for {config.max_context}. Ask for fewer tokens, or take another draft model."
        )


def shortest_context(model: Transformer, speculation: Any) -> ModelConfig:
    """Whose `max_context` limits a sequence: the model's, or a draft model's that has less.

    Args:
        model: the model.
        speculation: what is asked for.
    """
    if not isinstance(speculation, Draft):
        return model.config
    both = model.config, speculation.model.config
    return min(both, key=lambda config: config.max_context)  # of equals the first


def check_draft_capacity(draft: Draft, capacity: int) -> None:
    """Refuses a batch whose sequences may go beyond what a draft model was made for.

    Args:
        draft: the draft model.
        capacity: tokens that a sequence may have.

    Raises:
        ValueError: they may.
    """
    config = draft.model.config
    if capacity > config.max_context:
        raise ValueError(
            f"A draft model goes as far as the sequences of a batch: {config.name} was made for "
            f"{config.max_context} tokens, and the capacity is {capacity}. Ask for a capacity of "
            f"up to {config.max_context}, or take another draft model."
        )
