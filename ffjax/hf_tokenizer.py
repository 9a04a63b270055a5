"""A Hugging Face tokenizer behind our protocol, and its chat template.

Needs the extra `hf`: the packages tokenizers and jinja2.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as RustTokenizer

__all__ = ["HFStreamDecoder", "HFTokenizer"]

_TOKENIZER, _SETTINGS = "tokenizer.json", "tokenizer_config.json"

_REPLACEMENT = "\ufffd"  # what decoding puts where bytes are not, or not yet, a character


class HFTokenizer:
    """Text to token ids and back as `tokenizer.json` says.

    Attributes:
        eot_ids: the tokens that end a text.
        special_tokens: their texts by role, as in "bos_token".
        chat_template: a Jinja template, or None.
    """

    def __init__(
        self,
        tokenizer: RustTokenizer,
        *,
        eot_ids: Sequence[int],
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
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
        self.chat_template = chat_template

    @classmethod
    def read(cls, directory: str | Path) -> HFTokenizer:
        """Reads the tokenizer of a Hugging Face folder.

        Which tokens end a text is taken from `generation_config.json`, else `config.json`,
        else from the `eos_token` of `tokenizer_config.json`.

        Args:
            directory: a folder with `tokenizer.json`; the other files may be absent.

        Raises:
            FileNotFoundError: there is no `tokenizer.json`.
            ValueError: a file is damaged, or none names a token that ends a text.
            NotImplementedError: the package tokenizers is not installed.
        """
        directory = Path(directory)
        file = directory / _TOKENIZER
        if not file.is_file():
            raise FileNotFoundError(
                f"A tokenizer is read from {_TOKENIZER}; {directory} has none. Make one of an "
                "older format (tokenizer.model, vocab.json) with transformers' AutoTokenizer and "
                "its save_pretrained."
            )
        try:
            from tokenizers import Tokenizer as RustTokenizer
        except ImportError as error:
            raise NotImplementedError(_needs("tokenizers", f"Reading {_TOKENIZER}")) from error
        try:
            tokenizer = RustTokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(
                f"{file} is damaged: the tokenizers library cannot read it ({error}). "
                "Download or copy it again."
            ) from None
        # Settings of training batches, which some files keep.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        settings = _json(directory / _SETTINGS)
        special = _special_tokens(settings)
        ids = _eot_ids(directory)
        if not ids and (end := tokenizer.token_to_id(special.get("eos_token", ""))) is not None:
            ids = [end]
        if not ids:
            raise ValueError(
                f"No file in {directory} names a token that ends a text: give eos_token_id in "
                "generation_config.json."
            )
        return cls(
            tokenizer,
            eot_ids=ids,
            special_tokens=special,
            chat_template=_chat_template(directory, settings),
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

        What it puts behind the text is left out. Special tokens that the text itself spells are
        its own.

        Raises:
            ValueError: the text holds a lone surrogate, which UTF-8 cannot express.
            TypeError: the text is no string.
        """
        encoding = self._encode(text, special=True)
        added = list(encoding.special_tokens_mask)  # 1 for those that were put around the text
        own = [token for token, extra in zip(encoding.ids, added, strict=True) if not extra]
        if not own:  # then before and behind are not told apart
            return [], []
        return encoding.ids[: added.index(0)], own

    def chat(self, messages: Sequence[Mapping[str, Any]], *, reply: bool = True) -> list[int]:
        """The token ids of a conversation, as the chat template writes it.

        Args:
            messages: each with "role" ("user", "assistant", often "system") and "content".
            reply: whether the template is to open the assistant's next message.

        Raises:
            ValueError: there is no chat template, or it refuses the messages or is broken.
            NotImplementedError: the package jinja2 is not installed.
        """
        # The template writes BOS itself where there is to be one.
        return self._encode(self.render(messages, reply=reply), special=False).ids

    def render(self, messages: Sequence[Mapping[str, Any]], *, reply: bool = True) -> str:
        """The text of a conversation, as the chat template writes it; see `chat`."""
        if self.chat_template is None:
            raise ValueError(
                "A conversation needs a chat template, and this tokenizer has none: its model "
                "was probably not trained on conversations. Give it a text to continue."
            )
        return _render(
            self.chat_template,
            **self.special_tokens,
            messages=[dict(message) for message in messages],
            add_generation_prompt=reply,
            tools=None,
            documents=None,
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids. Special tokens have none, nor has a padded vocabulary's end.

        Raises:
            ValueError: an id is negative.
        """
        ids = [int(token) for token in tokens]
        if ids and min(ids) < 0:
            raise ValueError(f"A tokenizer's ids are 0 to {self.vocab_size - 1}, got {min(ids)}.")
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def stream(self) -> HFStreamDecoder:
        """A fresh decoder for tokens that come one by one."""
        return HFStreamDecoder(self)

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


class HFStreamDecoder:
    """Decodes one text token by token, holding back a character until it is whole.

    A token's text depends on those before it: the first word of a text may lose its space, a
    character may be cut into several tokens. So each time the last few tokens are decoded
    together, with and without the new one, and the difference is what it adds.

    What `push` and `finish` return is, joined, what `decode` returns for all the tokens, as long
    as they are UTF-8. Where bytes are not, both have U+FFFD for them; a vocabulary whose rare
    characters are single bytes ("<0xE2>") has it, in `decode` alone, for their neighbours too.
    """

    def __init__(self, tokenizer: HFTokenizer):
        """Starts at the beginning of a text."""
        self._decode = tokenizer.decode
        self._shown: list[int] = []  # the tokens of the last piece, as context
        self._held: list[int] = []  # the tokens not shown yet

    def push(self, token: int) -> str:
        """The characters that this token completes; empty while one is still cut in two.

        Raises:
            ValueError: the id is negative.
        """
        self._held.append(int(token))
        return self._take(at_end=False)

    def finish(self) -> str:
        """What a text cut off inside a character leaves: U+FFFD for it, or nothing."""
        return self._take(at_end=True)

    def _take(self, *, at_end: bool) -> str:
        before = self._decode(self._shown)
        now = self._decode(self._shown + self._held)
        if not now.startswith(before):
            # Bytes that are not UTF-8 have changed what their neighbours say.
            before, now = "", self._decode(self._held)
        if not at_end and (now.endswith(_REPLACEMENT) or len(now) <= len(before)):
            return ""
        self._shown, self._held = self._held or self._shown, []
        return now[len(before) :]


def _needs(package: str, what: str) -> str:
    return f"{what} needs the package {package}. Install it with: pip install 'ffjax[hf]'."


def _json(file: Path) -> dict[str, Any]:
    """The file's object; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: it is not JSON ({error}). Copy it again.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds no object, as it should. Copy it again.")
    return data


def _eot_ids(directory: Path) -> list[int]:
    """The tokens that end a text, from the first file that names one."""
    for name in ("generation_config.json", "config.json"):
        data = _json(directory / name)
        # A model within another has its fields in a table of its own.
        ids = data.get("eos_token_id", data.get("text_config", {}).get("eos_token_id"))
        if ids is not None:
            return [int(token) for token in (ids if isinstance(ids, list) else [ids])]
    return []


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The texts of special tokens by role: plain, or a table with their "content"."""
    tokens = {}
    for role, token in settings.items():
        if role.endswith("_token"):
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                tokens[role] = token
    return tokens


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """The template: in a file of its own, or in the settings; of several, the default one."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _json(directory / "chat_template.json").get(
        "chat_template", settings.get("chat_template")
    )
    if isinstance(template, list):  # [{"name": "default", "template": ...}, {"name": "tool_use"
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _render(template: str, **values: Any) -> str:
    """The template filled in, in a sandbox: it came with a download."""
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise NotImplementedError(_needs("jinja2", "A chat template")) from error

    class Generation(Extension):
        """Marks what the assistant says, for training; here it says just that."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja wants it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        # Jinja's own would write < and > as a web page needs them.
        return json.dumps(value, ensure_ascii=False, indent=indent)

    # As transformers sets it up (utils/chat_template_utils.py): templates are written for that.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(**values)
    except jinja2.TemplateError as error:
        raise ValueError(
            f"The chat template cannot write this conversation: {str(error).rstrip('.')}."
        ) from error
