"""Prompts that run side by side, as text."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ffjax.broken import NotFiniteError
from ffjax.decode import Implementation
from ffjax.loop import BLOCK
from ffjax.model import Transformer
from ffjax.prefill.choice import Prefill
from ffjax.speculation.choice import MAX_SEQUENCES, Speculation, checked_speculation
from ffjax.streaming import stream
from ffjax.text.asked import Asked
from ffjax.text.completion import Completion
from ffjax.text.writer import Writer
from ffjax.tokenizer import Tokenizer
from pallas_kernels.dims import ceil_div
from pallas_kernels.support import MAX_BATCH

__all__ = ["TextBatch", "texts"]

_LEAST_SLOTS = 256


class TextBatch(Iterator[list[str | None]]):
    """Iterates over the texts of a batch, token by token.

    Each item has an entry a text: the characters that its next token has made certain, which may
    be none; or None once the text has ended.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        asked: Sequence[Asked],
        *,
        capacity: int | None = None,
        implementation: Implementation | None = None,
        prefill: Prefill | None = None,
        speculation: Speculation | None = None,
    ):
        """Compiles what is not compiled yet.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            asked: what is to be written.
            capacity: positions of the cache; see `ffjax.generate`.
            implementation: of the decode steps; see `ffjax.generate`.
            prefill: of the prefill; see `ffjax.generate`.
            speculation: see `ffjax.generate`.

        Raises:
            ValueError: as `ffjax.generate`.
            NotImplementedError: likewise.
        """
        self._asked = tuple(asked)
        params = [one.params for one in self._asked]
        self._most = [one.max_tokens or 1 for one in params]
        self._steps = stream(
            model,
            [one.prompt for one in self._asked],
            max(self._most),
            # Texts that end a text are looked for here: the device knows tokens alone.
            sampling=[dataclasses.replace(one, stop=()) for one in params],
            stop_token=tokenizer.eot_ids,
            capacity=capacity,
            implementation=implementation,
            prefill=prefill,
            speculation=speculation,
        )
        self._writers = [Writer(tokenizer, one.prompt, one.params) for one in self._asked]
        self._ended = [False] * len(self._asked)
        self._seconds: dict[int, float] = {}  # of the decode steps, of those that have ended

    def __iter__(self) -> TextBatch:
        """The batch is its own iterator: it can be run through once."""
        return self

    def __next__(self) -> list[str | None]:
        """The next characters of each text."""
        if all(self._ended):
            raise StopIteration
        try:
            tokens = next(self._steps, None)
        except BaseException:
            self.close()
            raise
        if tokens is None:
            return [None if ended else self._end(row) for row, ended in enumerate(self._ended)]
        return [self._add(row, token) for row, token in enumerate(tokens)]

    def _add(self, row: int, token: int | None) -> str | None:
        if self._ended[row]:
            return None
        if token is None:
            return self._end(row)
        writer = self._writers[row]
        piece = writer.push(token)
        if writer.stopped is not None:
            self._steps.stop(row, writer.stopped)
        if writer.stopped is not None or writer.count == self._most[row]:
            piece += self._end(row)
        return piece

    def _end(self, row: int) -> str:
        self._ended[row] = True
        self._seconds[row] = self._steps.output.decode_seconds
        return self._writers[row].finish()

    def close(self) -> None:
        """Ends all texts where they are, and frees the cache."""
        self._steps.close()
        for row, ended in enumerate(self._ended):
            if not ended:
                self._end(row)

    @property
    def ended(self) -> int:
        """How many texts have ended."""
        return sum(self._ended)

    def completions(self) -> list[Completion]:
        """What has come so far, of each text."""
        return [self._completion(row) for row in range(len(self._asked))]

    def _completion(self, row: int) -> Completion:
        out, writer = self._steps.output, self._writers[row]
        prompt, params = self._asked[row]
        # A stop string may come with the last token that was asked for.
        ended: tuple[Any, Any] = (out.finish_reasons[row], out.stop_reasons[row])
        finish_reason, stop_reason = ended if writer.stopped is None else ("stop", writer.stopped)
        return Completion(
            text=writer.text,
            tokens=out.tokens[row],
            prompt_tokens=len(prompt),
            cached_tokens=0,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            logprobs=None if params.logprobs is None else out.logprobs[row],
            seed=params.seed or 0,
            implementation=out.implementation,
            prefill=out.prefill,
            compile_seconds=out.compile_seconds,
            prefill_seconds=out.prefill_seconds,
            # Of this text, and not of the longest beside it.
            decode_seconds=self._seconds.get(row, out.decode_seconds),
            accepted=None if out.accepted is None else out.accepted[row],
        )


def texts(
    model: Transformer,
    tokenizer: Tokenizer,
    asked: Sequence[Asked],
    *,
    implementation: Implementation | None = None,
    prefill: Prefill | None = None,
    speculation: Speculation | None = None,
    ended: Callable[[int], object] = lambda count: None,
    broken: Callable[[list[Completion]], object] = lambda so_far: None,
) -> Iterator[Completion]:
    """Writes any number of texts, as many at a time as a step takes; yields them in order.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        asked: what is to be written.
        implementation: of the decode steps; see `ffjax.generate`.
        prefill: of the prefill; see `ffjax.generate`.
        speculation: see `ffjax.generate`.
        ended: told how many texts more have ended.
        broken: told what has come of the texts of a batch that is broken off, by Ctrl-C or an
            error.

    Raises:
        ValueError: as `ffjax.generate`.
        NotImplementedError: likewise.
        NotFiniteError: the logits of a text were NaN or infinite. Its `completions` are what came
            of this text's batch.
    """
    if not asked:
        return
    # Evenly, so that there are at most two sizes: each is a program of its own.
    most = _side_by_side(speculation)
    batches = ceil_div(len(asked), most)
    ends = [len(asked) * i // batches for i in range(batches + 1)]
    for start, end in itertools.pairwise(ends):
        batch = TextBatch(
            model,
            tokenizer,
            mine := asked[start:end],
            capacity=_capacity(mine),
            implementation=implementation,
            prefill=prefill,
            speculation=speculation,
        )
        before = 0
        try:
            for _ in batch:
                if batch.ended > before:
                    ended(batch.ended - before)
                    before = batch.ended
        except BaseException as error:
            batch.close()
            if isinstance(error, NotFiniteError):
                error.completions = batch.completions()
            broken(batch.completions())
            raise
        batch.close()
        yield from batch.completions()


def _side_by_side(speculation: Speculation | None) -> int:
    """How many texts a step has room for."""
    asked = checked_speculation(speculation)
    if asked is None:
        return MAX_BATCH
    return min(MAX_SEQUENCES, MAX_BATCH // (asked.tokens or 1)) or 1


def _capacity(asked: Sequence[Asked]) -> int:
    """Positions of a cache, such that many batches share a few capacities, and their programs."""
    longest = max(len(one.prompt) for one in asked)
    need = longest + max(one.params.max_tokens or 1 for one in asked)
    slots = _LEAST_SLOTS
    while slots < need + BLOCK:  # there is room for a block beyond the capacity
        slots *= 2
    return slots - BLOCK
