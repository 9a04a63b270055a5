"""The figures of an answer, as a line."""

from __future__ import annotations

import math

from ffjax.terminal.partner import Answer

__all__ = ["figures"]


def figures(answer: Answer, first_seconds: float | None) -> str:
    """How many tokens, how fast, how soon, and how much of the conversation the cache had.

    Args:
        answer: the answer.
        first_seconds: from the question to the first text, without compiling; None: none came.
    """
    count, rate = len(answer.tokens), answer.tokens_per_second
    said = [f"{count} token{'' if count == 1 else 's'}"]
    if math.isfinite(rate) and rate > 0:
        said.append(f"{rate:.1f} tokens/s")
    if answer.accepted is not None and math.isfinite(answer.tokens_per_step):
        said.append(f"{answer.tokens_per_step:.2f} tokens a step")
    if first_seconds is not None:
        said.append(f"first after {first_seconds:.2f} s")
    said.append(f"{answer.cached_tokens} of {answer.prompt_tokens} context tokens cached")
    text = ", ".join(said)
    if answer.compile_seconds >= 0.05:
        text += f" (compiling took {answer.compile_seconds:.1f} s, not counted)"
    return text
