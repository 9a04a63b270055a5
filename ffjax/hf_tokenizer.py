"""A Hugging Face tokenizer behind our protocol, and its chat template.

Needs the extra `hf`: the packages tokenizers and jinja2.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffjax.chat_files import ChatTemplate, choose_template, read_templates
from ffjax.chat_template import needs, write_conversation
from ffjax.hf_stream import REPLACEMENT, HFStreamDecoder
from ffjax.hf_tokens import SETTINGS, eot_ids, json_object, read_tokens

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as RustTokenizer

__all__ = ["HFStreamDecoder", "HFTokenizer"]

_TOKENIZER = "tokenizer.json"


class HFTokenizer:
    """Text to token ids and back as `tokenizer.json` and the files beside it say.

    Attributes:
        eot_ids: the tokens that end a text.
        special_tokens: their texts by role, as in "bos_token".
        chat_templates: Jinja templates by name; there may be none.
    """

    def __init__(
        self,
        tokenizer: RustTokenizer,
        *,
        eot_ids: Sequence[int],
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, ChatTemplate] | None = None,
    ):
        """Made by `read`.

        Raises:
            ValueError: there is no token that ends a text.
        """
        if not eot_ids:
            raise ValueError("A tokenizer needs a token that ends a text; eot_ids is empty.")
        self._tokenizer = tokenizer
        self.eot_ids: tuple[int, ...] = tuple(eot_ids)
        self.special_tokens: dict[str, str] = dict(special_tokens or {})
        self.chat_templates: dict[str, ChatTemplate] = dict(chat_templates or {})

    @classmethod
    def read(cls, directory: str | Path, *, rows: int | None = None) -> HFTokenizer:
        """Reads the tokenizer of a Hugging Face folder.

        Which tokens there are beyond those of `tokenizer.json`, and which are special, is said by
        `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`. Which tokens
        end a text is taken from `generation_config.json`, else `config.json`, else it is the
        `eos_token`. See docs/tokenizers.md.

        Args:
            directory: a folder with `tokenizer.json`; the other files may be absent.
            rows: how many tokens the model knows: it cannot end a text with another. None: any.

        Raises:
            FileNotFoundError: there is no `tokenizer.json`.
            ValueError: a file is damaged, or none names a token that ends a text.
            NotImplementedError: the package tokenizers is not installed.
        """
        directory = Path(directory)
        tokenizer = _read_tokenizer(file := directory / _TOKENIZER)
        own = tokenizer.get_added_tokens_decoder()
        byte_level = "ByteLevel" in f"{tokenizer.pre_tokenizer} {tokenizer.decoder}"
        tokens = read_tokens(directory, own, byte_level=byte_level)
        if tokens.anew:
            tokenizer = _without_added(file)
        tokenizer.add_tokens(tokens.added)
        settings = json_object(directory / SETTINGS)
        tokenizer.encode_special_tokens = settings.get("split_special_tokens") is True
        ids = eot_ids(directory, rows)
        if not ids:
            end = tokenizer.token_to_id(tokens.roles.get("eos_token", ""))
            ids = [end] if end is not None and (rows is None or end < rows) else []
        if not ids:
            known = "" if rows is None else f", of the {rows} that the model knows"
            raise ValueError(
                f"No file in {directory} names a token that ends a text{known}: give "
                "eos_token_id in generation_config.json."
            )
        return cls(
            tokenizer,
            eot_ids=ids,
            special_tokens=tokens.roles,
            chat_templates=read_templates(directory, settings),
        )

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id. A model's vocabulary may be padded beyond it."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def eot_id(self) -> int:
        """The first of `eot_ids`."""
        return self.eot_ids[0]

    def encode(self, text: str) -> list[int]:
        """The text's token ids, with those that `tokenizer.json` puts around a text (BOS).

        Raises:
            ValueError: the text holds a lone surrogate, which UTF-8 cannot express.
            TypeError: the text is no string.
        """
        return self._encode(text, special=True).ids

    def split(self, text: str) -> tuple[list[int], list[int]]:
        """The token ids that `encode` puts before the text (BOS, or none), and the text's own.

        What it puts after the text is left out. Special tokens that the text itself spells are
        its own.

        Raises:
            ValueError: the text holds a lone surrogate, which UTF-8 cannot express.
            TypeError: the text is no string.
        """
        encoding = self._encode(text, special=True)
        added = list(encoding.special_tokens_mask)  # 1 for those that were put around the text
        own = [token for token, extra in zip(encoding.ids, added, strict=True) if not extra]
        if not own:  # then before and after are not told apart
            return [], []
        return encoding.ids[: added.index(0)], own

    def chat(
        self,
        messages: Sequence[Any],
        *,
        reply: bool | None = None,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool | str = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a conversation, as the chat template writes it.

        Args:
            messages: each with "role" ("user", "assistant", often "system") and "content".
            reply: whether the template is to open the assistant's next message. None: unless the
                last message is to go on.
            template: the name of one of `chat_templates`. None: "tool_use" where there are tools
                and it, else "default".
            tools: JSON schemas of functions that the model may call.
            documents: texts that it may quote, each with "title" and "text".
            continue_final_message: whether the last message is left open at its end, for the
                model to go on; or the name of the field to leave open, if not "content".
            variables: what else the template asks for, by name, as in {"enable_thinking": False};
                also special tokens by role, in place of this tokenizer's.

        Raises:
            ValueError: there is no chat template, or none of that name, or it refuses the
                messages or is broken; or arguments do not go together.
            TypeError: a message, tool or document is no object.
            NotImplementedError: the package jinja2 is not installed.
        """
        text = self.render(
            messages,
            reply=reply,
            template=template,
            tools=tools,
            documents=documents,
            continue_final_message=continue_final_message,
            variables=variables,
        )
        return self.encode_rendered(text)

    def render(
        self,
        messages: Sequence[Any],
        *,
        reply: bool | None = None,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool | str = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, as the chat template writes it; see `chat`."""
        return write_conversation(
            choose_template(self.chat_templates, template, tools=tools is not None),
            messages,
            reply=not continue_final_message if reply is None else reply,
            tools=tools,
            documents=documents,
            continue_final_message=continue_final_message,
            variables={**self.special_tokens, **(variables or {})},
        )

    def encode_rendered(self, text: str) -> list[int]:
        """The token ids of a text that `render` gave: it has BOS itself where there is to be one.

        Raises:
            ValueError: the text holds a lone surrogate, which UTF-8 cannot express.
        """
        return self._encode(text, special=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids. Special tokens have none, nor has a padded vocabulary's end.

        Raises:
            ValueError: an id is negative.
        """
        ids = [int(token) for token in tokens]
        if ids and min(ids) < 0:
            raise ValueError(f"A tokenizer's ids are 0 to {self.vocab_size - 1}, got {min(ids)}.")
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def name_of(self, token: int) -> str | None:
        """A token as the vocabulary writes it ("Ġhello", "<|im_end|>"); None: there is none."""
        return None if token < 0 else self._tokenizer.id_to_token(token)

    def stream(self) -> HFStreamDecoder:
        """A fresh decoder for tokens that come one by one."""
        return HFStreamDecoder(self.decode, is_silent=self._is_silent, byte_of=self._byte_of)

    def _encode(self, text: str, *, special: bool) -> Encoding:
        if not isinstance(text, str):
            raise TypeError(f"A tokenizer encodes a str, got {type(text).__name__}.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"UTF-8 has no lone surrogates; the text has {text[error.start]!r} at index "
                f"{error.start}. Remove it or replace it."
            ) from None
        return self._tokenizer.encode(text, add_special_tokens=special)

    def _is_silent(self, token: int) -> bool:
        """Whether decoding leaves a token out: a special one, or one that is not there."""
        if token < 0:
            return False  # which decoding refuses
        text = self._tokenizer.id_to_token(token)
        return text is None or text in self._special

    def _byte_of(self, token: int) -> int | None:
        """The byte that a token is, where rare characters are bytes ("<0xE2>"); else None."""
        if not self._has_byte_tokens:
            return None
        found = re.fullmatch("<0x([0-9A-F]{2})>", self._tokenizer.id_to_token(token) or "")
        return int(found[1], 16) if found else None

    @functools.cached_property
    def _special(self) -> frozenset[str]:
        added = self._tokenizer.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    @functools.cached_property
    def _has_byte_tokens(self) -> bool:
        token = self._tokenizer.token_to_id("<0xFF>")
        return token is not None and self._tokenizer.decode([token]) == REPLACEMENT


def _read_tokenizer(file: Path) -> RustTokenizer:
    """What `tokenizer.json` holds, without what it keeps of training batches."""
    if not file.is_file():
        raise FileNotFoundError(
            f"A tokenizer is read from {_TOKENIZER}; {file.parent} has none. Make one of an "
            "older format (tokenizer.model, vocab.json) with transformers' AutoTokenizer and "
            "its save_pretrained."
        )
    try:
        from tokenizers import Tokenizer as RustTokenizer
    except ImportError as error:
        raise NotImplementedError(needs("tokenizers", f"Reading {_TOKENIZER}")) from error
    try:
        tokenizer = RustTokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(
            f"{file} is damaged: the tokenizers library cannot read it ({error}). "
            "Download or copy it again."
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _without_added(file: Path) -> RustTokenizer:
    """The tokenizer of a file that can be read, without its added tokens."""
    from tokenizers import Tokenizer as RustTokenizer

    data = {**json_object(file), "added_tokens": [], "truncation": None, "padding": None}
    return RustTokenizer.from_str(json.dumps(data))
