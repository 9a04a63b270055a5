"""The commands of a chat: /help and the others."""

from __future__ import annotations

import dataclasses
import difflib
import glob
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffjax.terminal.saved import read_messages, write_messages
from ffjax.terminal.settings import changed, described

if TYPE_CHECKING:
    from ffjax.terminal.chat import Chat

__all__ = ["complete", "run"]

_KEYS = '''A line is a message. One that ends with \\ goes on in the next line; lines between """ \
and """ are one message. Ctrl-C stops an answer, Ctrl-D leaves.'''
_OVERWRITE = "--overwrite"
_NO_SYSTEM = "none"


@dataclasses.dataclass(frozen=True)
class _Command:
    """A command.

    Attributes:
        takes: what follows its name, for the help.
        does: a line about it.
        run: is given the chat and what follows the name; returns whether the chat goes on.
        needs_text: whether something must follow.
        takes_text: whether something may.
    """

    takes: str
    does: str
    run: Callable[[Chat, str], bool]
    needs_text: bool = False
    takes_text: bool = True


def run(chat: Chat, name: str, rest: str) -> bool:
    """Runs a command, and returns whether the chat goes on.

    Args:
        chat: the chat.
        name: of the command, without its slash.
        rest: what follows it.

    Raises:
        ValueError: there is no such command, or it cannot do that.
        OSError: a file cannot be read or written.
    """
    name = _ALSO.get(name, name)
    command = _COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, _COMMANDS, n=1)
        meant = f"Is /{near[0]} meant?" if near else "/help lists them."
        raise ValueError(
            f"There is no command /{name}. {meant} A message that begins so is typed with a "
            "space before it."
        )
    if command.needs_text and not rest:
        raise ValueError(f"It is /{name} {command.takes}: {command.does}.")
    if rest and not command.takes_text:
        raise ValueError(f"/{name} stands alone; got {rest!r} after it.")
    return command.run(chat, rest)


def complete(line: str, settings: Sequence[str]) -> list[str]:
    """What the last word of a line may be made: a command, a setting or a file.

    Args:
        line: up to the cursor.
        settings: their names.
    """
    head, space, word = line.rpartition(" ")
    if not space:
        known = [f"/{name} " for name in _COMMANDS]
        return [one for one in known if one.startswith(word)] if word.startswith("/") else []
    command = head.split()[0] if head.strip() else ""
    if command == "/set" and head.strip() == command:
        return [f"{one} " for one in settings if one.startswith(word)]
    if command in ("/save", "/load"):
        found = sorted(glob.glob(glob.escape(os.path.expanduser(word)) + "*"))
        return [one + ("/" if os.path.isdir(one) else "") for one in found]
    return []


def _help(chat: Chat, rest: str) -> bool:
    lines = [
        f"/{name}{f' {one.takes}' if one.takes else ''}: {one.does}."
        for name, one in _COMMANDS.items()
    ]
    chat.screen.note("\n".join([*lines, _KEYS]), indent="    ")
    return True


def _reset(chat: Chat, rest: str) -> bool:
    kept = "" if chat.conversation.system is None else ", except for the system message"
    chat.conversation.reset()
    chat.screen.note(f"All that was said is forgotten{kept}.")
    return True


def _system(chat: Chat, rest: str) -> bool:
    conversation = chat.conversation
    if not rest:
        has = conversation.system
        chat.screen.note("There is no system message." if has is None else has)
    elif rest.lower() == _NO_SYSTEM:
        conversation.system = None
        chat.screen.note("There is no system message any more.")
    else:
        conversation.system = rest
        chat.screen.note("The system message is set; it holds from the next answer on.")
    return True


def _save(chat: Chat, rest: str) -> bool:
    replaces = rest.split()[0] == _OVERWRITE
    name = rest.removeprefix(_OVERWRITE).strip() if replaces else rest
    if not name:
        raise ValueError(f"It is /save {_OVERWRITE} FILE: the file's name is missing.")
    file = _path(name)
    messages = chat.conversation.messages
    if not messages:
        raise ValueError("There is nothing to save yet.")
    write_messages(file, messages, replace=replaces or file in chat.files)
    chat.files.add(file)
    chat.screen.note(f"Saved {_count(messages)} in {file}.")
    return True


def _load(chat: Chat, rest: str) -> bool:
    file = _path(rest)
    messages = read_messages(file)
    chat.conversation.messages = messages
    chat.files.add(file)
    waits = " The last one has no answer: /retry." if chat.conversation.waits_for_an_answer else ""
    chat.screen.note(f"Loaded {_count(messages)} of {file}.{waits}")
    return True


def _retry(chat: Chat, rest: str) -> bool:
    chat.again()
    return True


def _undo(chat: Chat, rest: str) -> bool:
    text = chat.conversation.take_back()
    if text is None:
        raise ValueError("There is nothing to take back.")
    short = " ".join(text.split())
    short = short if len(short) <= 40 else f"{short[:40]}..."
    chat.screen.note(f"Taken back, with its answer: {short}")
    return True


def _set(chat: Chat, rest: str) -> bool:
    if not rest:
        chat.screen.note(described(chat.sampling))
        return True
    chat.sampling, said = changed(chat.sampling, rest)
    chat.screen.note(said)
    return True


def _quit(chat: Chat, rest: str) -> bool:
    return False


_COMMANDS = {
    "help": _Command("", "lists the commands", _help),
    "reset": _Command("", "forgets the conversation", _reset, takes_text=False),
    "system": _Command(
        "[TEXT]", f"shows the system message, or sets it; {_NO_SYSTEM} removes it", _system
    ),
    "retry": _Command("", "answers the last message again", _retry, takes_text=False),
    "undo": _Command("", "takes back the last message and its answer", _undo, takes_text=False),
    "set": _Command(
        "[NAME VALUE]",
        "shows how answers are drawn, or changes it, as in /set temperature 0.7",
        _set,
    ),
    "save": _Command("FILE", "saves the messages as JSON", _save, needs_text=True),
    "load": _Command("FILE", "goes on with messages that were saved", _load, needs_text=True),
    "quit": _Command("", "leaves, as Ctrl-D does", _quit, takes_text=False),
}
_ALSO = {"?": "help", "h": "help", "exit": "quit", "bye": "quit", "q": "quit", "new": "reset"}


def _path(text: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(text)))


def _count(messages: Sequence[Any]) -> str:
    return f"{len(messages)} message{'' if len(messages) == 1 else 's'}"
