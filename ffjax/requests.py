"""What a generation is asked for, checked before anything is allocated or compiled."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ffjax.config import ModelConfig
from ffjax.seeds import checked_seed
from ffjax.tokenizer import check_known

__all__ = ["MAX_STOP_TOKENS", "Request"]

# What ends a sequence is compared with every new token in an array of this length, whatever
# its number is: so that it never compiles anew. No model is known that has more than a few.
MAX_STOP_TOKENS = 64
_MOST_TEMPERATURE = float(np.finfo(np.float32).max)


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    return int(value)


def _token_id(name: str, value: Any, config: ModelConfig) -> int:
    token = _integer(name, value, 0)
    if token >= config.vocab_size:
        raise ValueError(
            f"{name} must be in the vocabulary of {config.name}, 0 to {config.vocab_size - 1}; "
            f"got {token}."
        )
    return token


def _prompt(which: str, prompt: Any, config: ModelConfig) -> np.ndarray:
    """One prompt as int32 `[n]`, n at least 1, every id inside the vocabulary."""
    if isinstance(prompt, str | bytes):
        raise TypeError(
            f"A prompt is a list of token ids; {which} is {type(prompt).__name__}. "
            "Encode it with the model's tokenizer first."
        )
    try:
        ids = np.asarray(prompt)
    except ValueError:  # numpy's own message speaks of inhomogeneous shapes
        raise TypeError(
            f"A prompt is a list of token ids; {which} nests lists of different lengths."
        ) from None
    if ids.size == 0:
        raise ValueError(
            f"A prompt needs at least one token; {which} is empty. Start it with a "
            "begin- or end-of-text token if there is nothing to say."
        )
    if ids.ndim == 2 and np.issubdtype(ids.dtype, np.floating):
        raise TypeError(
            f"A prompt is a flat list of integer token ids; {which} has shape {ids.shape} and "
            f"dtype {ids.dtype}, as embeddings have. Feed those by "
            "model.last_hidden_state(embeddings, cache), and go on by ffjax.decode_step."
        )
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(
            f"A prompt is a flat list of integer token ids; {which} has shape {ids.shape} "
            f"and dtype {ids.dtype}."
        )
    check_known(which, ids, config)
    return ids.astype(np.int32)


def _prompts(prompts: Any, config: ModelConfig) -> tuple[np.ndarray, ...]:
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        rows = [prompts]
    else:
        rows = list(prompts)
        # A flat list or array is one prompt.
        if rows and (isinstance(rows[0], numbers.Number) or getattr(rows[0], "ndim", 1) == 0):
            rows = [prompts]
    if not rows:
        raise ValueError("Generation needs at least one prompt; the list of prompts is empty.")
    if len(rows) == 1:
        return (_prompt("the prompt", rows[0], config),)
    return tuple(_prompt(f"prompt {i}", row, config) for i, row in enumerate(rows))


def _stop_tokens(value: Any, config: ModelConfig) -> tuple[int, ...]:
    """What ends a sequence, each id once."""
    if value is None:
        return ()
    if isinstance(value, numbers.Integral):
        return (_token_id("stop_token", value, config),)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise TypeError(
            f"stop_token is a token id, a sequence of them, or None; got {value!r}. "
            "Encode a text with the model's tokenizer first."
        )
    ids = [_token_id(f"stop_token[{i}]", one, config) for i, one in enumerate(value)]
    ids = tuple(dict.fromkeys(ids))
    if len(ids) > MAX_STOP_TOKENS:
        raise ValueError(
            f"A sequence ends at one of up to {MAX_STOP_TOKENS} tokens; stop_token has "
            f"{len(ids)} different ones. Give fewer, or break off a stream at the others."
        )
    return ids


def _seed(seed: Any, batch: int) -> int | tuple[int, ...]:
    if isinstance(seed, Sequence) or getattr(seed, "ndim", 0) == 1:
        if isinstance(seed, str | bytes):
            return checked_seed(seed)
        if len(seed) != batch:
            raise ValueError(
                f"Seeds come as one for all prompts or one for each; there are {len(seed)} "
                f"for {batch} prompts."
            )
        return tuple(checked_seed(one) for one in seed)
    return checked_seed(seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A generation, as asked for.

    Attributes:
        prompts: one int32 `[n]` a sequence, n at least 1.
        max_new_tokens: at least 1.
        temperature: 0 for greedy.
        seed: one for all sequences, or one for each.
        stop_tokens: the ids that end a sequence, each once; there may be none.
        capacity: positions the cache must have room for.
    """

    prompts: tuple[np.ndarray, ...]
    max_new_tokens: int
    temperature: float
    seed: int | tuple[int, ...]
    stop_tokens: tuple[int, ...]
    capacity: int

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return len(self.prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt) for prompt in self.prompts)

    @classmethod
    def checked(
        cls,
        config: ModelConfig,
        prompts: Any,
        max_new_tokens: int,
        temperature: float,
        seed: int | Sequence[int],
        stop_token: int | Sequence[int] | None,
        capacity: int | None,
    ) -> Request:
        """A request that a model of this configuration can serve.

        The arguments are those of `ffjax.generate`.

        Raises:
            ValueError: a value is out of range; the message says which, and the range.
            TypeError: an argument is of the wrong kind.
        """
        rows = _prompts(prompts, config)
        new = _integer("max_new_tokens", max_new_tokens, 1)
        if isinstance(temperature, bool) or not isinstance(temperature, numbers.Real):
            raise TypeError(f"temperature is a number, got {temperature!r}.")
        if not 0 <= temperature <= _MOST_TEMPERATURE:
            raise ValueError(
                f"temperature must be 0 (greedy) or a positive number that float32 can hold, "
                f"got {temperature}."
            )
        stop_tokens = _stop_tokens(stop_token, config)
        longest = max(len(row) for row in rows)
        need = longest + new
        tokens = "1 token" if longest == 1 else f"{longest} tokens"
        needs = f"A prompt of {tokens} and {new} new ones need {need} positions; "
        if need > config.max_context:
            raise ValueError(
                f"{needs}{config.name} was made for {config.max_context}. "
                "Shorten the prompt or ask for fewer tokens."
            )
        if capacity is None:
            capacity = need
        elif need > _integer("capacity", capacity, 1):
            raise ValueError(f"{needs}the capacity given is {capacity}. Raise it or ask for less.")
        return cls(
            prompts=rows,
            max_new_tokens=new,
            temperature=float(temperature),
            seed=_seed(seed, len(rows)),
            stop_tokens=stop_tokens,
            capacity=int(capacity),
        )
