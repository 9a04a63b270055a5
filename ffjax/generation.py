"""Generation: prompts in, tokens out, the whole decode loop on the device."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from ffjax.broken import NotFiniteError
from ffjax.decode import Implementation
from ffjax.loop import NOT_FINITE, Step
from ffjax.model import Transformer
from ffjax.prefill.choice import Prefill
from ffjax.requests import Request
from ffjax.sampling.logprobs import TokenLogprobs
from ffjax.sampling.params import SamplingParams
from ffjax.sampling.rows import Processor
from ffjax.speculation.choice import Speculation, loop_for
from pallas_kernels.dims import ceil_div

__all__ = ["FinishReason", "GenerateOutput", "Replies", "blocks_for", "generate"]

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """What a generation made, and how.

    Attributes:
        tokens: the new token ids of each sequence, without the prompt and without
            the stop token.
        finish_reasons: of each sequence: "stop", it came to a stop token; "length",
            it has as many tokens as were asked for; None, it was broken off.
        stop_reasons: of each sequence: what stopped it, a stop token's id, or what
            `ffjax.Stream.stop` was given; None where nothing did.
        logprobs: of each sequence and token; of a sequence that did not ask, an empty list.
        implementation: which one ran the decode steps; see `ffjax.decode_step`.
        prefill: which one ran the prefill; see `ffjax.generate`.
        steps: decode steps that ran before the last token was here, whole blocks of 1 to 8
            (`ffjax.blocks`). After an early end the device runs one block more.
        accepted: of each sequence, how many of the tokens that decode steps made came beside the
            first of their step, since the drafts before them were right; None without speculation.
        compile_seconds: spent on compiling, next to nothing once a like request has
            been served; the other times do not contain it.
        prefill_seconds: from the start until the first new token of each sequence was here.
        decode_seconds: from there until the last token was here; 0 without decode steps. The
            prefill of a draft model is among it.
    """

    tokens: list[list[int]]
    finish_reasons: list[FinishReason | None]
    stop_reasons: list[int | str | None]
    logprobs: list[list[TokenLogprobs]]
    implementation: Implementation
    prefill: Prefill
    steps: int
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    accepted: list[int] | None = None

    @property
    def _made(self) -> list[int]:
        """Tokens that decode steps made for each sequence; its first came with the prefill."""
        pairs = zip(self.tokens, self.finish_reasons, strict=True)
        return [max(len(row) + (reason == "stop") - 1, 0) for row, reason in pairs]

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a sequence got of a decode step, on average; NaN without such steps.

        Counted over the steps in which it got any. Without speculation it is 1.
        """
        made, accepted = sum(self._made), sum(self.accepted or ())
        return made / (made - accepted) if made > accepted else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all sequences that decode steps made, a second; NaN without such steps.

        A stop token counts, though it is not returned; what a sequence said after it does not.
        """
        if self.decode_seconds <= 0:
            return math.nan
        return sum(self._made) / self.decode_seconds


class Replies:
    """The tokens that have come back, sequence by sequence."""

    def __init__(self, request: Request):
        """Starts without a token."""
        self._request = request
        self.tokens: list[list[int]] = [[] for _ in request.prompts]
        self.finish_reasons: list[FinishReason | None] = [None for _ in request.prompts]
        self.stop_reasons: list[int | str | None] = [None for _ in request.prompts]
        self.logprobs: list[list[TokenLogprobs]] = [[] for _ in request.prompts]
        self.accepted = [0 for _ in request.prompts]
        self._stops = [frozenset(ids) for ids in request.stop_tokens]
        self._ends = [ids | {NOT_FINITE} for ids in self._stops]

    @property
    def finished(self) -> bool:
        """Whether no sequence takes another token."""
        return None not in self.finish_reasons

    def has_ended(self, row: int) -> bool:
        """Whether a sequence takes no more tokens."""
        return self.finish_reasons[row] is not None

    def would_finish(self, columns: Sequence[Sequence[int]]) -> bool:
        """Whether no sequence would take another token after these, of each sequence."""
        return all(
            reason is not None
            or len(self.tokens[b]) + len(columns[b]) >= self._request.limits[b]
            or not self._ends[b].isdisjoint(columns[b])
            for b, reason in enumerate(self.finish_reasons)
        )

    def stop(self, row: int, reason: int | str | None) -> None:
        """Ends a sequence for a reason of the reader's; nothing where it has ended."""
        if self.finish_reasons[row] is None:
            self.finish_reasons[row], self.stop_reasons[row] = "stop", reason

    def add(self, step: Step, fault: Callable[[], str | None]) -> list[int | None]:
        """Takes the device's next token of each sequence.

        Args:
            step: the tokens.
            fault: asked, where there are none, what a kernel that gave up has said.

        Returns:
            The same, with None for a sequence that has ended or ends with it.

        Raises:
            NotFiniteError: the logits of a sequence that has not ended chose none; then nothing
                is taken, of any sequence.
        """
        row, logprobs, drafted = step
        for b, token in enumerate(row):
            if token == NOT_FINITE and self.finish_reasons[b] is None:
                raise NotFiniteError(b, len(self.tokens[b]), fault())
        taken: list[int | None] = []
        for b, token in enumerate(row):
            mine = self.tokens[b]
            if self.finish_reasons[b] is None and drafted is not None:
                self.accepted[b] += drafted[b]
            if self.finish_reasons[b] is None and token in self._stops[b]:
                self.stop(b, token)
            if self.finish_reasons[b] is not None:
                taken.append(None)
                continue
            mine.append(token)
            taken.append(token)
            asked = self._request.params[b].logprobs
            if logprobs is not None and asked is not None:
                self.logprobs[b].append(logprobs.of(b, asked))
            if len(mine) == self._request.limits[b]:
                self.finish_reasons[b] = "length"
        return taken


def blocks_for(request: Request, steps: int) -> int:
    """Blocks of so many decode steps a request may need: its first token comes with the prefill."""
    return ceil_div(request.max_new_tokens - 1, steps)


def generate(
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
) -> GenerateOutput:
    """Continues each prompt by up to `max_new_tokens` tokens.

    The prompts are fed by the prefill; the decode loop then runs on the device, which has its next
    steps before the host reads the last ones. The cache is updated in place. The same arguments
    give the same tokens in every process on the same kind of device with the same versions of JAX
    and, on a GPU, of CUDA: see `ffjax.reproducible`.

    Args:
        model: the model.
        prompts: token ids, a list for each of the B sequences; lengths may differ. A
            flat list, or a one-dimensional array, is a single prompt.
        max_new_tokens: how many tokens each sequence gets at most.
        temperature: 0 takes the likeliest token; above, tokens are drawn from
            `softmax(logits / temperature)`.
        seed: of the draws: one for the call, or one for each prompt. A prompt with a
            seed of its own draws the same tokens in whatever batch it is. Seeds are 0 to
            2^64 - 1, all different.
        stop_token: the token that ends a sequence; or several, up to 64, any of which ends it,
            as a tokenizer's `eot_ids`; None or an empty sequence: none does.
        sampling: all that may be asked of the choice of tokens, in place of `temperature`: one for
            all prompts or one for each. A `seed` or `max_tokens` in it goes before those here; its
            `stop_token_ids` end a sequence beside `stop_token`.
        logits_processors: functions of your own, which change logits after the penalties and
            before the temperature, in this order. Each takes float32 `[B, V]` and a
            `ffjax.sampling.choose.Before`, and returns logits. They are traced, and a program is
            compiled for each set of functions: do not make them anew for each call.
        capacity: positions of the cache to make, at least what the longest prompt and
            the new tokens need. Give the same to requests of different lengths, and
            they share their compiled programs. None: what this one needs, rounded up.
        implementation: of the decode steps, by name, or None for the best that can run; see
            `ffjax.decode_step`.
        prefill: implementation of the prefill: "pallas", the packed one with a flash attention;
            "steps", fused decode steps of several tokens, which are faster for a few tokens, above
            all of quantized weights; "xla", the reference model. None: "pallas" where it can run,
            but "xla" where `implementation` is "xla".
        speculation: "lookup", or a `ffjax.Lookup`: steps take drafts, found in prompt and answer,
            beside the token that is certain, and keep those that are right; the tokens are those
            that come without. A `ffjax.Draft`: a draft model writes them. For up to 4 prompts.
            None, or "none": there are no drafts.

    Returns:
        The tokens, why each sequence ended, and the times it took.

    Raises:
        ValueError: there is no prompt, a prompt is empty, a token id or a stop token is
            outside the vocabulary, there are more than 64 stop tokens, prompt and new
            tokens need more positions than the model or the capacity has, a kernel is named
            for more than 8 prompts, there are too many for speculation, a draft model does not
            fit, or an option is out of range.
        TypeError: an argument is of the wrong kind.
        NotImplementedError: a named implementation cannot run here, or not with speculation.
        NotFiniteError: the logits of a sequence were NaN or infinite; a FloatingPointError, whose
            `output` is what came before.
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
    prefill_seconds, decode_seconds = 0.0, 0.0

    def output() -> GenerateOutput:
        return GenerateOutput(
            tokens=replies.tokens,
            finish_reasons=replies.finish_reasons,
            stop_reasons=replies.stop_reasons,
            logprobs=replies.logprobs,
            implementation=loop.implementation,
            prefill=loop.prefill_implementation,
            steps=loop.steps,
            compile_seconds=loop.compile_seconds,
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
            accepted=replies.accepted if loop.step_tokens > 1 else None,
        )

    start = time.perf_counter()
    first = loop.prefill()
    replies = Replies(request)
    # The device has its first steps before the prefill's token is read.
    rows = loop.rows(blocks_for(request, loop.block), replies)
    first = jax.device_get(first).step()
    prefilled = time.perf_counter()
    prefill_seconds = prefilled - start
    try:
        replies.add(first, loop.fault)
        while not replies.finished and (row := next(rows, None)) is not None:
            replies.add(row, loop.fault)
            decode_seconds = time.perf_counter() - prefilled
    except NotFiniteError as error:
        error.output = output()
        raise
    return output()
