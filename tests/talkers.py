"""A small model that takes conversations, as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from hf_folders import write_folder
from hf_models import MODELS
from test_hf_tokenizer import BEGIN, END, KINDS

__all__ = ["CHATML", "write_talker"]

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
"""A template that writes what is said as it is, so that a conversation only ever grows."""


def write_talker(directory: Path, kind: str = "byte_level", **files: Any) -> Path:
    """Writes the folder; files by name, with `__` for the dot.

    Args:
        directory: the folder to make.
        kind: of its tokenizer.
        files: other files, JSON-able.
    """
    # Untied: what a token says of the next hangs on all before it, and is no token over and over.
    small = MODELS["untied_stretched_rope"]
    settings = {**small.settings, "vocab_size": 300, "max_position_embeddings": 4096}
    model = dataclasses.replace(small, settings=settings)
    write_folder(directory, model, eos_token_id=1, bos_token_id=0)
    KINDS[kind]().save(str(directory / "tokenizer.json"))
    tokens = {"bos_token": BEGIN, "eos_token": END, "chat_template": CHATML}
    for name, content in {"tokenizer_config__json": tokens, **files}.items():
        (directory / name.replace("__", ".")).write_text(json.dumps(content))
    return directory
