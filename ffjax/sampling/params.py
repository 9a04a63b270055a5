"""What may be asked of the choice of tokens: one frozen set of parameters a request."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ffjax.sampling.generation_config import fields_of
from ffjax.seeds import checked_seed

__all__ = ["MAX_LOGPROBS", "MAX_STOP_TOKENS", "SamplingParams"]

MAX_STOP_TOKENS = 64
"""Most token ids that end a sequence. No model is known that has more than a few."""
MAX_LOGPROBS = 20
"""Most alternatives whose log-probabilities are told at each token."""

_MOST = float(np.finfo(np.float32).max)
# Logits that are multiplied by so much stay finite, and next to nothing beside others.
_MOST_PENALTY = 1e6
_MOST_COUNT = 2**31 - 1  # tokens are counted in int32
# Beside the range: the numbers that a field takes, as its error calls them.
_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0, _MOST, "0 (greedy) or a positive number that float32 can hold"),
    "min_p": (0, 1, "from 0 (off) to 1"),
    "presence_penalty": (-_MOST_PENALTY, _MOST_PENALTY, "from -1e6 to 1e6; 0 is off"),
    "frequency_penalty": (-_MOST_PENALTY, _MOST_PENALTY, "from -1e6 to 1e6; 0 is off"),
    "repetition_penalty": (1e-6, _MOST_PENALTY, "from 1e-6 to 1e6; 1 is off"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen, and what ends it.

    Names and meanings are those of vLLM's class of this name and of Hugging Face's
    `GenerationConfig`. The stages come in this order: `logit_bias`, forbidden tokens, penalties, a
    caller's own logits processors; then, where the temperature is not 0, `temperature`, `top_k`,
    `top_p` among what `top_k` left, `min_p`; then one draw.

    Attributes:
        max_tokens: most new tokens. None: as many as the caller allows.
        min_tokens: so many new tokens come before one that ends the sequence may.
        temperature: 0 takes the likeliest token; above, tokens are drawn from
            `softmax(logits / temperature)`.
        top_k: only the so many likeliest tokens, and those equal to the last of them, are drawn.
            0, or -1: all.
        top_p: only the likeliest tokens are drawn whose probabilities sum up to this: those that
            more likely ones have not reached it yet, and those equal to the last of them.
            Above 0, to 1 (all).
        min_p: only tokens are drawn that are at least so many times as likely as the likeliest.
            0: all.
        repetition_penalty: logits of tokens that the prompt or the answer holds are divided by it
            where they are positive, else multiplied (Keskar et al., arXiv 1909.05858). 1e-6 to
            1e6; 1: off.
        presence_penalty: subtracted from the logits of tokens that the answer holds; -1e6 to 1e6.
            0: off.
        frequency_penalty: the same, times how often it holds them.
        logit_bias: numbers added to logits, by token id.
        bad_token_ids: tokens that never come.
        stop_token_ids: tokens that end the sequence, beside those that end a text of the model.
        stop: texts that end the sequence. They need a tokenizer: `ffjax.Generator` takes them.
        include_stop_str_in_output: whether the text that ended the sequence is returned too.
        ignore_eos: whether tokens that end a text of the model are ordinary ones.
        seed: of the draws, 0 to 2^64 - 1. The noise of a draw hangs on it and on how many tokens
            the answer has, not on the batch. None: what the caller gives.
        logprobs: tell the log-probability of each chosen token, and of so many likeliest ones, 0
            to 20. They are `log_softmax` of the model's own logits, before any stage. None: none.

    Raises:
        ValueError: a value is out of its range; the message says which, and the range.
        TypeError: a value is of the wrong kind.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    bad_token_ids: Sequence[int] = ()
    stop_token_ids: Sequence[int] = ()
    stop: str | Sequence[str] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self):
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name, (least, most, range_) in _RANGES.items():
            put(name, _number(name, getattr(self, name), least, most, range_))
        put("top_p", _number("top_p", self.top_p, 0, 1, "above 0, to 1 (off)"))
        if self.top_p == 0:
            raise ValueError("top_p must be above 0, to 1 (off), got 0. For greedy, temperature=0.")
        if self.max_tokens is not None:
            put("max_tokens", _whole("max_tokens", self.max_tokens, 1))
        put("min_tokens", _whole("min_tokens", self.min_tokens, 0, _MOST_COUNT))
        # More than there are tokens keeps them all.
        put("top_k", min(max(_whole("top_k", self.top_k, -1), 0), _MOST_COUNT))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is at most max_tokens, {self.max_tokens}; got {self.min_tokens}."
            )
        put("logit_bias", _biases(self.logit_bias))
        put("bad_token_ids", _ids("bad_token_ids", self.bad_token_ids))
        put("stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise ValueError(
                f"A sequence ends at one of up to {MAX_STOP_TOKENS} tokens; stop_token_ids has "
                f"{len(self.stop_token_ids)} different ones."
            )
        put("stop", _texts(self.stop))
        for name in ("include_stop_str_in_output", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is True or False, got {getattr(self, name)!r}.")
        if self.seed is not None:
            put("seed", checked_seed(self.seed))
        if self.logprobs is not None:
            put("logprobs", _whole("logprobs", self.logprobs, 0))
            if self.logprobs > MAX_LOGPROBS:
                raise ValueError(
                    f"logprobs is None, or 0 to {MAX_LOGPROBS} alternatives; got {self.logprobs}."
                )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, after all edits of logits."""
        return self.temperature == 0

    @property
    def filters(self) -> bool:
        """Whether some tokens are too unlikely to be drawn."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalizes(self) -> bool:
        """Whether it matters which tokens came before."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    def ends(self, eos: Iterable[int]) -> tuple[int, ...]:
        """The tokens that end a sequence, each once.

        Args:
            eos: those that end a text of the model.
        """
        own = () if self.ignore_eos else eos
        return tuple(dict.fromkeys((*own, *self.stop_token_ids)))

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> SamplingParams:
        """What a Hugging Face folder's `generation_config.json` sets.

        As transformers reads it: without `do_sample`, tokens are not drawn, whatever temperature
        it names. Fields that name nothing of this class are left out; the tokens that end a text
        are the tokenizer's (`eot_ids`).

        Args:
            config: the file's content.

        Raises:
            ValueError: a value is out of its range.
            TypeError: a value is of the wrong kind.
        """
        return cls(**fields_of(config))


def _number(name: str, value: Any, least: float, most: float, range_: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is a number, got {value!r}.")
    number = float(value)
    if math.isnan(number) or not least <= number <= most:
        raise ValueError(f"{name} must be {range_}, got {value}.")
    return number


def _whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is an integer, got {value!r}.")
    number = int(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}.")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}; what came is larger.")
    return number


def _ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids, each once."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(
            f"{name} is a sequence of token ids, got {value!r}. Encode a text with the model's "
            "tokenizer first."
        )
    return tuple(dict.fromkeys(_whole(f"{name}[{i}]", one, 0) for i, one in enumerate(value)))


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    if isinstance(pairs, str | bytes) or not isinstance(pairs, Iterable):
        raise TypeError(f"logit_bias maps token ids to numbers, got {value!r}.")
    biases: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str | bytes) or len(pair) != 2:
            raise TypeError(f"logit_bias maps token ids to numbers, got {pair!r} in it.")
        token = _whole("A token id of logit_bias", pair[0], 0)
        name = f"logit_bias[{token}]"
        biases[token] = _number(name, pair[1], -_MOST, _MOST, "a number that float32 can hold")
    return tuple(sorted(biases.items()))


def _texts(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise TypeError(f"stop is a text or a sequence of texts, got {value!r}.")
    texts = tuple(texts)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"stop is a text or a sequence of texts, got {text!r} in it.")
        if not text:
            raise ValueError("A text that ends a sequence has at least one character; got ''.")
    return tuple(dict.fromkeys(texts))
