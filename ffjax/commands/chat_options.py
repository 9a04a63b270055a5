"""Options that say how a chat template writes a conversation."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from ffjax.tokenizer import Tokenizer

__all__ = ["add_chat_template", "say_unread", "template_variables"]

# Python's words, and JSON's.
_JSON_OF = {"True": "true", "False": "false", "None": "null"}


def add_chat_template(parser: argparse.ArgumentParser) -> None:
    """Adds --chat-template and --template-var."""
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="which of the model's chat templates is taken; default: the one named default",
    )
    parser.add_argument(
        "--template-var",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a variable of the chat template, as in enable_thinking=false; the value is JSON, "
        "or a text as it stands; may be given several times",
    )


def template_variables(given: list[str]) -> dict[str, Any]:
    """The variables of a chat template, from NAME=VALUE.

    Raises:
        ValueError: one is none.
    """
    variables: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(
                f"--template-var takes NAME=VALUE, as in enable_thinking=false; got {one!r}."
            )
        if value in ("True", "False", "None"):
            raise ValueError(
                f"--template-var takes JSON, which writes {name}={_JSON_OF[value]}; got {one!r}. "
                f"For the text itself, give '{name}=\"{value}\"'."
            )
        try:
            variables[name] = json.loads(value)
        except (ValueError, RecursionError):
            variables[name] = value
    return variables


def say_unread(
    command: str, tokenizer: Tokenizer, template: str | None, variables: Mapping[str, Any]
) -> None:
    """Says on stderr which variables the chat template does not read.

    Args:
        command: the subcommand, which the line begins with.
        tokenizer: the model's.
        template: which template is asked for.
        variables: those given.
    """
    from ffjax.chat_template import GIVEN_NAMES

    source = getattr(tokenizer, "chat_templates", {}).get(template or "default")
    for name in variables:
        if name in GIVEN_NAMES:
            continue  # refused in a sentence of its own, when the conversation is written
        if source is not None and not re.search(rf"\b{name}\b", source.text):
            print(f"ffjax {command}: The chat template reads no variable {name}.", file=sys.stderr)
