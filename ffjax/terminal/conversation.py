"""A conversation: its messages, and what can be done with them."""

from __future__ import annotations

from collections.abc import Iterable

from ffjax.terminal.partner import Message

__all__ = ["Conversation"]

_SYSTEM, _USER, _ASSISTANT = "system", "user", "assistant"


class Conversation:
    """Messages of a user and an assistant, by turns, after the system's, if there is one.

    Attributes:
        messages: as a chat template takes them.
    """

    def __init__(self, messages: Iterable[Message] = ()):
        self.messages: list[Message] = list(messages)

    @property
    def system(self) -> str | None:
        """The system message's text; None where there is none."""
        first = self.messages[0] if self.messages else None
        return first["content"] if first is not None and first["role"] == _SYSTEM else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages[0 if self.system is None else 1 :]
        self.messages = [*([] if text is None else [_message(_SYSTEM, text)]), *rest]

    @property
    def waits_for_an_answer(self) -> bool:
        """Whether the user has the last word."""
        return bool(self.messages) and self.messages[-1]["role"] == _USER

    def ask(self, text: str) -> None:
        """The user says something."""
        self.messages.append(_message(_USER, text))

    def answer(self, text: str) -> None:
        """The assistant says something."""
        self.messages.append(_message(_ASSISTANT, text))

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.messages = self.messages[: 0 if self.system is None else 1]

    def take_back_answer(self) -> Message | None:
        """Removes the assistant's last word and returns it; None where it has none."""
        if self.messages and self.messages[-1]["role"] == _ASSISTANT:
            return self.messages.pop()
        return None

    def take_back(self) -> str | None:
        """Removes what the user said last, and all that followed; None where there is nothing."""
        for at in reversed(range(len(self.messages))):
            if self.messages[at]["role"] == _USER:
                text = self.messages[at]["content"]
                del self.messages[at:]
                return text
        return None


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": text}
