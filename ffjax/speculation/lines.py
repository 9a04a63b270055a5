"""The tokens of steps that speculate, position by position, as steps of one token give them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from ffjax.loop import NO_TOKEN, Made, Reader, Step
from ffjax.sampling.logprobs import LogProbs

__all__ = ["Lines"]


class _Token(NamedTuple):
    """One token of one sequence; its log-probabilities are without the axis `[B]`."""

    token: int
    drafted: bool
    logprobs: LogProbs | None


class Lines:
    """What each sequence has got and the reader has not: a sequence may be ahead of another."""

    def __init__(self, batch: int, reader: Reader):
        """Starts without a token.

        Args:
            batch: B.
            reader: who takes the tokens.
        """
        self._reader = reader
        self._waiting: list[deque[_Token]] = [deque() for _ in range(batch)]

    def would_finish(self, made: Made) -> bool:
        """Whether all sequences have ended once the reader has what waits, and this block."""
        columns = []
        for b, waiting in enumerate(self._waiting):
            new = made.tokens[:, b].reshape(-1)
            columns.append([one.token for one in waiting] + new[new != NO_TOKEN].tolist())
        return self._reader.would_finish(columns)

    def taken(self, blocks: Iterable[Made]) -> Iterator[Step]:
        """The tokens of blocks, on the host, one of each sequence at a time.

        A position is given as soon as each sequence that has not ended has a token for it.
        """
        for made in blocks:
            for number in range(len(made.tokens)):
                self._add(made, number)
                while (step := self._next()) is not None:
                    yield step

    def _add(self, made: Made, number: int) -> None:
        """Takes a block's step of this number."""
        for b, waiting in enumerate(self._waiting):
            if self._reader.has_ended(b):
                continue
            for t, token in enumerate(made.tokens[number, b].tolist()):
                if token == NO_TOKEN:
                    break
                told = made.logprobs
                mine = None if told is None else LogProbs(*(a[number, b, t] for a in told))
                waiting.append(_Token(token, t > 0, mine))

    def _next(self) -> Step | None:
        """The next token of each sequence; None where there is nothing to give yet."""
        running = [b for b in range(len(self._waiting)) if not self._reader.has_ended(b)]
        if not running or not all(self._waiting[b] for b in running):
            return None
        given: list[_Token | None] = [None] * len(self._waiting)
        for b in running:
            given[b] = self._waiting[b].popleft()
        logprobs, one = None, given[running[0]]
        if one is not None and one.logprobs is not None:
            # What stands in the row of one that has ended is for nobody.
            rows = [(mine or one).logprobs for mine in given]
            logprobs = jax.tree.map(lambda *each: np.stack(each), *rows)
        tokens = [NO_TOKEN if mine is None else mine.token for mine in given]
        return Step(tokens, logprobs, [mine is not None and mine.drafted for mine in given])
