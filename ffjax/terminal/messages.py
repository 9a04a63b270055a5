'''What a person types becomes messages: one line, several, or a command.

A line that ends with a backslash goes on in the next one. Lines between """ and """ are one
message. A line that begins with a slash and a word, and no second slash, is a command.
'''

from __future__ import annotations

import re

from ffjax.terminal.lines import Lines

__all__ = ["command_of", "read_message"]

_FIRST, _NEXT = "> ", ". "
_QUOTES = '"""'
_COMMAND = re.compile(r"/(\w+|\?)(?:\s+(.*))?", re.DOTALL)


def read_message(lines: Lines) -> str:
    """The next message, of one line or several; it may be empty.

    Raises:
        EOFError: there is no further line. Where the lines end within a message, that is returned.
        KeyboardInterrupt: Ctrl-C was typed; what the message had so far is dropped.
    """
    line = lines.read(_FIRST)
    if line.lstrip().startswith(_QUOTES):
        return _block(line.lstrip().removeprefix(_QUOTES), lines)
    whole: list[str] = []
    while _goes_on(line):
        whole.append(line[:-1])
        try:
            line = lines.read(_NEXT)
        except EOFError:
            return "\n".join(whole)
    return "\n".join([*whole, line])


def command_of(text: str) -> tuple[str, str] | None:
    """The name and the rest of a command, as ("save", "a.json"); None for a message."""
    found = _COMMAND.fullmatch(text.rstrip())
    return None if found is None else (found[1].lower(), (found[2] or "").strip())


def _goes_on(line: str) -> bool:
    """Whether a line ends with a backslash; two stand for themselves."""
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


def _block(line: str, lines: Lines) -> str:
    whole: list[str] = []
    while not line.rstrip().endswith(_QUOTES):
        whole.append(line)
        try:
            line = lines.read(_NEXT)
        except EOFError:
            return "\n".join(whole).strip("\n")
    return "\n".join([*whole, line.rstrip().removesuffix(_QUOTES)]).strip("\n")
