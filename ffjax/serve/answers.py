"""What is sent back, in OpenAI's form."""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from ffjax.serve.asked import Asked
from ffjax.serve.job import Ended, Job, Piece
from ffjax.serve.token_text import TokenTexts

__all__ = ["Answer", "as_json"]

# JSON has no infinity; this is what vLLM writes in its place.
_LEAST_LOGPROB = -9999.0


def as_json(value: Any) -> bytes:
    """A value as JSON, in UTF-8. A lone surrogate, which a request may hold, becomes "?"."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


@dataclasses.dataclass
class _Choice:
    """One text of an answer, so far.

    Attributes:
        text: what has come.
        shown: whether a stream has begun it.
        offset: characters before the next token, in the log-probabilities of a completion.
        told: log-probabilities so far, one object a token.
        end: how it has ended; None before.
    """

    text: str = ""
    shown: bool = False
    offset: int = 0
    told: list[tuple[int, Any]] = dataclasses.field(default_factory=list)
    end: Ended | None = None


class Answer:
    """The answer to one request, built from what comes of its jobs."""

    def __init__(self, asked: Asked, model: str, texts: TokenTexts, fingerprint: str):
        """Of a request.

        Args:
            asked: what it asks for.
            model: the model's name.
            texts: of single tokens.
            fingerprint: what answers depend on, beside the request.
        """
        kind, self._object = (
            ("chatcmpl", "chat.completion") if asked.chat else ("cmpl", "text_completion")
        )
        self.id = f"{kind}-{secrets.token_hex(12)}"
        self._asked = asked
        self._texts = texts
        self._head = {
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._choices = [_Choice() for _ in asked.params]
        if asked.echo is not None:
            for i, choice in enumerate(self._choices):
                choice.text = asked.echo[i // asked.n]
                choice.offset = len(choice.text)

    @property
    def is_complete(self) -> bool:
        """Whether all texts have ended."""
        return all(choice.end is not None for choice in self._choices)

    def add(self, index: int, event: Piece | Ended) -> None:
        """Takes what has come of a text."""
        choice = self._choices[index]
        if isinstance(event, Ended):
            choice.end = event
            return
        choice.text += event.text
        choice.told += zip(event.tokens, event.logprobs, strict=False)

    def whole(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """The answer of a request that wanted it in one piece."""
        choices = []
        for i, choice in enumerate(self._choices):
            assert choice.end is not None
            one: dict[str, Any] = {"index": i}
            if self._asked.chat:
                one["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            else:
                one["text"] = choice.text
            choices.append(one | {"logprobs": self._logprobs(i)} | _ending(choice))
        return self._object_of(self._object, choices) | {"usage": self.usage(jobs)}

    def chunks(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The chunks of a stream for what has come of some texts since the last ones."""
        chunks: list[dict[str, Any]] = []
        for i in indices:
            choice = self._choices[i]
            text, choice.text = choice.text, ""
            if not choice.shown and self._asked.chat:
                chunks.append(self._chunk(i, {"role": "assistant", "content": ""}))
            choice.shown = True
            logprobs = self._logprobs(i)
            choice.told.clear()
            if self._asked.chat:
                if text or logprobs:
                    chunks.append(self._chunk(i, {"content": text}, logprobs))
                if choice.end is not None:
                    chunks.append(self._chunk(i, {}, None, choice))
            elif text or logprobs or choice.end is not None:
                chunks.append(self._chunk(i, text, logprobs, choice))
        return chunks

    def usage_chunk(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """The last chunk of a stream that was to tell its usage."""
        return self._object_of(self._chunk_object, []) | {"usage": self.usage(jobs)}

    def usage(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """How many tokens the jobs have taken. A prompt with several texts counts once."""
        firsts = jobs[:: self._asked.n]
        prompt = sum(len(job.prompt) for job in firsts)
        new = sum(len(job.tokens) for job in jobs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(job.cached for job in firsts)},
            # OpenAI's name for drafts that were right; theirs come with the request.
            "completion_tokens_details": {
                "accepted_prediction_tokens": sum(job.accepted for job in jobs)
            },
        }

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self._asked.chat else self._object

    def _object_of(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, **self._head, "choices": choices}

    def _chunk(
        self,
        index: int,
        said: Any,
        logprobs: Any = None,
        choice: _Choice | None = None,
    ) -> dict[str, Any]:
        one = {"index": index, "delta" if self._asked.chat else "text": said, "logprobs": logprobs}
        one |= {"finish_reason": None} if choice is None else _ending(choice)
        chunk = self._object_of(self._chunk_object, [one])
        return chunk | {"usage": None} if self._asked.usage else chunk

    def _logprobs(self, index: int) -> dict[str, Any] | None:
        """Of the tokens that are not told yet; None where nobody asked."""
        choice = self._choices[index]
        most = self._asked.params[index].logprobs
        if most is None or (self._asked.stream and not choice.told):
            return None
        if self._asked.chat:
            return {"content": [self._of_chat(*one, most) for one in choice.told], "refusal": None}
        told: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        for token, one in choice.told:
            text = self._name(token)
            told["tokens"].append(text)
            told["token_logprobs"].append(_finite(one.logprob))
            top = {self._name(other): _finite(value) for other, value in one.top[:most]}
            told["top_logprobs"].append({text: _finite(one.logprob)} | top)
            told["text_offset"].append(choice.offset)
            choice.offset += len(self._texts.of(token)[0])
        return told

    def _of_chat(self, token: int, one: Any, most: int) -> dict[str, Any]:
        top = [self._token(other, value) for other, value in one.top[:most]]
        return self._token(token, one.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, own = self._texts.of(token)
        told = None if own is None else list(own)
        return {"token": text, "logprob": _finite(logprob), "bytes": told}

    def _name(self, token: int) -> str:
        """A token in the log-probabilities of a completion, where it is a key: as OpenAI has it."""
        text, own = self._texts.of(token)
        if own is None or "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)


def _ending(choice: _Choice) -> dict[str, Any]:
    if choice.end is None:
        return {"finish_reason": None}
    return {"finish_reason": choice.end.finish_reason, "stop_reason": choice.end.stop_reason}


def _finite(logprob: float) -> float:
    return max(float(logprob), _LEAST_LOGPROB)
