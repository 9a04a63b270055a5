"""Generation: prompts in, tokens out, the whole decode loop on the device."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from ffjax.broken import NotFiniteError
from ffjax.decode import Implementation
from ffjax.loop import BLOCK, NOT_FINITE, Loop
from ffjax.model import Transformer
from ffjax.requests import Request
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
        implementation: which one ran the decode steps; see `ffjax.decode_step`.
        steps: decode steps the device ran.
        compile_seconds: spent on compiling, next to nothing once a like request has
            been served; the other times do not contain it.
        prefill_seconds: from the start until the first new token of each sequence was here.
        decode_seconds: from there until the last token was here; 0 without decode steps.
    """

    tokens: list[list[int]]
    finish_reasons: list[FinishReason | None]
    implementation: Implementation
    steps: int
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all sequences that decode steps made, a second; NaN without such steps.

        A stop token counts, though it is not returned; what a sequence said after it does not.
        """
        if self.decode_seconds <= 0:
            return math.nan
        pairs = zip(self.tokens, self.finish_reasons, strict=True)
        made = [len(row) + (reason == "stop") for row, reason in pairs]
        # The first of each came with the prefill.
        return sum(max(count - 1, 0) for count in made) / self.decode_seconds


class Replies:
    """The tokens that have come back, sequence by sequence."""

    def __init__(self, request: Request):
        """Starts without a token."""
        self._request = request
        self.tokens: list[list[int]] = [[] for _ in request.prompts]
        self.finish_reasons: list[FinishReason | None] = [None for _ in request.prompts]

    @property
    def finished(self) -> bool:
        """Whether no sequence takes another token."""
        return None not in self.finish_reasons

    def add(self, row: Iterable[int], fault: Callable[[], str | None]) -> list[int | None]:
        """Takes the device's next token of each sequence, `[B]`.

        Args:
            row: the tokens.
            fault: asked, where there are none, what a kernel that gave up has said.

        Returns:
            The same, with None for a sequence that has ended or ends with it.

        Raises:
            NotFiniteError: the logits of a sequence that has not ended chose none; then nothing
                is taken, of any sequence.
        """
        row = list(row)
        for b, token in enumerate(row):
            if token == NOT_FINITE and self.finish_reasons[b] is None:
                raise NotFiniteError(b, len(self.tokens[b]), fault())
        taken: list[int | None] = []
        for b, token in enumerate(row):
            mine = self.tokens[b]
            if self.finish_reasons[b] is None and token in self._request.stop_tokens:
                self.finish_reasons[b] = "stop"
            if self.finish_reasons[b] is not None:
                taken.append(None)
                continue
            mine.append(int(token))
            taken.append(int(token))
            if len(mine) == self._request.max_new_tokens:
                self.finish_reasons[b] = "length"
        return taken


def blocks_for(request: Request) -> int:
    """Blocks of decode steps a request may need: its first token comes with the prefill."""
    return ceil_div(request.max_new_tokens - 1, BLOCK)


def generate(
    model: Transformer,
    prompts: Any,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int | Sequence[int] = 0,
    stop_token: int | Sequence[int] | None = None,
    capacity: int | None = None,
    implementation: Implementation | None = None,
) -> GenerateOutput:
    """Continues each prompt by up to `max_new_tokens` tokens.

    The prompts are fed through the reference model. The decode loop then runs on the
    device within one jitted call that updates the cache in place. The same arguments give the
    same tokens in every process on the same kind of device with the same versions of JAX and,
    on a GPU, of CUDA: see `ffjax.reproducible`.

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
        capacity: positions of the cache to make, at least what the longest prompt and
            the new tokens need. Give the same to requests of different lengths, and
            they share their compiled programs. None: what this one needs, rounded up.
        implementation: of the decode steps, by name, or None for the best that can run; see
            `ffjax.decode_step`.

    Returns:
        The tokens, why each sequence ended, and the times it took.

    Raises:
        ValueError: there is no prompt, a prompt is empty, a token id or a stop token is
            outside the vocabulary, there are more than 64 stop tokens, prompt and new
            tokens need more positions than the model or the capacity has, a kernel is named
            for more than 8 prompts, or an option is out of range.
        TypeError: an argument is of the wrong kind.
        NotImplementedError: the named implementation cannot run here.
        NotFiniteError: the logits of a sequence were NaN or infinite; a FloatingPointError, whose
            `output` is what came before.
    """
    request = Request.checked(
        model.config, prompts, max_new_tokens, temperature, seed, stop_token, capacity
    )
    loop = Loop(model, request, implementation)
    replies = Replies(request)
    made, steps, decode_seconds = np.zeros((0, request.batch), np.int32), 0, 0.0
    start = time.perf_counter()
    # Waited for before the steps are ordered: on a GPU that order lasts as long as they do, and
    # the prefill would seem to. The device meanwhile idles for one round trip to the host, once a
    # call.
    first = jax.device_get(loop.prefill())
    prefilled = time.perf_counter()
    if (blocks := blocks_for(request)) > 0:
        on_device, index = loop.decode(blocks)
        steps = int(jax.device_get(index)) - 1
        made = jax.device_get(on_device)[:steps]
        decode_seconds = time.perf_counter() - prefilled if steps else 0.0

    def output() -> GenerateOutput:
        return GenerateOutput(
            tokens=replies.tokens,
            finish_reasons=replies.finish_reasons,
            implementation=loop.implementation,
            steps=steps,
            compile_seconds=loop.compile_seconds,
            prefill_seconds=prefilled - start,
            decode_seconds=decode_seconds,
        )

    try:
        for row in (first, *made):
            replies.add(row.tolist(), loop.fault)
    except NotFiniteError as error:
        error.output = output()
        raise
    return output()
