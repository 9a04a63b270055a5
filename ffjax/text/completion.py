"""What came of one prompt, as text."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ffjax.decode import Implementation
    from ffjax.generation import FinishReason
    from ffjax.prefill.choice import Prefill
    from ffjax.sampling.logprobs import TokenLogprobs

__all__ = ["Completion"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """A text that a model has written, and how.

    Attributes:
        text: the new text, without the prompt, and without what ended it.
        tokens: the new token ids, without a stop token. Where a stop string ended the text, the
            tokens that say it are among them.
        prompt_tokens: how many the prompt has.
        cached_tokens: how many of those were in a session's cache already, and not fed.
        finish_reason: "stop": a stop token or a stop string came; "length": there are as many
            tokens as were asked for, or as there is room for; None: it was broken off.
        stop_reason: the stop string, or the stop token's id; None where neither came.
        logprobs: of each token, where they were asked for; else None.
        seed: of the draws: the same call with it gives the same text again.
        implementation: which one ran the decode steps; see `ffjax.decode_step`.
        prefill: which one ran the prefill; see `ffjax.generate`.
        compile_seconds: spent on compiling; the other times do not contain it.
        prefill_seconds: until the first new token was here; of prompts that ran side by side, of
            all of them.
        decode_seconds: from there until the last token was here.
        accepted: how many tokens came beside the first of their decode step, since the drafts
            before them were right; None without speculation.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    cached_tokens: int
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    logprobs: list[TokenLogprobs] | None
    seed: int
    implementation: Implementation
    prefill: Prefill
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    accepted: int | None = None

    @property
    def made(self) -> int:
        """Tokens that decode steps made for this text: all but the first.

        A stop token counts, though it is not among `tokens`.
        """
        return max(len(self.tokens) + isinstance(self.stop_reason, int) - 1, 0)

    @property
    def tokens_per_second(self) -> float:
        """Tokens that decode steps made for this text, a second; NaN without such steps."""
        return self.made / self.decode_seconds if self.decode_seconds > 0 else math.nan

    @property
    def tokens_per_step(self) -> float:
        """Tokens that this text got of a decode step, on average; NaN without such steps.

        Without speculation it is 1.
        """
        steps = self.made - (self.accepted or 0)
        return self.made / steps if steps > 0 else math.nan
