"""Which tokens a Hugging Face folder adds to those of its `tokenizer.json`, and what each is for.

Four files name tokens, and they need not agree. Which one wins is as in transformers 5.24;
docs/tokenizers.md has the table.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken

__all__ = ["SETTINGS", "Tokens", "eot_ids", "json_object", "read_tokens"]

SETTINGS = "tokenizer_config.json"
_MAP, _ADDED = "special_tokens_map.json", "added_tokens.json"

# In the order in which tokens that the vocabulary lacks are given ids.
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"

# Roles that a tokenizer's class fills where no file does.
_CLASS_ROLES: dict[str, dict[str, str]] = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}
# The class of a model's tokenizer, by its model_type; "": the one without defaults.
_MODEL_CLASS = {
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("qwen2", "qwen3"), "Qwen2Tokenizer"),
    **dict.fromkeys(("granite", "mistral", "olmo2"), ""),
}

_FIELDS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What the files beside `tokenizer.json` say of tokens.

    Attributes:
        roles: the texts of special tokens by role, as in "bos_token".
        added: tokens to add to the tokenizer, in this order. Those that it knows already keep
            their ids, and may become special.
        anew: whether they take the place of the added tokens of `tokenizer.json`. Some classes
            of transformers take the vocabulary of that file alone.
    """

    roles: dict[str, str]
    added: list[AddedToken]
    anew: bool


def json_object(file: Path) -> dict[str, Any]:
    """The file's object; empty if there is no such file.

    Raises:
        ValueError: the file is not JSON, or holds no object.
    """
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: it is not JSON ({error}). Copy it again.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds no object, as it should. Copy it again.")
    return data


def eot_ids(directory: Path, rows: int | None = None) -> list[int]:
    """The tokens that end a text, from the first file that names one; empty if none does.

    Args:
        directory: the folder.
        rows: how many tokens the model knows. It never says another: those are left out, and so
            are negative ones, by which some files mean that there is none. None: any.

    Raises:
        ValueError: a file is damaged, or names what is no token id.
    """
    for name in ("generation_config.json", "config.json"):
        data = json_object(directory / name)
        # A model within another has its fields in a table of its own.
        inner = data.get("text_config")
        inner = inner if isinstance(inner, dict) else {}
        value = data.get("eos_token_id", inner.get("eos_token_id"))
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(one, bool) or not isinstance(one, int) for one in ids):
            raise ValueError(
                f"eos_token_id is a token id or a list of them; {directory / name} has {value!r}. "
                "Give the number that the tokenizer has for it."
            )
        if ids := [one for one in ids if one >= 0 and (rows is None or one < rows)]:
            return ids
    return []


def read_tokens(directory: Path, own: Mapping[int, AddedToken], *, byte_level: bool) -> Tokens:
    """The tokens that the files beside `tokenizer.json` name.

    Args:
        directory: the folder; every file may be absent.
        own: the added tokens of `tokenizer.json`, by id.
        byte_level: whether its vocabulary is of bytes.

    Raises:
        ValueError: a file is damaged, or names what is no token.
    """
    from tokenizers import AddedToken

    said = _Said.read(directory, own)
    name = _class_name(directory, said.settings.get("tokenizer_class"), byte_level=byte_level)
    roles: dict[str, AddedToken | str] = {}
    defaults = _CLASS_ROLES.get(name, {})
    for role in _ROLES:
        # A file that says null says that there is none.
        value = said.values.get(role, defaults.get(role))
        if value is not None:
            token = _token(value, directory / said.source.get(role, SETTINGS), role)
            roles[role] = said.known.get(_text(token), token)
    others = {key: value for key, value in said.values.items() if _is_role(key, value)}
    for role, value in {**others, **said.named}.items():
        roles[role] = _token(value, directory / SETTINGS, role)
    extra = [_token(value, directory / SETTINGS, _EXTRA) for value in said.extra]

    added: list[AddedToken | str] = [said.decoder[i] for i in sorted(said.decoder)]
    anew = name in _CLASS_ROLES and _differ(own, said.decoder)
    present = {_text(token) for token in added}
    present |= set() if anew else {token.content for token in own.values()}
    for token in (*roles.values(), *extra):
        # Of two that differ in more than their text, the second changes the first.
        if _text(token) not in present and token not in added:
            added.append(token)
    role_texts = {_text(token) for token in roles.values()} - {""}
    tokens = [_flagged(token, role_texts) for token in added]
    if name == "Qwen2Tokenizer":  # which has all of them special, whatever the files say
        named = dict.fromkeys(_text(token) for token in (*roles.values(), *extra))
        tokens += [AddedToken(text, special=True) for text in named]
    return Tokens({role: _text(token) for role, token in roles.items()}, tokens, anew)


@dataclasses.dataclass
class _Said:
    """What the files say, as they say it, of two the one that wins.

    Attributes:
        settings: `tokenizer_config.json`.
        values: fields by name, among them roles.
        source: the file of a field, where it is not the settings.
        named: special tokens with a name of their own.
        extra: special tokens without a role.
        decoder: added tokens by id.
        known: those that have been said in full, by text.
    """

    settings: dict[str, Any]
    values: dict[str, Any]
    source: dict[str, str]
    named: dict[str, Any]
    extra: list[Any]
    decoder: dict[int, AddedToken]
    known: dict[str, AddedToken]

    @classmethod
    def read(cls, directory: Path, own: Mapping[int, AddedToken]) -> _Said:
        settings = json_object(directory / SETTINGS)
        values, source = dict(settings), {}
        if _OLD_EXTRA in values and not values.get(_EXTRA):
            values[_EXTRA] = values.pop(_OLD_EXTRA)
        named = {
            key: values.pop(key)
            for key, value in list(values.items())
            if _is_role(key, value) and isinstance(value, str)
        }
        if isinstance(values.get(_EXTRA), dict):
            named |= values.pop(_EXTRA)
        decoder: dict[int, AddedToken] = {}
        if "added_tokens_decoder" in values:
            decoder = _decoder(values["added_tokens_decoder"], directory / SETTINGS)
        else:  # files of the older format
            for key, value in json_object(directory / _MAP).items():
                if key == _EXTRA and isinstance(value, list):
                    before = values.get(key)
                    before = list(before) if isinstance(before, list) else []
                    value = before + [one for one in value if one not in before]
                values[key], source[key] = value, _MAP
            if isinstance(values.get(_EXTRA), dict):
                named |= values.pop(_EXTRA)
            special = _special_texts(values, source)
            decoder = _older(directory / _ADDED, special) | dict(own)
        if _EXTRA not in values:
            values[_EXTRA] = values.get(_OLD_EXTRA)
        extra = values[_EXTRA] if values[_EXTRA] is not None else []
        if not isinstance(extra, list):
            raise ValueError(
                f"{_EXTRA} is a list of tokens, or an object of them by name; "
                f"{directory / source.get(_EXTRA, SETTINGS)} has {extra!r}. Copy the file again."
            )
        known = {token.content: token for token in decoder.values()}
        return cls(settings, values, source, named, extra, decoder, known)


def _is_role(key: str, value: Any) -> bool:
    """Whether a field is a special token with a name of its own."""
    text = value.get("content") if isinstance(value, dict) else value
    return key.endswith("_token") and key not in _ROLES and isinstance(text, str)


def _decoder(entries: Any, file: Path) -> dict[int, AddedToken]:
    """The tokens of `added_tokens_decoder`, by id."""
    if not isinstance(entries, dict):
        raise ValueError(
            f"added_tokens_decoder is an object of tokens by id; {file} has {entries!r}. Copy the "
            "file again."
        )
    tokens = {}
    for index, entry in entries.items():
        token = _token(entry, file, f"added_tokens_decoder[{index!r}]")
        if isinstance(token, str) or not index.isdecimal():
            raise ValueError(
                "added_tokens_decoder has objects with a content by token id; "
                f"{file} has {entry!r} by {index!r}. Copy the file again."
            )
        tokens[int(index)] = token
    return tokens


def _special_texts(values: dict[str, Any], source: dict[str, str]) -> set[str]:
    """What makes a token of `added_tokens.json` special.

    That is a role or a list that names it as a text; or, in `special_tokens_map.json`, as an
    object.
    """
    special = set()
    for key in (*_ROLES, _EXTRA):
        value = values.get(key)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict) and source.get(key) == _MAP:
                one = one.get("content")
            if isinstance(one, str):
                special.add(one)
    return special


def _older(file: Path, special: set[str]) -> dict[int, AddedToken]:
    """The tokens of `added_tokens.json`, by id."""
    from tokenizers import AddedToken

    tokens = {}
    for text, index in json_object(file).items():
        if isinstance(index, bool) or not isinstance(index, int):
            raise ValueError(
                f"{file.name} has a token id for each text; in {file} {text!r} has {index!r}. "
                "Copy the file again."
            )
        tokens[index] = AddedToken(text, normalized=text not in special, special=text in special)
    return tokens


def _token(value: Any, file: Path, what: str) -> AddedToken | str:
    """A token as a file says it: its text, or an object with its "content"."""
    from tokenizers import AddedToken

    if isinstance(value, str | AddedToken):
        return value
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {name: bool(value[name]) for name in _FIELDS if name in value}
        if what == _EXTRA:
            flags.setdefault("special", True)
        if what in _ROLES and file.name == _MAP:
            flags["special"] = True
        return AddedToken(value["content"], **flags)
    raise ValueError(
        f"A token is a text, or an object with its content; {what} in {file} is {value!r}. "
        "Correct it, or copy the file again."
    )


def _differ(some: Mapping[int, AddedToken], others: Mapping[int, AddedToken]) -> bool:
    def shown(tokens: Mapping[int, AddedToken]) -> dict[int, tuple[Any, ...]]:
        fields = ("content", *_FIELDS)
        return {i: tuple(getattr(token, one) for one in fields) for i, token in tokens.items()}

    return shown(some) != shown(others)


def _text(token: AddedToken | str) -> str:
    return token if isinstance(token, str) else token.content


def _flagged(token: AddedToken | str, roles: Iterable[str]) -> AddedToken:
    """The token, special if it has a role or is nothing but a text."""
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=True)
    if token.special or token.content not in roles:
        return token
    flags = {name: getattr(token, name) for name in _FIELDS}
    return AddedToken(token.content, **{**flags, "special": True})


def _class_name(directory: Path, stated: Any, *, byte_level: bool) -> str:
    """The class that transformers would make; "" for the one without defaults."""
    config = json_object(directory / "config.json")
    model_type = config.get("model_type")
    stated = stated or config.get("tokenizer_class")
    name = stated.removesuffix("Fast") if isinstance(stated, str) else None
    registered = _MODEL_CLASS.get(model_type) if isinstance(model_type, str) else None
    if name == "LlamaTokenizer" and byte_level and model_type not in ("mistral", "qwen2"):
        return ""  # files of Llama 3 have that name, and are none
    if name is None or registered is None:
        return name if name is not None else registered or ""
    if name == registered or registered == "":
        return registered
    return registered if model_type == "qwen2" else name
