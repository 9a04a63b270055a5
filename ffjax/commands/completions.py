"""A completion as the commands report it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffjax.text.completion import Completion

__all__ = ["INTERRUPTED", "NOT_FINITE", "as_json", "count_of", "ended_by"]

# What ended a text, in JSON, beside "stop" and "length".
NOT_FINITE = "not_finite"
INTERRUPTED = "interrupted"


def as_json(completion: Completion, finish_reason: str | None) -> dict[str, Any]:
    """What JSON says of a text.

    Args:
        completion: the text.
        finish_reason: what ended it, in the command's words.
    """
    rate = completion.tokens_per_second
    report: dict[str, Any] = {
        "text": completion.text,
        "tokens": completion.tokens,
        "prompt_tokens": completion.prompt_tokens,
        "finish_reason": finish_reason,
        "stop_reason": completion.stop_reason,
        "seed": completion.seed,
        # JSON has no NaN, which a text without decode steps has.
        "tokens_per_second": rate if math.isfinite(rate) else None,
        "implementation": completion.implementation,
        "prefill": completion.prefill,
    }
    if completion.accepted is not None:
        each = completion.tokens_per_step
        report["accepted"] = completion.accepted
        report["tokens_per_step"] = each if math.isfinite(each) else None
    if completion.logprobs is not None:
        report["logprobs"] = [
            {"logprob": _finite(one.logprob), "top": [[id, _finite(p)] for id, p in one.top]}
            for one in completion.logprobs
        ]
    return report


def ended_by(broken: BaseException | None, completion: Completion) -> str | None:
    """What ended a text, where something may have broken it off."""
    if completion.finish_reason is not None or broken is None:
        return completion.finish_reason
    return INTERRUPTED if isinstance(broken, KeyboardInterrupt) else NOT_FINITE


def count_of(count: int, what: str) -> str:
    """A number with its noun, as in "1 token"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
