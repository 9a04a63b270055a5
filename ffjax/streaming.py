"""Generation as a stream: tokens as they come."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax

from ffjax.broken import NotFiniteError
from ffjax.decode import Implementation
from ffjax.generation import GenerateOutput, Replies, blocks_for
from ffjax.loop import Loop
from ffjax.model import Transformer
from ffjax.prefill.choice import Prefill
from ffjax.requests import Request

__all__ = ["Stream", "stream"]


class Stream(Iterator[list[int | None]]):
    """Iterates over a generation, position by position.

    Each item holds one entry a sequence: its next token, or None once it has ended.
    All state of the generation belongs to the stream: breaking off, by leaving the
    loop, by `close` or by Ctrl-C, frees it and leaves the model as it was.

    Where the logits of a sequence that has not ended are NaN or infinite, the next item raises
    `NotFiniteError`, a FloatingPointError; what came before stays in `output`.
    """

    def __init__(self, loop: Loop, request: Request):
        """Made by `stream`."""
        self._replies = Replies(request)
        self._implementation: Implementation = loop.implementation
        self._prefill: Prefill = loop.prefill_implementation
        self._compile_seconds = loop.compile_seconds
        self._steps = 0
        self._prefill_seconds = 0.0
        self._decode_seconds = 0.0
        self._rows: Generator[list[int | None], None, None] = self._run(loop, blocks_for(request))

    def __iter__(self) -> Stream:
        """The stream is its own iterator: it can be run through once."""
        return self

    def __next__(self) -> list[int | None]:
        """The next token of each sequence."""
        try:
            return next(self._rows)
        except NotFiniteError as error:
            error.output = self.output
            raise

    def close(self) -> None:
        """Ends the stream and frees the cache; what has come stays in `output`."""
        self._rows.close()

    @property
    def implementation(self) -> Implementation:
        """Which implementation runs the decode steps."""
        return self._implementation

    @property
    def output(self) -> GenerateOutput:
        """What has come so far; a sequence still running has the finish reason None.

        The decode time is that of the last token given to the stream's reader, and contains what
        the reader did meanwhile, while the device went on.
        """
        return GenerateOutput(
            tokens=[list(row) for row in self._replies.tokens],
            finish_reasons=list(self._replies.finish_reasons),
            implementation=self._implementation,
            prefill=self._prefill,
            steps=self._steps,
            compile_seconds=self._compile_seconds,
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._decode_seconds,
        )

    def _run(self, loop: Loop, blocks: int) -> Generator[list[int | None], None, None]:
        replies = self._replies
        start = time.perf_counter()
        first = loop.prefill()
        # The device has its first steps before the prefill's token is read, and its next ones
        # before the reader is given the last.
        rows = loop.rows(blocks)
        first = jax.device_get(first).tolist()
        prefilled = time.perf_counter()
        self._prefill_seconds = prefilled - start
        yield replies.add(first, loop.fault)
        while not replies.finished and (row := next(rows, None)) is not None:
            self._steps = loop.steps
            taken = replies.add(row, loop.fault)
            self._decode_seconds = time.perf_counter() - prefilled
            yield taken


def stream(
    model: Transformer,
    prompts: Any,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int | Sequence[int] = 0,
    stop_token: int | Sequence[int] | None = None,
    capacity: int | None = None,
    implementation: Implementation | None = None,
    prefill: Prefill | None = None,
) -> Stream:
    """Continues each prompt, token by token: `generate` as an iterator.

    The device runs blocks of a few steps and is given the next block before the last
    one is read. The tokens are those `generate` returns.

    Args:
        model: the model.
        prompts: as in `ffjax.generate`.
        max_new_tokens: as in `ffjax.generate`.
        temperature: as in `ffjax.generate`.
        seed: as in `ffjax.generate`.
        stop_token: as in `ffjax.generate`.
        capacity: as in `ffjax.generate`.
        implementation: as in `ffjax.generate`.
        prefill: as in `ffjax.generate`.

    Returns:
        An iterator over lists of B entries: a sequence's next token, or None once it has
        ended. Its `output` is what `generate` would return, of what has come so far.

    Raises:
        ValueError: as `ffjax.generate`, before the first token.
        TypeError: likewise.
        NotImplementedError: likewise.
        NotFiniteError: the iterator does, as its class says.
    """
    request = Request.checked(
        model.config, prompts, max_new_tokens, temperature, seed, stop_token, capacity
    )
    return Stream(Loop(model, request, implementation, prefill), request)
