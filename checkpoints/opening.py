"""Which models come in from elsewhere: Hugging Face folders and GGUF files, opened by one name."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from checkpoints.gguf import GGUFFile, is_gguf
from checkpoints.hf_import import HFFolder, is_hf_folder
from checkpoints.incoming import Incoming

__all__ = ["comes_in", "open_incoming"]


def comes_in(path: Path) -> bool:
    """Whether there is a Hugging Face folder or a GGUF file at a path."""
    return is_hf_folder(path) or is_gguf(path)


def open_incoming(
    path: Path, *, ignore_fields: Collection[str] = (), integers: bool = True
) -> Incoming:
    """Opens what is at a path, and checks it from end to end; its numbers are not yet read.

    Args:
        path: a Hugging Face folder or a GGUF file.
        ignore_fields: as in `convert_hf` and `convert_gguf`.
        integers: likewise.

    Raises:
        FileNotFoundError: there is nothing at that path.
        CheckpointError: it is damaged, or holds or asks for what is not supported.
        NotImplementedError: it needs a package that is not installed.
    """
    kind = GGUFFile if is_gguf(path) else HFFolder
    return kind.open(path, ignore_fields=ignore_fields, integers=integers)
