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
from ffjax.sampling.params import SamplingParams
from ffjax.sampling.rows import Processor
from ffjax.speculation.choice import Speculation, loop_for

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
        self._so_far = _SoFar(loop, request)
        # A generator that held the stream would keep its cache until Python looks for circles.
        self._rows = _run(loop, blocks_for(request, loop.block), self._so_far)

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

    def stop(self, row: int, reason: int | str | None = None) -> None:
        """Ends one sequence, as if it had come to a stop token: it gets no more tokens.

        Args:
            row: which.
            reason: why, for `GenerateOutput.stop_reasons`: a text that has come, for example.
        """
        self._so_far.replies.stop(row, reason)

    def close(self) -> None:
        """Ends the stream and frees the cache; what has come stays in `output`."""
        self._rows.close()

    @property
    def implementation(self) -> Implementation:
        """Which implementation runs the decode steps."""
        return self._so_far.implementation

    @property
    def output(self) -> GenerateOutput:
        """What has come so far; a sequence still running has the finish reason None.

        The decode time is that of the last token given to the stream's reader, and contains what
        the reader did meanwhile, while the device went on.
        """
        return self._so_far.output()


class _SoFar:
    """What has come of a stream, without what it comes from."""

    def __init__(self, loop: Loop, request: Request):
        self.replies = Replies(request)
        self.implementation: Implementation = loop.implementation
        self.prefill: Prefill = loop.prefill_implementation
        self.compile_seconds = loop.compile_seconds
        self.speculates = loop.step_tokens > 1
        self.steps = 0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0

    def output(self) -> GenerateOutput:
        return GenerateOutput(
            tokens=[list(row) for row in self.replies.tokens],
            finish_reasons=list(self.replies.finish_reasons),
            stop_reasons=list(self.replies.stop_reasons),
            logprobs=[list(row) for row in self.replies.logprobs],
            implementation=self.implementation,
            prefill=self.prefill,
            steps=self.steps,
            compile_seconds=self.compile_seconds,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            accepted=list(self.replies.accepted) if self.speculates else None,
        )


def _run(loop: Loop, blocks: int, so_far: _SoFar) -> Generator[list[int | None], None, None]:
    """Runs the generation, row by row."""
    replies = so_far.replies
    start = time.perf_counter()
    first = loop.prefill()
    # The device has its first steps before the prefill's token is read, and its next ones
    # before the reader is given the last.
    rows = loop.rows(blocks, replies)
    first = jax.device_get(first).step()
    prefilled = time.perf_counter()
    so_far.prefill_seconds = prefilled - start
    yield replies.add(first, loop.fault)
    while not replies.finished and (row := next(rows, None)) is not None:
        so_far.steps = loop.steps
        taken = replies.add(row, loop.fault)
        so_far.decode_seconds = time.perf_counter() - prefilled
        yield taken


def stream(
    model: Transformer,
    prompts: Any,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int | Sequence[int] = 0,
    stop_token: int | Sequence[int] | None = None,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    logits_processors: Processor | Sequence[Processor] = (),
    capacity: int | None = None,
    implementation: Implementation | None = None,
    prefill: Prefill | None = None,
    speculation: Speculation | None = None,
) -> Stream:
    """Continues each prompt, token by token: `generate` as an iterator.

    The device runs blocks of a few steps and is given the next block before the last
    one is read. The tokens are those `generate` returns. A stream goes on with the
    weights that the model held when it began.

    Args:
        model: the model.
        prompts: as in `ffjax.generate`.
        max_new_tokens: as in `ffjax.generate`.
        temperature: as in `ffjax.generate`.
        seed: as in `ffjax.generate`.
        stop_token: as in `ffjax.generate`.
        sampling: as in `ffjax.generate`.
        logits_processors: as in `ffjax.generate`.
        capacity: as in `ffjax.generate`.
        implementation: as in `ffjax.generate`.
        prefill: as in `ffjax.generate`.
        speculation: as in `ffjax.generate`. A sequence that is ahead of another waits for it: the
            items are those that come without.

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
        model.config,
        prompts,
        max_new_tokens,
        temperature,
        seed,
        stop_token,
        capacity,
        sampling,
        logits_processors,
    )
    loop = loop_for(model, request, implementation, prefill, speculation)
    return Stream(loop, request)
