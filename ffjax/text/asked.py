"""What is asked of a model: token ids to go on from, and how; checked and completed."""

from __future__ import annotations

import dataclasses
import difflib
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from ffjax.config import ModelConfig
from ffjax.sampling.params import SamplingParams
from ffjax.seeds import MAX_SEED
from ffjax.tokenizer import Tokenizer

__all__ = ["MAX_TOKENS", "Asked", "completed", "prompt_tokens", "samples", "with_overrides"]

MAX_TOKENS = 1024
"""New tokens of a text, where nobody says how many, as far as the model's context has room."""


class Asked(NamedTuple):
    """One text to write.

    Attributes:
        prompt: token ids, at least one.
        params: how, with `max_tokens` and `seed`.
    """

    prompt: list[int]
    params: SamplingParams


def prompt_tokens(tokenizer: Tokenizer, text: Any) -> list[int]:
    """The token ids of a text to go on from.

    Raises:
        TypeError: it is no text.
        ValueError: it has no token, or is no text in UTF-8.
    """
    if not isinstance(text, str):
        raise TypeError(
            f"A prompt is a text, got {type(text).__name__}. For token ids, ffjax.generate; for "
            "messages, chat."
        )
    tokens = tokenizer.encode(text)
    if not tokens:
        raise ValueError(
            "The prompt is empty, and this model's tokenizer puts nothing before a text. Give at "
            "least one character."
        )
    return tokens


def with_overrides(params: SamplingParams, overrides: dict[str, Any]) -> SamplingParams:
    """Parameters with some of their fields replaced.

    Raises:
        TypeError: there is no such field, or a value is of the wrong kind.
        ValueError: a value is out of range.
    """
    if not isinstance(params, SamplingParams):
        raise TypeError(f"sampling is a SamplingParams, got {params!r}.")
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    for name in overrides:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            meant = f" Is {near[0]} meant?" if near else f" There are {', '.join(names)}."
            raise TypeError(
                f"Options of a text are fields of SamplingParams; {name} is none.{meant}"
            )
    return dataclasses.replace(params, **overrides) if overrides else params


def completed(params: SamplingParams, prompt: Sequence[int], config: ModelConfig) -> SamplingParams:
    """Parameters with a number of tokens and a seed; an own seed where nobody gives one.

    Args:
        params: as they were given.
        prompt: the prompt's token ids.
        config: the model's.
    """
    most = params.max_tokens
    if most is None:
        most = min(max(config.max_context - len(prompt), 1), max(MAX_TOKENS, params.min_tokens))
    seed = secrets.randbits(32) if params.seed is None else params.seed
    return dataclasses.replace(
        params, max_tokens=most, min_tokens=min(params.min_tokens, most), seed=seed
    )


def samples(asked: Asked, count: int) -> list[Asked]:
    """Several texts of one prompt, whose seeds follow each other."""
    prompt, params = asked
    assert params.seed is not None, "completed parameters have a seed"
    seeds = [(params.seed + i) % (MAX_SEED + 1) for i in range(count)]
    return [Asked(prompt, dataclasses.replace(params, seed=seed)) for seed in seeds]
