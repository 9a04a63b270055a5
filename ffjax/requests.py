"""What a generation is asked for, checked before anything is allocated or compiled."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ffjax.config import ModelConfig
from ffjax.sampling.draw import sequence_words
from ffjax.sampling.params import MAX_STOP_TOKENS, SamplingParams
from ffjax.sampling.rows import Processor
from ffjax.seeds import checked_seed
from ffjax.tokenizer import check_known

__all__ = ["Request", "check_params", "checked_prompt"]


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


def checked_prompt(prompt: Any, config: ModelConfig) -> np.ndarray:
    """One prompt as int32 `[n]`, n at least 1, every id inside the vocabulary.

    Raises:
        ValueError: it is empty, or an id is outside.
        TypeError: it is no flat list of integers.
    """
    return _prompt("the prompt", prompt, config)


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
        return (checked_prompt(rows[0], config),)
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


def check_params(
    params: SamplingParams, config: ModelConfig, which: str = "", *, texts: bool = False
) -> None:
    """Checks parameters against a model.

    Args:
        params: the parameters.
        config: the model's.
        which: of which sequence they are, as an error is to say it: "sampling[2]."; "": there is
            one for all.
        texts: whether texts that end a sequence are somebody's to look for.

    Raises:
        ValueError: a token id is outside the vocabulary, or no token is left; or they name texts
            that end a sequence, which need a tokenizer.
    """
    for name in ("bad_token_ids", "stop_token_ids"):
        for token in getattr(params, name):
            _token_id(f"{which}{name}", token, config)
    for token in dict(params.logit_bias):
        _token_id(f"A token id of {which}logit_bias", token, config)
    if len(params.bad_token_ids) >= config.vocab_size:
        raise ValueError(f"{which}bad_token_ids forbids every token: one at least must be left.")
    if params.stop and not texts:
        raise ValueError(
            f"{which}stop holds texts, and this function speaks of tokens alone. Use "
            "ffjax.Generator, which has the tokenizer, or stop_token_ids."
        )


def _at(temperature: Any) -> SamplingParams:
    if isinstance(temperature, float):
        return _checked_at(temperature)
    return SamplingParams(temperature=temperature)


@functools.lru_cache
def _checked_at(temperature: float) -> SamplingParams:
    """Checked once: nobody changes what is frozen."""
    return SamplingParams(temperature=temperature)


def _params(
    sampling: Any, temperature: Any, batch: int, config: ModelConfig
) -> tuple[SamplingParams, ...]:
    """The parameters of each sequence."""
    if sampling is None:
        return (_at(temperature),) * batch
    if temperature != 0:
        raise ValueError(
            "A temperature is given beside sampling, which has one of its own. Give "
            f"SamplingParams(temperature={temperature}, ...)."
        )
    if isinstance(sampling, SamplingParams):
        check_params(sampling, config)
        return (sampling,) * batch
    kinds = "sampling is a SamplingParams, or a sequence of them, one for each prompt"
    if isinstance(sampling, str | bytes) or not isinstance(sampling, Sequence):
        raise TypeError(f"{kinds}; got {sampling!r}.")
    if len(sampling) != batch:
        raise ValueError(f"{kinds}; there are {len(sampling)} for {batch} prompts.")
    for i, one in enumerate(sampling):
        if not isinstance(one, SamplingParams):
            raise TypeError(f"{kinds}; got {one!r} at index {i}.")
        check_params(one, config, f"sampling[{i}].")
    return tuple(sampling)


def _processors(value: Any) -> tuple[Processor, ...]:
    processors: tuple[Any, ...] = (value,) if callable(value) else tuple(value)
    for one in processors:
        if not callable(one):
            raise TypeError(
                "A logits processor is a function of the logits [B, V] and of what came before; "
                f"got {one!r}."
            )
    return processors


def _needs(prompt: int, new: int) -> str:
    """How a sentence begins on what a sequence needs."""
    tokens = "1 token" if prompt == 1 else f"{prompt} tokens"
    return f"A prompt of {tokens} and {new} new ones need {prompt + new} positions; "


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A generation, as asked for.

    Attributes:
        prompts: one int32 `[n]` a sequence, n at least 1.
        max_new_tokens: at least 1; of the sequence that may have most.
        limits: of each sequence.
        params: how its tokens are chosen, of each sequence.
        seed: one for all sequences, or one for each; of those whose parameters have none.
        stop_tokens: the ids that end each sequence, each once; there may be none.
        capacity: positions the cache must have room for.
        processors: a caller's own logits processors.
    """

    prompts: tuple[np.ndarray, ...]
    max_new_tokens: int
    limits: tuple[int, ...]
    params: tuple[SamplingParams, ...]
    seed: int | tuple[int, ...]
    stop_tokens: tuple[tuple[int, ...], ...]
    capacity: int
    processors: tuple[Processor, ...]

    @property
    def seeds(self) -> np.ndarray:
        """What each sequence draws by, uint32 `[B, 3]`: see `ffjax.sampling.draw.words_of`."""
        words = []
        for b, one in enumerate(self.params):
            if one.seed is not None:
                words.append(sequence_words(one.seed))
            elif isinstance(self.seed, int):
                words.append(sequence_words(self.seed, b))
            else:
                words.append(sequence_words(self.seed[b]))
        return np.stack(words)

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
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        logits_processors: Processor | Sequence[Processor] = (),
    ) -> Request:
        """A request that a model of this configuration can serve.

        The arguments are those of `ffjax.generate`.

        Raises:
            ValueError: a value is out of range; the message says which, and the range.
            TypeError: an argument is of the wrong kind.
        """
        rows = _prompts(prompts, config)
        new = _integer("max_new_tokens", max_new_tokens, 1)
        params = _params(sampling, temperature, len(rows), config)
        limits = tuple(new if p.max_tokens is None else min(new, p.max_tokens) for p in params)
        new = max(limits)
        ends = _stop_tokens(stop_token, config)
        stop_tokens = tuple(one.ends(ends) for one in params)
        # A sequence that has ended steps on with the others, for nobody: it has room, but no need.
        positions, prompt, own = max(
            (len(row) + limit, len(row), limit) for row, limit in zip(rows, limits, strict=True)
        )
        if positions > config.max_context:
            raise ValueError(
                f"{_needs(prompt, own)}{config.name} was made for {config.max_context}. "
                "Shorten the prompt or ask for fewer tokens."
            )
        longest = max(len(row) for row in rows)
        need, needs = longest + new, _needs(longest, new)
        if capacity is None:
            capacity = need
        elif need > _integer("capacity", capacity, 1):
            raise ValueError(f"{needs}the capacity given is {capacity}. Raise it or ask for less.")
        return cls(
            prompts=rows,
            max_new_tokens=new,
            limits=limits,
            params=params,
            seed=_seed(seed, len(rows)),
            stop_tokens=stop_tokens,
            capacity=int(capacity),
            processors=_processors(logits_processors),
        )
