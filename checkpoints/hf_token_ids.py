"""Which tokens end a text, as the files of a Hugging Face folder say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoints.hf_fields import CONFIG, warn
from checkpoints.hf_files import downloaded_json
from checkpoints.manifest import CheckpointError

__all__ = ["check_end_tokens"]

_FIELD = "eos_token_id"


def check_end_tokens(directory: Path, vocab_size: int) -> None:
    """Checks the ids of the tokens that end a text, where a file names some.

    They are read from `generation_config.json`, else from `config.json`. An id that no token of
    the model has can never come, so that it is left out: transformers, too, waits for it in vain.
    An `HFFolderWarning` names it.

    Args:
        directory: the folder.
        vocab_size: V, the model's.

    Raises:
        CheckpointError: the field is no id and no list of ids; or a file is damaged.
    """
    for name in ("generation_config.json", CONFIG):
        file = directory / name
        data = _object(file)
        # A model within another has its fields in a table of its own.
        inner = data.get("text_config")
        value = data.get(_FIELD, inner.get(_FIELD) if isinstance(inner, dict) else None)
        if value is not None and _some_known(_ids(value, file), vocab_size, file):
            return


def _object(file: Path) -> dict[str, Any]:
    """The file's object; empty if there is no such file."""
    if not file.is_file():
        return {}
    data = downloaded_json(file)
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds no object, as it should. Download or copy it again.")
    return data


def _ids(value: Any, file: Path) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    for one in ids:
        if type(one) is not int:
            hint = " The text of a token is no id: tokenizer.json has its." * isinstance(one, str)
            raise CheckpointError(
                f"{_FIELD} in {file} is the id of the token that ends a text, or a list of ids, "
                f"each an integer; got {json.dumps(one)}.{hint} Correct it there."
            )
    return ids


def _some_known(ids: list[int], vocab_size: int, file: Path) -> bool:
    """Whether one of the ids is a token's; warns of those that are none."""
    lost = [one for one in ids if not 0 <= one < vocab_size]
    if lost:
        warn(
            f"{_FIELD} in {file} names {', '.join(map(str, lost))}, and the model's tokens are 0 "
            f"to {vocab_size - 1}: no text can end with that, and it is left out."
        )
    return len(lost) < len(ids)
