"""The token ids of a conversation, by the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ffjax.tokenizer import Tokenizer

__all__ = ["conversation_tokens"]


def conversation_tokens(tokenizer: Tokenizer, messages: Sequence[Any], **how: Any) -> list[int]:
    """The token ids of a conversation, up to where the model is to write.

    Args:
        tokenizer: the model's.
        messages: each with "role" ("user", "assistant", often "system") and "content".
        how: what `HFTokenizer.chat` takes: tools, template, documents, variables,
            continue_final_message.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses the messages.
        TypeError: the messages are no sequence of objects.
    """
    from ffjax.hf_tokenizer import HFTokenizer

    if not isinstance(tokenizer, HFTokenizer):
        raise ValueError(
            "A conversation needs a chat template, and this model's tokens are bytes: it was not "
            "trained on conversations. Give it a text to continue."
        )
    if isinstance(messages, str):
        raise TypeError(
            "A conversation is a list of messages, each with role and content; got a text. For a "
            'first message, [{"role": "user", "content": text}].'
        )
    tokens = tokenizer.chat(messages, **how)
    if not tokens:
        raise ValueError("The chat template writes nothing for these messages. Give at least one.")
    return tokens
