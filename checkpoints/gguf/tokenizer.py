"""The tokenizer of a GGUF file as the files of a Hugging Face folder."""

from __future__ import annotations

from typing import Any

from checkpoints.gguf.byte_level import byte_level
from checkpoints.gguf.header import Header
from checkpoints.gguf.metadata import Metadata
from checkpoints.gguf.sentencepiece import pieces
from checkpoints.gguf.vocabulary import START, Vocabulary, added_tokens, read_vocabulary

__all__ = ["generation_json", "tokenizer_files"]

_MODELS = {"gpt2": byte_level, "llama": pieces}

_TEMPLATE, _TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"

# How the model's makers want tokens chosen: our names for fields of the file.
_SAMPLING = {
    "temperature": ("temp", "float"),
    "top_k": ("top_k", "int"),
    "top_p": ("top_p", "float"),
    "min_p": ("min_p", "float"),
    "repetition_penalty": ("penalty_repeat", "float"),
}


def tokenizer_files(header: Header) -> dict[str, dict[str, Any]]:
    """What the files of the same tokenizer hold in a Hugging Face folder, by their names.

    The keys are tokenizer.json, tokenizer_config.json and generation_config.json.

    Args:
        header: of the file.

    Raises:
        CheckpointError: the file has no tokenizer, a damaged one, or one of a kind that is not
            supported.
    """
    metadata = Metadata(header)
    kind = metadata.text(f"{START}model")
    if kind not in _MODELS:
        raise metadata.unsupported(f"{START}model", kind, *_MODELS)
    vocabulary = read_vocabulary(metadata)
    parts, bos = _MODELS[kind](metadata, vocabulary)
    swallow = kind == "llama" and metadata.get("general.architecture") == "phi3"
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(vocabulary, swallow),
        **parts,
        "post_processor": _around(metadata, vocabulary, bos),
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **vocabulary.roles}
    if (templates := _templates(metadata)) is not None:
        settings["chat_template"] = templates
    return {
        "tokenizer.json": data,
        "tokenizer_config.json": settings,
        "generation_config.json": {"eos_token_id": vocabulary.ends, **generation_json(header)},
    }


def generation_json(header: Header) -> dict[str, Any]:
    """How tokens are chosen, as in generation_config.json; empty where the file does not say.

    Args:
        header: of the file.

    Raises:
        CheckpointError: a field is no number.
    """
    metadata = Metadata(header)
    said = {
        name: metadata.number(f"general.sampling.{theirs}", kind)
        for name, (theirs, kind) in _SAMPLING.items()
        if metadata.get(f"general.sampling.{theirs}")
    }
    return {"do_sample": True, **said} if said else {}


def _around(metadata: Metadata, vocabulary: Vocabulary, bos: bool) -> dict[str, Any] | None:
    """What is put before and after a text."""
    roles = vocabulary.roles
    first = roles["bos_token"] if metadata.flag(f"{START}add_bos_token", bos) else None
    last = roles["eos_token"] if metadata.flag(f"{START}add_eos_token", False) else None
    if first is None and last is None:
        return None

    def one(text: str, of: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": text, "type_id": of}}

    def around(name: str, of: int) -> list[dict[str, Any]]:
        return [
            *([one(first, of)] if first is not None else []),
            {"Sequence": {"id": name, "type_id": of}},
            *([one(last, of)] if last is not None else []),
        ]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            text: {"id": text, "ids": [vocabulary.ids[text]], "tokens": [text]}
            for text in (first, last)
            if text is not None
        },
    }


def _templates(metadata: Metadata) -> str | list[dict[str, str]] | None:
    """The chat template, or several with their names."""
    default = metadata.text(_TEMPLATE)
    names = metadata.get(_TEMPLATES) or []
    named = [
        {"name": name, "template": text}
        for name in names
        if (text := metadata.text(f"{_TEMPLATE}.{name}")) is not None
    ]
    if not named:
        return default
    return [*([{"name": "default", "template": default}] if default else []), *named]
