"""Writes a conversation by a chat template, as transformers 5.24 would.

Needs the package jinja2, of the extra `hf`.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ffjax.chat_files import ChatTemplate

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["GIVEN_NAMES", "needs", "write_conversation"]

# What a template is always given; a variable of the user's own has another name.
GIVEN_NAMES = ("messages", "tools", "documents", "add_generation_prompt")
# Names under which templates look for what a model thought.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
# Marks where a message that is to be continued ends. It holds the space on purpose: a template
# that trims messages takes it away, and so is found out.
_MARK = "FFJAX_CONTINUES_HERE "


def needs(package: str, what: str) -> str:
    """The sentence that says that a package is missing."""
    return f"{what} needs the package {package}. Install it with: pip install 'ffjax[hf]'."


def write_conversation(
    template: ChatTemplate,
    messages: Sequence[Any],
    *,
    reply: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool | str = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation.

    Args:
        template: the template.
        messages: objects with "role" and "content", or dataclasses or pydantic models of those
            fields. What is None is left out.
        reply: whether the template is to open the assistant's next message.
        tools: JSON schemas of functions that the model may call.
        documents: texts that it may quote, each with "title" and "text".
        continue_final_message: whether the last message is left open at its end, for the model
            to go on; or the name of the field to leave open, where it is not "content".
        variables: what else the template is given, by name.

    Raises:
        ValueError: there is no message, the template refuses them or is broken, or what is asked
            for does not go together.
        TypeError: a message, tool or document is no object.
        NotImplementedError: the package jinja2 is not installed.
    """
    variables = dict(variables or {})
    if taken := sorted(set(GIVEN_NAMES) & variables.keys()):
        raise ValueError(
            f"A template's own variables have names other than {', '.join(GIVEN_NAMES)}; got "
            f"{taken[0]!r}. What these hold is given in other ways: the prompt as a message; "
            "in Python, tools and documents as arguments of their own."
        )
    said = [_message(message) for message in messages]
    if not said:
        raise ValueError("A conversation has at least one message; there is none.")
    field, final = "", ""
    if continue_final_message:
        if reply:
            raise ValueError(
                "A conversation goes on with the last message or with a reply to it; both were "
                "asked for. Leave one of them out."
            )
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        final = _leave_open(said[-1], field, template)
    text = _fill(
        template,
        {
            **_plain(variables),
            "messages": said,
            "tools": _objects("A tool is a JSON schema", tools),
            "documents": _objects("A document is an object with title and text", documents),
            "add_generation_prompt": reply,
        },
    )
    return _cut(text, final, template) if field else text


def _message(message: Any) -> dict[str, Any]:
    """A message as a template is to see it: plain, without what is None."""
    plain = _plain(message)
    if not isinstance(plain, dict):
        raise TypeError(
            "A message is an object with role and content, as in {'role': 'user', 'content': "
            f"'Hello'}}; got {type(message).__name__}."
        )
    fields = {key: value for key, value in plain.items() if value is not None}
    thought = next((fields[name] for name in _THOUGHTS if name in fields), None)
    if thought is not None:  # templates differ in the name by which they ask for it
        fields = {"thinking": thought, **fields, "reasoning_content": thought}
    return fields


def _objects(rule: str, values: Sequence[Any] | None) -> list[Any] | None:
    if values is None:
        return None
    if isinstance(values, str | Mapping):
        raise TypeError(f"{rule}, and there is a list of them; got {type(values).__name__}.")
    for value in values:
        if not isinstance(value, Mapping):
            raise TypeError(f"{rule}; got {type(value).__name__}. Write it as a dict.")
    return [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    """The value made of JSON's types alone: a template came with a download, and sees no more.

    What has none of them becomes a word in its place, as "<ndarray>".
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):  # a subclass has more to it
            return value if type(value) is kind else _BASE[kind](value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, tuple):
        return tuple(_plain(one) for one in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: _plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic
        return _plain(dump())
    return f"<{type(value).__name__}>"


_BASE = {str: str.__str__, int: int.__int__, float: float.__float__}


def _leave_open(message: dict[str, Any], field: str, template: ChatTemplate) -> str:
    """Marks the end of a message's field, and returns the text before the mark."""
    final = message.get(field)
    if final is None:
        raise ValueError(
            f"The last message goes on where its {field} ends; it has no {field}. Give it one."
        )
    same = [name for name in _THOUGHTS if message.get(name) == final]
    fields = same if field in _THOUGHTS else [field]
    if not any(name in template.text for name in fields):
        raise ValueError(f"{template} does not write a message's {field}, so it cannot go on.")
    if isinstance(final, str):
        for name in fields:
            message[name] = final + _MARK
        return final
    blocks = final if isinstance(final, list | tuple) else []
    for block in reversed(blocks):
        if isinstance(block, dict) and isinstance(text := block.get("text"), str):
            block["text"] = text + _MARK
            return text
    raise ValueError(f"The last message goes on where its {field} ends; it holds no text.")


def _cut(text: str, final: str, template: ChatTemplate) -> str:
    """The text up to the mark."""
    at = text.rfind(_MARK.strip())
    if at < 0 or final.strip() not in text:
        raise ValueError(
            f"{template} does not write the last message as it is, so that its end is not found "
            "and it cannot go on. Leave continue_final_message out."
        )
    # Without its space, the mark's message has been trimmed.
    text = text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()
    return text.replace(_MARK, "").replace(_MARK.strip(), "")  # where it is written twice


def _fill(template: ChatTemplate, values: Mapping[str, Any]) -> str:
    """The template filled in, in a sandbox."""
    try:
        import jinja2  # noqa: F401 - what follows counts on it
    except ImportError as error:
        raise NotImplementedError(needs("jinja2", "A chat template")) from error
    try:
        return _compiled(template.text).render(values)
    except Exception as error:  # a template is a program, and may fail in any way
        raise ValueError(f"{template} cannot write this conversation: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    """What went wrong in a template, and where."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    what = str(error).rstrip(".")
    if not type(error).__module__.startswith("jinja2"):
        what = f"{type(error).__name__}: {what}" if what else type(error).__name__
    return f"in line {line}, {what}" if line else what


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> Template:
    """The template, in the surroundings that transformers gives one: templates count on them."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Marks what the assistant says, for training; here it says just that."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja wants it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # What is set in it is not seen after it.
            return nodes.Scope(body, lineno=line)

    def checked(name: Any) -> Any:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(
                f"names in a namespace begin with no underscore, got {name!r}"
            )
        return name

    class Namespace(jinja2.utils.Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            super().__setitem__(checked(name), value)

    def namespace(*args: Any, **kwargs: Any) -> Namespace:
        # An underscore might lead from the template into Python.
        return Namespace({checked(name): x for name, x in dict(*args, **kwargs).items()})

    class Dict:
        """Makes a dict, and shows nothing else of Python's type."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own would write < and > as a web page needs them.
        how = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": namespace,
    }
    return environment.from_string(text)
