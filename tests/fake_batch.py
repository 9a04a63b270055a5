"""A batch for tests of the server: no model, no device, but the rules that `LiveBatch` has.

It holds the scheduler to them: one thread calls it, free rows are entered and no others, and what
is said to be in a row's cache is in it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from ffjax.loop import BLOCK, NOT_FINITE
from ffjax.sampling.logprobs import TokenLogprobs
from ffjax.sampling.params import SamplingParams

__all__ = ["EOS", "NAN", "FakeBatch", "expected"]

EOS = 256
# A prompt that holds this byte gets logits that are not finite after its second token.
NAN = 254
# What the scheduler has a new batch run before there are requests.
WARM = [0]


class Chosen(NamedTuple):
    token: int
    logprobs: TokenLogprobs | None
    drafted: bool = False


def _next(context: Sequence[int], params: SamplingParams, count: int) -> int:
    """The token after a context: letters, some spaces, now and then the end."""
    if NAN in context and count == 2:
        return NOT_FINITE
    seed = 0 if params.temperature == 0 else (params.seed or 0) + 1
    mixed = seed * 7919
    for token in context[-5:]:
        mixed = (mixed * 31 + token * 17 + 3) % 1_000_003
    mixed = (mixed + len(context) * 101) % 997
    if mixed == 0 and count >= params.min_tokens and not params.ignore_eos:
        return EOS
    return 32 if mixed % 7 == 1 else 97 + mixed % 26


def expected(prompt: Sequence[int], params: SamplingParams) -> list[int]:
    """What a sequence gets alone, without its end of text."""
    context, most = list(prompt), params.max_tokens
    assert most is not None
    for count in range(most):
        token = _next(context, params, count)
        if token in (EOS, NOT_FINITE, *params.stop_token_ids):
            break
        context.append(token)
    return context[len(prompt) :]


class _Row:
    def __init__(self, tokens: list[int], params: SamplingParams, keep: int):
        self.tokens, self.params, self.fed, self.count = tokens, params, keep, 0
        self.context = list(tokens)


class _Fed:
    def __init__(self, batch: FakeBatch, row: int, fed: int, done: bool):
        self._batch = batch
        self.row, self.fed, self.done = row, fed, done
        self._chosen = batch._step(row) if done else None

    def read(self) -> Chosen:
        assert self._chosen is not None, "only a prompt's last chunk has a token"
        self._batch._waits(1)
        return self._chosen


class _Block:
    def __init__(self, batch: FakeBatch, rows: tuple[int, ...]):
        self._batch, self.rows = batch, rows
        self._steps = [{row: batch._step(row) for row in rows} for _ in range(batch.block)]

    def read(self) -> list[dict[int, Chosen]]:
        self._batch._waits(self._batch.block)
        return self._steps


class FakeBatch:
    """Eight rows of letters.

    Attributes:
        fail: an error that the next read of a request's raises; None: none does.
        fed: tokens of prompts that were fed.
        block: steps of a block.
        blocks: blocks of steps that were ordered.
        fewest: fewest steps between two turns of feeding while rows were running.
        longest: most tokens of prompts fed between two blocks while rows were running.
        entered: rows that were entered, and how many tokens were kept.
    """

    implementation = "fake"
    compile_seconds = 0.0

    def __init__(
        self,
        rows: int = 8,
        capacity: int = 512,
        chunk: int = 64,
        step_seconds: float = 0.0,
        block: int = BLOCK,
    ):
        self.block = block
        self.rows, self.capacity, self._chunk, self._step_seconds = (
            rows,
            capacity,
            chunk,
            step_seconds,
        )
        self._rows: list[_Row | None] = [None] * rows
        self._caches: list[list[int]] = [[] for _ in range(rows)]
        self._owner: int | None = None
        self.fail: BaseException | None = None
        self.fed = self.blocks = self.longest = self._since = self._steps = 0
        self.fewest = math.inf
        self.entered: list[tuple[int, int]] = []

    def fault(self) -> str | None:
        return None

    def check(self, tokens: Sequence[int], params: SamplingParams) -> None:
        if len(tokens) + 1 > self.capacity:
            raise ValueError("too long")

    def place(
        self,
        row: int,
        tokens: Sequence[int],
        params: SamplingParams,
        *,
        eos: Sequence[int] = (),
        keep: int = 0,
    ) -> None:
        self._check()
        assert self._rows[row] is None, f"row {row} is taken"
        assert params.seed is not None and params.max_tokens is not None and not params.stop
        tokens = list(tokens)
        self.check(tokens, params)
        assert 0 <= keep < len(tokens)
        assert self._caches[row][:keep] == tokens[:keep], "the cache holds something else"
        self._rows[row] = _Row(tokens, params, keep)
        self._caches[row] = tokens[:keep]
        if tokens != WARM:
            self.entered.append((row, keep))

    def feed(self) -> _Fed | None:
        self._check()
        for i, row in enumerate(self._rows):
            if row is not None and row.fed < len(row.tokens):
                count = min(self._chunk, len(row.tokens) - row.fed)
                if any(one is not None and one.count for one in self._rows):
                    self._since += count
                    self.longest = max(self.longest, self._since)
                    self.fewest = min(self.fewest, self._steps or math.inf)
                self._steps = 0
                row.fed += count
                self.fed += count if row.tokens != WARM else 0
                self._caches[i] = row.tokens[: row.fed]
                return _Fed(self, i, count, row.fed == len(row.tokens))
        return None

    def decode(self) -> _Block | None:
        self._check()
        rows = tuple(i for i, row in enumerate(self._rows) if row is not None and row.count)
        if not rows:
            return None
        self._since = 0
        self._steps += self.block
        self.blocks += 1
        return _Block(self, rows)

    def release(self, row: int) -> None:
        self._check()
        self._rows[row] = None

    def _step(self, i: int) -> Chosen:
        row = self._rows[i]
        assert row is not None
        token = _next(row.context, row.params, row.count)
        if row.count:  # the token before this one has been fed
            self._caches[i].append(row.context[-1])
        row.context.append(token)
        row.count += 1
        best = row.params.logprobs
        told = None
        if best is not None:
            told = TokenLogprobs(-0.5, tuple((97 + k, -0.5 - k) for k in range(best)))
        return Chosen(token, told)

    def _waits(self, steps: int) -> None:
        self._check()
        time.sleep(steps * self._step_seconds)
        if self.fail is not None and self.entered:
            error, self.fail = self.fail, None
            raise error

    def _check(self) -> None:
        self._owner = self._owner or threading.get_ident()
        assert self._owner == threading.get_ident(), "one thread owns a batch"
