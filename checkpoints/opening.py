"""What there is at a path: models from elsewhere, opened by one name, and a model's sizes alone."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from checkpoints.gguf import GGUFFile, is_gguf
from checkpoints.hf_config import config_from_hf, read_config
from checkpoints.hf_import import HFFolder, is_hf_folder, name_of
from checkpoints.incoming import Incoming
from checkpoints.manifest import Manifest
from ffjax.config import ModelConfig

__all__ = ["comes_in", "config_at", "open_incoming"]


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


def config_at(path: Path, *, ignore_fields: Collection[str] = ()) -> ModelConfig:
    """The configuration of the model at a path, whose weights need not be there.

    Args:
        path: a checkpoint, a GGUF file, or a Hugging Face folder, of which config.json is enough.
        ignore_fields: as in `open_incoming`.

    Raises:
        FileNotFoundError: there is nothing at that path.
        CheckpointError: it is damaged, or asks for what is not supported.
        NotImplementedError: it needs a package that is not installed.
    """
    if is_gguf(path):
        return GGUFFile.open(path, ignore_fields=ignore_fields).config
    if is_hf_folder(path):
        data = read_config(path)
        return config_from_hf(data, path, name=name_of(path), ignore_fields=ignore_fields)
    return Manifest.read(path).config
