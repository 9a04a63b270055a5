"""Which chat templates a Hugging Face folder has, and which of them writes a conversation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["TEMPLATE_DIRECTORY", "ChatTemplate", "choose_template", "read_templates"]

TEMPLATE_DIRECTORY = "additional_chat_templates"
_FILE, _FIELD = "chat_template.jinja", "chat_template"
_DEFAULT, _WITH_TOOLS = "default", "tool_use"


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template that writes a conversation.

    Attributes:
        name: by which it is chosen: "default", "tool_use", "rag".
        text: the template.
        source: the file that it comes from.
    """

    name: str
    text: str
    source: str

    def __str__(self) -> str:
        return f"The chat template {self.name!r} of {self.source}"


def read_templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    """The templates by name: those in files of their own, else those of `tokenizer_config.json`.

    Args:
        directory: the folder.
        settings: its `tokenizer_config.json`.

    Raises:
        ValueError: a file is not text, or what the settings have is no template.
    """
    files = {_DEFAULT: directory / _FILE} if (directory / _FILE).is_file() else {}
    for file in sorted((directory / TEMPLATE_DIRECTORY).glob("*.jinja")):
        files[file.name.removesuffix(".jinja")] = file
    if files:
        return {
            name: ChatTemplate(name, _read(file), str(file.relative_to(directory)))
            for name, file in files.items()
        }
    found = settings.get(_FIELD)
    if found is None:
        return {}
    named = _by_name(found)
    if named is None:
        raise ValueError(
            f"{_FIELD} in tokenizer_config.json is a template, a list of objects with name and "
            f"template, or an object of templates by name; {directory} has {_short(found)}. "
            f"Correct it, or put the template into {_FILE}."
        )
    return {name: ChatTemplate(name, text, "tokenizer_config.json") for name, text in named.items()}


def choose_template(
    templates: Mapping[str, ChatTemplate], name: str | None, *, tools: bool
) -> ChatTemplate:
    """The template that writes a conversation.

    Args:
        templates: those there are, by name.
        name: which is asked for. None: "tool_use" where there are tools and such a template,
            else "default".
        tools: whether the model is given tools.

    Raises:
        ValueError: there is none, or none of that name, or none is asked for and several have
            names, but none is "default".
    """
    if not templates:
        raise ValueError(
            "A conversation needs a chat template, and this tokenizer has none: its model "
            "was probably not trained on conversations. Give it a text to continue; or, if it "
            f"was, put its template into {_FILE} (chat_template.json is for processors of "
            "images and sound, and not read)."
        )
    there_are = ", ".join(repr(one) for one in sorted(templates))
    if name is not None:
        if name not in templates:
            raise ValueError(
                f"A chat template is chosen by its name; there is no {name!r}. This tokenizer "
                f"has {there_are}."
            )
        return templates[name]
    if tools and _WITH_TOOLS in templates:
        return templates[_WITH_TOOLS]
    if _DEFAULT not in templates:
        raise ValueError(
            "Of several chat templates the one named 'default' is taken where none is asked for; "
            f"this tokenizer has only {there_are}. Choose one of them: template= in Python, "
            "--chat-template on the command line."
        )
    return templates[_DEFAULT]


def _by_name(found: Any) -> dict[str, str] | None:
    """The templates of a field of the settings; None if it holds something else."""
    if isinstance(found, str):
        return {_DEFAULT: found}
    if isinstance(found, list):
        if not all(isinstance(one, dict) and {"name", "template"} <= one.keys() for one in found):
            return None
        pairs = [(one["name"], one["template"]) for one in found]
    elif isinstance(found, dict):
        pairs = list(found.items())
    else:
        return None
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in pairs):
        return None
    return dict(pairs)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"A chat template is text in UTF-8; the byte at {error.start} of {file} is none. "
            "Copy it again."
        ) from None


def _short(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
