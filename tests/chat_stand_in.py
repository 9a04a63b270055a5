"""A chat whose answers are known: run as a program, at a terminal or in a pipe.

    python tests/chat_stand_in.py [--no-figures] [--system TEXT]

It answers with what it was told, and does as it is told: see `_answer`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ffjax.terminal.chat import Chat
from ffjax.terminal.commands import complete
from ffjax.terminal.history import default_file
from ffjax.terminal.lines import lines_for
from ffjax.terminal.screen import Screen
from ffjax.terminal.settings import names

CONTEXT = 300
"""Characters that a conversation may have: a token each."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """As much of `ffjax.SamplingParams` as is asked for here; that one would import JAX."""

    max_tokens: int | None = 200
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = 7


class _Pieces(Iterator[str]):
    def __init__(self, text: Iterator[str], session: _Session, messages: Any, most: int):
        self._text, self._session, self._most = text, session, most
        self._said = ""
        self._finish_reason: str | None = None
        self._prompt = "".join(one["content"] for one in messages)
        self._cached = _common(self._prompt, session.cache)

    def __next__(self) -> str:
        if len(self._said) >= min(self._most, CONTEXT - len(self._prompt)):
            self._finish_reason = "length"
            raise StopIteration
        try:
            piece = next(self._text)
        except StopIteration:
            self._finish_reason = "stop"
            raise
        self._said += piece
        return piece

    def close(self) -> None:
        self._session.cache = self._prompt + self._said

    @property
    def completion(self) -> Any:
        return SimpleNamespace(
            tokens=[0] * len(self._said),
            prompt_tokens=len(self._prompt),
            cached_tokens=self._cached,
            finish_reason=self._finish_reason,
            compile_seconds=0.0,
            tokens_per_second=12.5,
            accepted=None,
        )


class _Session:
    def __init__(self) -> None:
        self.cache = ""

    def reply(self, messages: Any, sampling: Any = None, **how: Any) -> _Pieces:
        length = sum(len(one["content"]) for one in messages)
        if length >= CONTEXT:
            raise ValueError(f"The context has {CONTEXT} tokens; the messages are {length}.")
        return _Pieces(_answer(messages, sampling), self, messages, sampling.max_tokens or CONTEXT)

    def close(self) -> None:
        self.cache = ""


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _answer(messages: Any, sampling: Sampling) -> Iterator[str]:
    """By the last message: what it says, in quotes, after how many messages there were."""
    text = messages[-1]["content"]
    if text == "count":  # slowly, and for long
        for number in range(10_000):
            yield f"{number} "
            time.sleep(0.02)
    elif text == "prefill":  # nothing for long
        print("reading", file=sys.stderr, flush=True)
        for _ in range(500):
            time.sleep(0.02)
        yield "late"
    elif text == "break":
        yield "so far"
        raise FloatingPointError("The logits became NaN")
    elif text == "fail":
        raise ValueError("The stand-in was told to fail.")
    elif text == "escape":
        yield "a\x1b[31mred\x07\r\n"
    elif text == "empty":
        return
    elif text == "seed":
        yield f"seed {sampling.seed} temperature {sampling.temperature:g}"
    elif text == "system":
        yield from messages[0]["content"] if messages[0]["role"] == "system" else "no system"
    else:
        yield from f"{len(messages)}:{text!r}"


def main() -> None:
    """Chats."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-figures", action="store_true")
    parser.add_argument("--system")
    args = parser.parse_args()
    sampling = Sampling()
    screen = Screen(os.environ)
    history = default_file()
    lines = lines_for(screen, lambda line: complete(line, names(sampling)), history)
    if screen.interactive:
        screen.note(f"Ready in {Path.cwd().name}.")
    chat = Chat(
        _Session, sampling, screen, lines, context=CONTEXT, shows_figures=not args.no_figures
    )
    chat.conversation.system = args.system
    chat.run()


if __name__ == "__main__":
    main()
