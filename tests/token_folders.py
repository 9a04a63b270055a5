"""Hugging Face folders of tokens and chat templates, drawn; and what is asked of them.

`record_hf_tokens.py` asks transformers, the tests ask ffjax. Both draw the same folders from the
same seeds, so that the answers alone are kept.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

__all__ = ["CALLS", "CONVERSATIONS", "FOLDERS", "IDS", "TEXTS", "Draw", "folder", "templates"]

FOLDERS = 160
CONVERSATIONS = 120

NAMED = ["<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<mask>", "<|endoftext|>"]
MARKERS = ["<|im_start|>", "<|im_end|>", "<|tool|>", "<|eot|>", "<think>", "</think>"]
NEW = ["<|new|>", "<|begin|>", "[PAD]", "[TOOL]"]
ROLES = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "mask_token"]

TEXTS = [
    "hello world",
    "",
    "<s>hello<|tool|>world</s>",
    " a <|im_start|> b<|im_end|>c <think> d </think>",
    "[PAD]<|new|> <|begin|>[TOOL]x<image>",
    "<|eot|><bos>é<unk> <mask> <|endoftext|>",
]
# What is decoded: each list has a word between any two of some ids.
IDS = [list(range(0, 40)), [*range(240, 300)], [*range(300, 330), 9000]]
CALLS: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": True},
    {"tools": [{"name": "f", "é": [1]}], "add_generation_prompt": True},
    {"chat_template": "rag", "documents": [{"title": "t", "text": "x"}]},
    {"enable_thinking": False, "bos_token": "B"},
    {"continue_final_message": True},
]
MESSAGES = [
    {"role": "user", "content": " hello <|tool|> "},
    {"role": "assistant", "content": "it is so", "thinking": "hm", "tool_calls": None},
]


class Draw:
    """Draws that are the same in every version of Python."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def one(self, *values: Any) -> Any:
        return values[int(self._random.random() * len(values))]

    def some(self, values: list[Any], share: float) -> list[Any]:
        return [value for value in values if self.chance(share)]


# tokenizer.json


def _bytes() -> Tokenizer:
    """BPE over bytes, with a few merges."""
    pieces = [*NAMED[:4], *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell", "Ġw"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _plain() -> Tokenizer:
    tokenizer = _bytes()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def _qwen() -> Tokenizer:
    tokenizer = _bytes()
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _pieces(named: list[str], **settings: Any) -> Tokenizer:
    """BPE over characters, rare ones as bytes."""
    pieces = [*named, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"helo wrdtnabcsix"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "▁h", "lo"]))}
    merges = [("▁", "h"), ("l", "o")]
    return Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, **settings)
    )


def _gemma() -> Tokenizer:
    tokenizer = _pieces(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], unk_token="<unk>")
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _llama() -> Tokenizer:
    tokenizer = _pieces(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


# What the classes of transformers make of a vocabulary; each folder has one that its own would.
_KINDS = {
    "plain": (
        _plain,
        ["llama", "granite", "olmo2", "mistral"],
        [None, "PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast"],
    ),
    "gpt2": (_plain, ["llama", "granite"], ["GPT2Tokenizer", "GPT2TokenizerFast"]),
    "qwen": (_qwen, ["qwen2", "qwen3"], [None, "Qwen2Tokenizer", "Qwen2TokenizerFast"]),
    "gemma": (_gemma, ["gemma3_text", "gemma2"], [None, "GemmaTokenizer", "GemmaTokenizerFast"]),
    "llama": (_llama, ["llama"], ["LlamaTokenizer", "LlamaTokenizerFast"]),
}


def _flags(draw: Draw, *, special: bool) -> dict[str, bool]:
    return {
        "lstrip": draw.chance(0.2),
        "rstrip": draw.chance(0.2),
        "single_word": draw.chance(0.1),
        "normalized": draw.chance(0.3),
        "special": special,
    }


def _token(draw: Draw, text: str) -> Any:
    """A token as a role has it."""
    if draw.chance(0.7):
        return text
    return {"__type": "AddedToken", "content": text, **_flags(draw, special=draw.chance(0.6))}


def _role(draw: Draw) -> Any:
    if draw.chance(0.12):
        return draw.one(None, "")
    return _token(draw, draw.one(*NAMED, *MARKERS, *NEW))


# Templates of a folder

_CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_FOLDER_TEMPLATES = [
    _CHATML,
    "{{ bos_token }}{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% endif %}{{ messages | map(attribute='content') | join('|') }}{{ eos_token }}",
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ unk_token }}{{ pad_token }}{{ image_token }}"
    "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}",
    "{{ documents }}{{ raise_exception('no') if tools }}{{ messages[-1].reasoning_content }}"
    "{{ messages[-1].content }}",
    "{{ messages[7].content }}",
]


def _chat_template(draw: Draw) -> Any:
    text = draw.one(*_FOLDER_TEMPLATES)
    kind = draw.one("none", "text", "text", "list", "object")
    if kind == "none":
        return None
    if kind == "text":
        return text
    names = draw.some(["default", "tool_use", "rag", "x"], 0.6) or ["x"]
    named = {name: f"{name}:" + draw.one(*_FOLDER_TEMPLATES) for name in names}
    if kind == "object":
        return named
    return [{"name": name, "template": one} for name, one in named.items()]


def folder(seed: int, directory: Path) -> Path:
    """Writes the folder that a seed draws, and returns it."""
    draw = Draw(seed)
    directory.mkdir(parents=True)
    kind = draw.one("plain", "plain", "plain", "gpt2", "qwen", "gemma", "llama")
    build, model_types, classes = _KINDS[kind]
    tokenizer: Tokenizer = build()
    for text in draw.some([*NAMED, *MARKERS], 0.5):
        special = draw.chance(0.6)
        flags = _flags(draw, special=special)
        tokenizer.add_tokens([AddedToken(text, **flags)])
    own = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    named = tokenizer.get_vocab()
    if draw.chance(0.7) and (first := draw.one(*(text for text in NAMED if text in named))):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, named[first])]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    following = tokenizer.get_vocab_size()
    files: dict[str, Any] = {
        "config.json": {"model_type": draw.one(*model_types), "eos_token_id": 1}
    }

    settings: dict[str, Any] = {}
    for role in draw.some(ROLES, 0.4):
        settings[role] = _role(draw)
    if draw.chance(0.3):
        listed = draw.some([*MARKERS, *NEW], 0.3)
        settings["additional_special_tokens"] = [_token(draw, text) for text in listed]
    if draw.chance(0.3):
        listed = draw.some([*MARKERS, *NEW], 0.3)
        settings["extra_special_tokens"] = draw.one(
            [], listed, listed, {f"{i}_name": text for i, text in enumerate(listed)}
        )
    if draw.chance(0.2):
        settings["image_token"] = "<image>"
    if draw.chance(0.1):
        settings["split_special_tokens"] = True
    if draw.chance(0.4):
        # The classes that transformers makes anew know the tokens that are listed here alone.
        anew = kind in ("qwen", "gemma", "llama", "gpt2")
        listed = list(own) if anew else draw.some(list(own), 0.7)
        entries = {str(own[text]): text for text in listed}
        for text in draw.some(NEW, 0.4):
            entries[str(following + len(entries))] = text
        settings["added_tokens_decoder"] = {
            index: {"content": text, **_flags(draw, special=draw.chance(0.6))}
            for index, text in entries.items()
        }
    template = _chat_template(draw)
    if template is not None:
        settings["chat_template"] = template
    name = draw.one(*classes)
    if name is not None:
        settings["tokenizer_class"] = name
    if name is not None or draw.chance(0.7):
        files["tokenizer_config.json"] = settings

    if draw.chance(0.4):
        roles: dict[str, Any] = {}
        for role in draw.some(ROLES, 0.4):
            token = draw.one(*NAMED, *NEW)
            plain = draw.chance(0.6)
            flags = _flags(draw, special=True)
            roles[role] = token if plain else {"content": token, **flags}
        if draw.chance(0.4):
            key = draw.one("additional_special_tokens", "extra_special_tokens")
            roles[key] = draw.some([*MARKERS, *NEW], 0.3)
        files["special_tokens_map.json"] = roles
    if draw.chance(0.3):
        texts = draw.some([*NEW, *MARKERS], 0.4)
        files["added_tokens.json"] = {
            text: own.get(text, following + i) for i, text in enumerate(texts)
        }
    if draw.chance(0.15):
        files["chat_template.json"] = {"chat_template": "of a processor"}
    if draw.chance(0.2):
        files["chat_template.jinja"] = "file:" + draw.one(*_FOLDER_TEMPLATES)
    if draw.chance(0.2):
        for name in draw.some(["default", "tool_use", "rag"], 0.6):
            text = f"{name} file:" + draw.one(*_FOLDER_TEMPLATES)
            files[f"additional_chat_templates/{name}.jinja"] = text
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


# Templates by themselves

_PARTS = [
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n"
    "{% endfor %}\n",
    "{%- for m in messages -%} {{ m.role }}: {{ m.content | trim }} {%- endfor -%}",
    "{{ messages | tojson }}",
    "{{ messages[0] | tojson(indent=2) }}",
    "{{ {'é': '<&>', 'a': 1} | tojson(ensure_ascii=true, sort_keys=true) }}",
    "{{ [1, {'b': none}] | tojson(separators=(',', ':')) }}",
    "{{ tools | tojson(indent=4) if tools else 'no tools' }}",
    "{{ documents | map(attribute='title') | list if documents else documents }}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}"
    "{% endfor %}",
    "{% for m in messages %}{% if m.role != 'user' %}{% continue %}{% endif %}{{ m.content }}"
    "{% endfor %}",
    "{% generation %}{% set x = 1 %}{{ messages[-1].content }}{% endgeneration %}{{ x }}",
    "{% set ns = namespace(n=0, self=2) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}{{ ns.self }}",
    "{% set ns = namespace({'a': 1}) %}{{ ns.a }}{{ dict(a=1, b=2) }}{{ dict.fromkeys('ab', 1) }}",
    "{{ enable_thinking }}{{ enable_thinking is defined }}{{ level | default('low') }}",
    "{{ messages[-1].reasoning_content }}/{{ messages[-1].thinking }}/{{ messages[-1].reasoning }}",
    "{{ messages[-1].tool_calls is defined }}{{ messages[-1].keys() | list }}",
    "{{ strftime_now('%%') }}{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}",
    "{% macro said(m) %}<{{ m.role }}>{% endmacro %}{% for m in messages %}{{ said(m) }}"
    "{% endfor %}",
    "{{ messages[-1]['content'] if messages[-1]['content'] is string else "
    "messages[-1]['content'][-1].text }}",
    "  {# a comment #}\n  {% set a = 'b' %}\n  {{ a }}\n\n",
    "{{ 'x' if '<|tool|>' in messages[0].content }}{{ messages | length }}",
    "{{ (messages | selectattr('role', 'equalto', 'user') | list)[0].content.split('l')[0] }}",
]
_BROKEN = [
    "{{ raise_exception('Roles must alternate.') }}",
    "{{ 1 / 0 }}",
    "{{ messages.append(1) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ missing.field }}",
    "{{ messages[0].content.nothing() }}",
    "{{ missing | tojson }}",
    "{% set ns = namespace(_a=1) %}",
    "{% set ns = namespace() %}{% set ns._a = 1 %}",
    "{{ dict.mro() }}",
    "{% if %}",
    "{{ 'a' + 1 }}",
    "{{ range(10000000) | list }}",
    "{{ strftime_now(3) }}",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "{{ messages[0].content | nofilter }}",
]


def templates() -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """Templates, each with a conversation and further arguments of `apply_chat_template`."""
    for seed in range(CONVERSATIONS):
        draw = Draw(10_000 + seed)
        parts = [draw.one(*_PARTS) for _ in range(draw.one(1, 2, 3))]
        if draw.chance(0.25):
            parts.append(_BROKEN[seed % len(_BROKEN)] if draw.chance(0.5) else draw.one(*_BROKEN))
        messages = []
        for _ in range(draw.one(1, 2, 3)):
            content = draw.one(" hello ", "é <b>\n", "", "lull <|tool|>", [{"text": "part "}], 7)
            message = {"role": draw.one("user", "assistant", "system"), "content": content}
            if draw.chance(0.3):
                message[draw.one("thinking", "reasoning", "reasoning_content")] = "hm "
            if draw.chance(0.2):
                message["tool_calls"] = draw.one(None, [{"name": "f", "arguments": {"x": 1.5}}])
            messages.append(message)
        arguments: dict[str, Any] = {"add_generation_prompt": draw.chance(0.5)}
        if draw.chance(0.3):
            arguments["tools"] = draw.one([], [{"type": "function", "function": {"name": "é"}}])
        if draw.chance(0.3):
            arguments["documents"] = [{"title": "T", "text": "<x>"}]
        if draw.chance(0.3):
            arguments["enable_thinking"] = draw.one(True, False, None, "no")
        if draw.chance(0.25):
            arguments["continue_final_message"] = draw.one(
                True, True, "content", "reasoning_content", "nothing"
            )
            arguments["add_generation_prompt"] = draw.chance(0.1)
        yield "".join(parts), messages, arguments
