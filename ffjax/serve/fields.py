"""Every field that a request may have: what is read, what is ignored, what is refused and why."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from ffjax.serve.errors import ApiError, bad_request
from ffjax.shortened import shortened

__all__ = ["CHAT", "COMPLETION", "Fields", "json_body"]

_SAMPLING = frozenset(
    {
        *("max_tokens", "temperature", "top_p", "stop", "seed", "logit_bias"),
        *("presence_penalty", "frequency_penalty"),
        # vLLM's
        *("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos"),
        *("stop_token_ids", "include_stop_str_in_output", "bad_token_ids"),
    }
)
_BOTH = _SAMPLING | {"model", "n", "stream", "stream_options", "logprobs"}
COMPLETION = _BOTH | {"prompt", "echo"}
"""Fields that `/v1/completions` reads."""
CHAT = _BOTH | {
    *("messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice"),
    # vLLM's
    *("chat_template_kwargs", "documents", "add_generation_prompt", "continue_final_message"),
}
"""Fields that `/v1/chat/completions` reads."""

# OpenAI's fields that say who asks, or how its own service should store, bill or hasten the answer.
_IGNORED = frozenset(
    {
        *("user", "safety_identifier", "metadata", "service_tier", "prediction"),
        *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
    }
)
# Fields that cannot be served, but for these values of theirs, which ask for nothing.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "response_format": (
        ({"type": "text"},),
        "Answers are not held to a format or a JSON schema here: response_format is "
        '{"type": "text"}. Ask for the format in the prompt, and check what comes.',
    ),
    "functions": (((), []), "functions has been replaced: give tools."),
    "function_call": (("none", "auto"), "function_call has been replaced: give tools."),
    "modalities": ((["text"],), "Answers are text: modalities is ['text']."),
    "audio": ((), "Answers are text: leave audio out."),
    "web_search_options": ((), "Nothing is looked up here: leave web_search_options out."),
    "reasoning_effort": (
        (),
        "How long a model thinks is said by a variable of its chat template, if it has one: give "
        'it in chat_template_kwargs, as in {"enable_thinking": false}.',
    ),
    "verbosity": ((), "A model is not told how much to write: ask for it in a message."),
    "store": ((False,), "Answers are not stored here: store is false."),
    "moderation": ((), "Nothing is moderated here: leave moderation out."),
    "suffix": (("",), "Texts are continued here and not filled in: leave suffix out."),
    "best_of": ((1,), "Of several texts none is chosen here: give n, and choose one yourself."),
    "use_beam_search": ((False,), "There is no beam search here: tokens are drawn, or greedy."),
}

_KINDS = {str: "a string", bool: "true or false", int: "a whole number", list: "a list"}
_KINDS[dict] = "an object"


def json_body(body: bytes) -> dict[str, Any]:
    """The object that a request's body is.

    Raises:
        ApiError: it is no JSON, or no object.
    """
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise bad_request(
            f"The request's body is JSON in UTF-8; its byte {error.start} is none."
        ) from None
    except RecursionError:
        raise bad_request("The request's body is nested too deeply.") from None
    except ValueError as error:
        raise bad_request(f"The request's body is JSON, and cannot be read: {error}.") from None
    if not isinstance(found, dict):
        raise bad_request(f"The request's body is a JSON object; got {_named(found)}.")
    return found


class Fields:
    """The fields of one request, null being as good as absent."""

    def __init__(self, body: Mapping[str, Any], known: Iterable[str], path: str):
        """Of a body, whose fields are known to be read, ignored or asking for nothing.

        Raises:
            ApiError: a field is unknown, or cannot be served.
        """
        known = set(known)
        self._given = {name: value for name, value in body.items() if value is not None}
        for name, value in self._given.items():
            if name in known or name in _IGNORED:
                continue
            if name in _REFUSED:
                harmless, why = _REFUSED[name]
                if any(value == one and type(value) is type(one) for one in harmless):
                    continue
                raise bad_request(why, name, "unsupported_parameter")
            name = shortened(name)
            near = difflib.get_close_matches(name, known, n=1)
            raise bad_request(
                f"Unrecognized request argument supplied: {name}. {path} has no such field; "
                f"{f'is {near[0]} meant?' if near else 'leave it out.'}",
                name,
                "unknown_parameter",
            )

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def any(self, name: str) -> Any:
        """A field's value as it came; None where it is absent."""
        return self._given.get(name)

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """A field of a JSON type.

        Raises:
            ApiError: it has another one.
        """
        value = self._given.get(name, default)
        if value is default:
            return default
        if isinstance(value, float) and kind is int and value.is_integer():
            value = int(value)  # JSON has one kind of number
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise bad_request(f"{name} is {_KINDS[kind]}, got {_named(value)}.", name)
        return value

    def whole(self, name: str, least: int, most: int, default: int) -> int:
        """A whole number within limits.

        Raises:
            ApiError: it is something else.
        """
        value = self.get(name, int, default)
        if not least <= value <= most:
            raise bad_request(f"{name} is from {least} to {most}, got {_named(value)}.", name)
        return value


def _named(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except ValueError:  # a number with more digits than Python writes
        text = type(value).__name__
    return shortened(text)


def _no_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def wrong_kind(name: str, what: str, value: Any) -> ApiError:
    """A field that is no `what`."""
    return bad_request(f"{name} is {what}, got {_named(value)}.", name)
