"""What a request asks for: prompts as tokens, how they go on, and in which form."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ffjax.biases import biases_of
from ffjax.chat_files import choose_template
from ffjax.config import ModelConfig
from ffjax.failures import sentence
from ffjax.hf_tokenizer import HFTokenizer
from ffjax.sampling.params import SamplingParams
from ffjax.seeds import MAX_SEED
from ffjax.serve.errors import ApiError, bad_request, too_many_texts
from ffjax.serve.fields import CHAT, COMPLETION, Fields, wrong_kind
from ffjax.shortened import shortened
from ffjax.tokenizer import Tokenizer, check_known

__all__ = ["Asked", "Limits", "asked_chat", "asked_completion"]

_COMPLETION_TOKENS = 16  # as OpenAI's endpoint and vLLM's have it
_MOST_TEXTS = 128
_MOST_PROMPTS = 2048
# No token of a known tokenizer is longer: Llama 3's longest has 128 spaces.
_TOKEN_CHARACTERS = 128
_MOST_STOPS = 64
_LONGEST_STOP = 1000
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Fields of `SamplingParams` that are read as they come, by name.
_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "min_tokens", "ignore_eos", "stop", "include_stop_str_in_output"),
    *("stop_token_ids", "bad_token_ids"),
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server can do, and what it does where a request says nothing.

    Attributes:
        name: of the model, as requests have it.
        config: the model's configuration.
        tokenizer: the model's.
        defaults: how tokens are chosen where a request does not say.
        capacity: positions for a prompt and its answer.
        rows: texts that are written side by side.
        max_queue: texts that may wait for a row.
        max_logprobs: most alternatives told at a token.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    defaults: SamplingParams
    capacity: int
    rows: int
    max_queue: int
    max_logprobs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, read.

    Attributes:
        chat: whether its answer has the form of a chat.
        prompts: token ids of each prompt.
        n: texts for each of them.
        params: one for each prompt and text: those of the first prompt, then the second.
        echo: what each answer begins with: the prompt's text; None: nothing.
        stream: whether the answer comes in pieces.
        usage: whether a stream ends with its usage.
    """

    chat: bool
    prompts: list[list[int]]
    n: int
    params: list[SamplingParams]
    echo: list[str] | None
    stream: bool
    usage: bool


def asked_completion(body: Mapping[str, Any], limits: Limits) -> Asked:
    """Reads a request to `/v1/completions`.

    Raises:
        ApiError: it is wrong, or cannot be served.
    """
    fields = Fields(body, COMPLETION, "/v1/completions")
    _check_model(fields, limits)
    prompts, texts = _prompts(fields, limits)
    logprobs = fields.whole("logprobs", 0, limits.max_logprobs, 0) if "logprobs" in fields else None
    echo = fields.get("echo", bool, False)
    if echo and logprobs is not None:
        raise bad_request(
            "The log-probabilities of a prompt's tokens are not told: with logprobs, leave echo "
            "out.",
            "echo",
            "unsupported_parameter",
        )
    return _asked(
        fields,
        limits,
        prompts,
        chat=False,
        most="max_tokens",
        default=limits.defaults.max_tokens or _COMPLETION_TOKENS,
        logprobs=logprobs,
        echo=[text() for text in texts] if echo else None,
    )


def asked_chat(body: Mapping[str, Any], limits: Limits) -> Asked:
    """Reads a request to `/v1/chat/completions`.

    Raises:
        ApiError: it is wrong, or cannot be served.
    """
    fields = Fields(body, CHAT, "/v1/chat/completions")
    _check_model(fields, limits)
    _check_count(fields, limits, 1)
    prompt = _conversation(fields, limits)
    top = fields.whole("top_logprobs", 0, limits.max_logprobs, 0)
    told = fields.get("logprobs", bool, False)
    if "top_logprobs" in fields and not told:
        raise bad_request("top_logprobs needs logprobs: true.", "top_logprobs")
    most = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    return _asked(
        fields,
        limits,
        [prompt],
        chat=True,
        most=most,
        default=limits.defaults.max_tokens,
        logprobs=top if told else None,
        echo=None,
    )


def _asked(
    fields: Fields,
    limits: Limits,
    prompts: list[list[int]],
    *,
    chat: bool,
    most: str,
    default: int | None,
    logprobs: int | None,
    echo: list[str] | None,
) -> Asked:
    n = _texts_each(fields)
    stream = fields.get("stream", bool, False)
    options = fields.get("stream_options", dict, {})
    if options and not stream:
        raise bad_request("stream_options needs stream: true.", "stream_options")
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            name = shortened(name)
            raise bad_request(
                f"stream_options has include_usage, and no {name}.", f"stream_options.{name}"
            )
    usage = options.get("include_usage") or False
    if not isinstance(usage, bool):
        raise wrong_kind("stream_options.include_usage", "true or false", usage)
    asked_for = fields.whole(most, 1, MAX_SEED, 1) if most in fields else None
    base = _params(fields, limits, logprobs)
    seed = fields.get("seed", int)
    params: list[SamplingParams] = []
    for i, prompt in enumerate(prompts):
        what = "The prompt" if len(prompts) == 1 else f"Prompt {i}"
        count = _count(limits, what, len(prompt), asked_for, default, most)
        if "min_tokens" in fields and base.min_tokens > count:
            raise bad_request(
                f"min_tokens is at most {most}, here {count}; got {base.min_tokens}.", "min_tokens"
            )
        for k in range(n):
            own = secrets.randbits(64) if seed is None else (seed + k) % (MAX_SEED + 1)
            least = min(base.min_tokens, count)  # the model's own may be more than is asked for
            params.append(dataclasses.replace(base, max_tokens=count, min_tokens=least, seed=own))
    return Asked(
        chat=chat, prompts=prompts, n=n, params=params, echo=echo, stream=stream, usage=usage
    )


def _texts_each(fields: Fields) -> int:
    return fields.whole("n", 1, _MOST_TEXTS, 1)


def _check_count(fields: Fields, limits: Limits, prompts: int) -> None:
    """Refuses more texts than can be queued, before anything is done for them."""
    asked = prompts * _texts_each(fields)
    if asked > limits.rows + limits.max_queue:
        raise too_many_texts(asked, limits.rows, limits.max_queue)


def _check_model(fields: Fields, limits: Limits) -> None:
    name = fields.get("model", str, limits.name)
    if name != limits.name:
        raise ApiError(
            404,
            f"The model {shortened(name)!r} does not exist. This server has {limits.name!r}.",
            param="model",
            code="model_not_found",
        )


# How tokens are chosen


def _params(fields: Fields, limits: Limits, logprobs: int | None) -> SamplingParams:
    given = {name: fields.any(name) for name in _SAMPLING if name in fields}
    if "logit_bias" in fields:
        given["logit_bias"] = _biases(fields.get("logit_bias", dict), limits)
    for name in ("top_k", "min_tokens"):
        if name in given:
            given[name] = fields.get(name, int)
    if "ignore_eos" in given:
        given["ignore_eos"] = fields.get("ignore_eos", bool)
    _check_stops(given.get("stop"))
    for name in given:  # each by itself, so that an error names the field
        try:
            SamplingParams(**{name: given[name]})
        except (ValueError, TypeError) as error:
            raise bad_request(str(error), name) from None
    for name in ("stop_token_ids", "bad_token_ids"):
        _check_ids(name, given.get(name, ()), limits)
    base = dataclasses.replace(limits.defaults, max_tokens=None)
    return dataclasses.replace(base, **given, logprobs=logprobs)


def _check_stops(given: Any) -> None:
    """Each new token of an answer is compared with all of them."""
    stops = given if isinstance(given, list) else [given]
    if len(stops) > _MOST_STOPS:
        raise bad_request(
            f"A sequence ends at one of up to {_MOST_STOPS} texts; stop has {len(stops)}.", "stop"
        )
    longest = max((len(one) for one in stops if isinstance(one, str)), default=0)
    if longest > _LONGEST_STOP:
        raise bad_request(
            f"A text that ends a sequence has up to {_LONGEST_STOP} characters; stop has one of "
            f"{longest}.",
            "stop",
        )


def _biases(given: Mapping[str, Any], limits: Limits) -> dict[int, Any]:
    try:
        biases = biases_of(given)
    except ValueError as error:
        raise bad_request(str(error), "logit_bias") from None
    _check_ids("logit_bias", list(biases), limits)
    return biases


def _check_ids(name: str, ids: Any, limits: Limits) -> None:
    for one in ids:
        if not 0 <= one < limits.config.vocab_size:
            raise bad_request(
                f"Token ids of {limits.name} are 0 to {limits.config.vocab_size - 1}; {name} has "
                f"{one}.",
                name,
            )


def _count(
    limits: Limits, what: str, prompt: int, given: int | None, default: int | None, name: str
) -> int:
    """How many tokens a prompt gets."""
    room = limits.capacity - prompt
    if room < 1:
        raise bad_request(
            f"{what} has {prompt} tokens, and a prompt and its answer have {limits.capacity} "
            f"positions here: it may have {limits.capacity - 1}. Shorten it, or start the server "
            "with a larger --capacity.",
            "prompt" if name == "prompt" else None,
            "context_length_exceeded",
        )
    if given is None:
        return min(room, room if default is None else default)
    if given > room:
        raise bad_request(
            f"{what} has {prompt} tokens and {name} asks for {given} more: {prompt + given} "
            f"positions, and there are {limits.capacity}. Ask for up to {room}, or shorten the "
            "prompt, or start the server with a larger --capacity.",
            name,
            "context_length_exceeded",
        )
    return given


# Prompts


def _prompts(fields: Fields, limits: Limits) -> tuple[list[list[int]], list[Callable[[], str]]]:
    """The prompts' tokens, and what gives their texts."""
    if "prompt" not in fields:
        raise bad_request("There is no prompt to continue: give prompt.", "prompt")
    given = fields.any("prompt")
    if isinstance(given, str) or (isinstance(given, list) and given and _is_ids(given)):
        given = [given]
    if not isinstance(given, list) or not given:
        raise wrong_kind("prompt", _PROMPT, given)
    if len(given) > _MOST_PROMPTS:
        raise bad_request(
            f"prompt has up to {_MOST_PROMPTS} texts, got {len(given)}. Send them in parts.",
            "prompt",
        )
    _check_count(fields, limits, len(given))
    prompts: list[list[int]] = []
    texts: list[Callable[[], str]] = []
    for one in given:
        if isinstance(one, str):
            _check_length(one, limits, "prompt")
            tokens = _reading("prompt", limits.tokenizer.encode, one)
            texts.append(lambda text=one: text)
        elif isinstance(one, list) and _is_ids(one):
            tokens = list(one)
            texts.append(lambda ids=one: limits.tokenizer.decode(ids))
        else:
            raise wrong_kind("prompt", _PROMPT, one)
        prompts.append(_checked(tokens, limits, "prompt"))
    return prompts, texts


_PROMPT = "a text, a list of texts, a list of token ids, or a list of such lists"


def _is_ids(value: list[Any]) -> bool:
    return all(isinstance(one, int) and not isinstance(one, bool) for one in value)


def _check_length(text: str, limits: Limits, param: str) -> None:
    """Refuses a text that has too many tokens for certain, before it is split into them."""
    most = limits.capacity * _TOKEN_CHARACTERS
    if len(text) > most:
        raise bad_request(
            f"A prompt has up to {most} characters here, {_TOKEN_CHARACTERS} for each of "
            f"{limits.capacity} positions; this one has {len(text)}. Shorten it, or start the "
            "server with a larger --capacity.",
            param,
            "context_length_exceeded",
        )


def _checked(tokens: list[int], limits: Limits, param: str) -> list[int]:
    if not tokens:
        raise bad_request("A prompt has at least one token, and this one has none.", param)
    if max(tokens) >= 2**31 or min(tokens) < 0:  # no array of theirs can be made
        _check_ids(param, tokens, limits)
    try:
        check_known(f"the {param}", tokens, limits.config)
    except ValueError as error:
        raise bad_request(str(error), param) from None
    return tokens


def _reading(param: str, read: Callable[..., list[int]], *args: Any, **more: Any) -> list[int]:
    """The tokens of a text or a conversation; what is wrong with it is the request's fault."""
    try:
        return read(*args, **more)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise bad_request(sentence(error), param) from None


def _conversation(fields: Fields, limits: Limits) -> list[int]:
    messages = fields.get("messages", list, [])
    if not messages:
        raise bad_request("A chat has at least one message: give messages.", "messages")
    if not isinstance(limits.tokenizer, HFTokenizer):
        raise bad_request(
            f"A chat needs a chat template, and {limits.name} has none: its tokens are bytes, and "
            "it was not trained on conversations. Use /v1/completions.",
            "messages",
            "no_chat_template",
        )
    said = [_message(i, message) for i, message in enumerate(messages)]
    tools, documents = _tools(fields), fields.get("documents", list)
    for name, given in (("tools", tools), ("documents", documents)):
        if given:
            _check_read(name, limits.tokenizer, tools=tools is not None)
    goes_on = fields.any("continue_final_message") or False
    if not isinstance(goes_on, bool | str):
        raise wrong_kind("continue_final_message", "true, false or a field's name", goes_on)
    tokens = _reading(
        "messages",
        _chat,
        limits,
        said,
        reply=fields.get("add_generation_prompt", bool),
        tools=tools,
        documents=documents,
        continue_final_message=goes_on,
        variables=fields.get("chat_template_kwargs", dict, {}),
    )
    return _checked(tokens, limits, "messages")


def _chat(limits: Limits, messages: Sequence[Any], **how: Any) -> list[int]:
    """A conversation's tokens; its text is looked at before it is split."""
    assert isinstance(limits.tokenizer, HFTokenizer)
    text = limits.tokenizer.render(messages, **how)
    _check_length(text, limits, "messages")
    return limits.tokenizer.encode_rendered(text)


def _check_read(name: str, tokenizer: HFTokenizer, *, tools: bool) -> None:
    """Refuses what the chat template would leave out without a word."""
    try:
        template = choose_template(tokenizer.chat_templates, None, tools=tools)
    except ValueError as error:
        raise bad_request(str(error), "messages", "no_chat_template") from None
    if not re.search(rf"\b{name}\b", template.text):
        raise bad_request(
            f"{template} takes no {name}: the model was not trained on them. Leave {name} out, or "
            "write them into a message.",
            name,
            "unsupported_parameter",
        )


def _tools(fields: Fields) -> list[Any] | None:
    """The tools that the template is given; None: none."""
    tools = fields.get("tools", list, [])
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad_request(
                'A tool is {"type": "function", "function": {"name": ..., "parameters": ...}}; '
                f"tools[{i}] is none.",
                f"tools[{i}]",
            )
    choice = fields.any("tool_choice")
    if choice in (None, "auto"):
        return tools or None
    if choice == "none":
        return None
    raise bad_request(
        "Which tool a model calls is its own choice here: tool_choice is auto or none. Ask for the "
        "call in a message.",
        "tool_choice",
        "unsupported_parameter",
    )


def _message(i: int, message: Any) -> dict[str, Any]:
    """A message as chat templates expect it."""
    where = f"messages[{i}]"
    if not isinstance(message, dict):
        raise wrong_kind(where, "an object with role and content", message)
    role = message.get("role")
    if role not in _ROLES:
        raise wrong_kind(f"{where}.role", f"one of {', '.join(_ROLES)}", role)
    message = dict(message)
    if role == "developer":  # OpenAI's name since 2024; templates know the older one
        message["role"] = "system"
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = "\n".join(
            _part(f"{where}.content[{k}]", x) for k, x in enumerate(content)
        )
    elif content is None:
        if role != "assistant":
            raise bad_request(f"{where} has no content: give it a text.", f"{where}.content")
    elif not isinstance(content, str):
        raise wrong_kind(f"{where}.content", "a text or a list of parts", content)
    if message.get("tool_calls") is not None:
        message["tool_calls"] = _tool_calls(f"{where}.tool_calls", message["tool_calls"])
    return message


def _part(where: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") in ("text", "refusal"):
        text = part.get(part["type"])
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, dict) else None
    raise bad_request(
        f'Messages are text here: a part is {{"type": "text", "text": ...}}; {where} is '
        f"{shortened(kind) if isinstance(kind, str) else 'something else'}.",
        where,
    )


def _tool_calls(where: str, calls: Any) -> list[Any]:
    """Tool calls whose arguments are objects: as a text, a template would write them quoted."""
    if not isinstance(calls, Sequence) or not all(isinstance(call, dict) for call in calls):
        raise wrong_kind(where, "a list of calls", calls)
    out: list[Any] = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(text := function.get("arguments"), str):
            # A model wrote them, and may have erred: then they stay as they are.
            with contextlib.suppress(ValueError):
                call = {**call, "function": {**function, "arguments": json.loads(text)}}
        out.append(call)
    return out
