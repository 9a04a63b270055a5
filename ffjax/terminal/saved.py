"""Conversations in files: a JSON array of messages, as every chat endpoint takes it."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ffjax.terminal.partner import Message

__all__ = ["read_messages", "write_messages"]

_ROLES = ("system", "user", "assistant")


def write_messages(file: Path, messages: Sequence[Message], *, replace: bool) -> None:
    """Writes a conversation; the file is whole or not there, whatever stops this.

    Args:
        file: where to.
        messages: the conversation.
        replace: whether a file that is there may be replaced.

    Raises:
        FileExistsError: there is something, and it may not be replaced.
        OSError: it cannot be written.
    """
    if file.is_dir():
        raise IsADirectoryError(f"A conversation is saved in a file; {file} is a folder.")
    if file.exists() and not replace:
        raise FileExistsError(
            f"{file} is there already. Give another name, or /save --overwrite {file}."
        )
    text = json.dumps(list(messages), ensure_ascii=False, indent=2) + "\n"
    try:
        number, partial = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(file)) from None
    try:
        with open(number, "w", encoding="utf-8") as out:
            out.write(text)
        os.chmod(partial, file.stat().st_mode if file.exists() else 0o666 & ~_umask())
        os.replace(partial, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def read_messages(file: Path) -> list[Message]:
    """Reads a conversation: an array of messages, or an object that has one as "messages".

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    rule = (
        "A conversation is a JSON array of messages, each with role "
        f"({', '.join(_ROLES)}) and content, a text; "
    )
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{rule}{file} is not JSON in UTF-8.") from None
    if isinstance(data, dict):
        data = data.get("messages")
    if not isinstance(data, list):
        raise ValueError(f"{rule}{file} holds something else.")
    for number, message in enumerate(data, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in _ROLES or not isinstance(message.get("content"), str):
            raise ValueError(f"{rule}message {number} of {file} is none.")
        if role == "system" and number > 1:
            raise ValueError(f"A system message comes first; message {number} of {file} is one.")
    return [dict(message) for message in data]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
