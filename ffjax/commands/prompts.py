"""Where the prompts of a command come from: its line, a file, standard input."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from ffjax.biases import biases_of
from ffjax.sampling.params import SamplingParams

__all__ = ["Prompt", "add_prompts", "read_prompts", "read_text"]

_FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}
_OTHERS = ("prompt", "messages", "tools", "id")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to go on from, or a conversation.

    Attributes:
        where: for an error to begin with, as in "--prompt" or "line 3 of prompts.txt".
        text: the text; None where there are messages.
        messages: the conversation; None where there is a text.
        tools: what the model may call in it; None: nothing.
        options: fields of `SamplingParams` for this prompt alone.
        line: in the file of prompts; None: it comes from elsewhere.
        id: by which the file calls it; None: by nothing.
    """

    where: str
    text: str | None = None
    messages: list[Any] | None = None
    tools: list[Any] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    line: int | None = None
    id: Any = None


class _Once(argparse.Action):
    """Keeps a value, and refuses a second one, of which argparse would keep the last."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Takes the value of one option of the command line."""
        if getattr(namespace, self.dest) is not None:
            parser.error(
                f"{option_string} is given once. Many prompts stand in one file, one a line, which "
                "--prompts FILE reads."
            )
        setattr(namespace, self.dest, values)


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Adds --prompt, --prompt-file and --prompts, of which one is needed."""
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--prompt", metavar="TEXT", action=_Once, help="the text to continue")
    sources.add_argument(
        "--prompt-file",
        metavar="FILE",
        action=_Once,
        help="a file that holds the text to continue, to its last character; - reads standard "
        "input",
    )
    sources.add_argument(
        "--prompts",
        metavar="FILE",
        action=_Once,
        help="many prompts, one a line: texts, or JSON objects with prompt or messages, and with "
        "fields like temperature or seed for that one alone; - reads standard input. Results are "
        "JSON, one a line, in the same order",
    )


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts that a command line names, at least one.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text, holds no prompt, or a line of it is not what it should be.
    """
    if args.prompt is not None:
        return [Prompt("--prompt", _utf8(args.prompt))]
    if args.prompt_file is not None:
        name = "Standard input" if args.prompt_file == "-" else args.prompt_file
        return [Prompt(name, read_text(args.prompt_file))]
    name = "standard input" if args.prompts == "-" else args.prompts
    text = read_text(args.prompts)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"A file of prompts has one a line; {name} has none.")
    if text.lstrip().startswith("[") and _is_json(text):
        raise ValueError(
            f"A file of prompts has one a line; {name} is one list in JSON. Write each of its "
            "objects on a line of its own, as jq -c '.[]' does."
        )
    as_json = lines[0][1].lstrip().startswith("{")
    read = _object if as_json else _line
    return [read(line.removesuffix("\r"), number, name) for number, line in lines]


def read_text(file: str) -> str:
    """The text of a file in UTF-8, or of standard input where its name is "-".

    Raises:
        OSError: it cannot be read.
        ValueError: it is no UTF-8.
    """
    if file != "-":
        return _decoded(Path(file).read_bytes(), file)
    if sys.stdin is None:
        raise ValueError("Standard input is closed. Give a file.")
    if sys.stdin.isatty():
        print("The prompt comes from standard input; Ctrl-D ends it.", file=sys.stderr)
    return _decoded(sys.stdin.buffer.read(), "standard input")


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"A prompt is text in UTF-8; the byte at {error.start} of {name} is none. Convert it, "
            "with iconv for example."
        ) from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _utf8(prompt: str) -> str:
    """An argument, if it is text."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError(
            "--prompt is text in this terminal's encoding, and some of its bytes are not. Set "
            "PYTHONUTF8=1 or LC_ALL=C.UTF-8, or correct the text."
        ) from None
    return prompt


def _line(line: str, number: int, name: str) -> Prompt:
    return Prompt(f"Line {number} of {name}", line, line=number)


def _object(line: str, number: int, name: str) -> Prompt:
    where = f"Line {number} of {name}"
    rule = "The first line begins with {, so that each is to be a JSON object"
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{rule}; line {number} of {name} is not JSON ({error}).") from None
    if not isinstance(data, dict):
        raise ValueError(f"{rule}; line {number} of {name} is none.")
    text, messages, tools = (data.get(key) for key in ("prompt", "messages", "tools"))
    if (text is None) == (messages is None):
        raise ValueError(f"{where} has to have prompt or messages, one of the two.")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where} has a prompt that is no text.")
    for key, value in (("messages", messages), ("tools", tools)):
        if value is not None and not isinstance(value, list):
            raise ValueError(f"{where} has {key} that are no list.")
    for key in data:
        if key not in _FIELDS and key not in _OTHERS:
            known = ", ".join([*_OTHERS, *sorted(_FIELDS)])
            raise ValueError(f"{where} has a field {key!r}; there are {known}.")
    # A field that is null is as good as absent.
    options = {key: value for key, value in data.items() if key in _FIELDS and value is not None}
    if isinstance(biases := options.get("logit_bias"), dict):
        try:
            options["logit_bias"] = biases_of(biases)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return Prompt(where, text, messages, tools, options, number, data.get("id"))
