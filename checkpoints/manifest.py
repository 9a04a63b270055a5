"""The manifest: what a checkpoint says of itself, in JSON beside the weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ffjax.config import ModelConfig

__all__ = [
    "DTYPES",
    "FORMAT",
    "FORMAT_VERSION",
    "HF_FILES",
    "MANIFEST",
    "WEIGHTS",
    "CheckpointError",
    "Manifest",
    "NotWrittenError",
    "supported_dtype",
]

FORMAT = "ffjax-checkpoint"
FORMAT_VERSION = 1

# What a checkpoint's directory holds.
MANIFEST = "manifest.json"
WEIGHTS = "weights"
HF_FILES = "huggingface"

# The dtypes in which a model's weights are kept.
DTYPES = ("bfloat16", "float32")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message says why in a sentence."""


class NotWrittenError(CheckpointError, OSError):
    """The system has refused a write: the disk is full, for example. Nothing of it is left."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        config: the model's configuration.
        dtype: of all its weights that are not quantized, one of `DTYPES`.
        source: where the weights come from, JSON-able, or None if nobody said.
        files: bytes of every other file, by its path within the checkpoint: a copy
            that was cut short is noticed before anything is read.
    """

    config: ModelConfig
    dtype: str
    source: dict[str, Any] | None
    files: dict[str, int]

    def write(self, directory: Path) -> None:
        """Writes the manifest into a checkpoint's directory, with the files it finds there.

        Raises:
            TypeError: the source is not JSON-able.
        """
        files = (file for file in directory.rglob("*") if file.is_file())
        sizes = {file.relative_to(directory).as_posix(): file.stat().st_size for file in files}
        text = dataclasses.replace(self, files=sizes).to_json()
        (directory / MANIFEST).write_text(text, encoding="utf-8")

    def to_json(self) -> str:
        """The manifest's text.

        Raises:
            TypeError: the source is not JSON-able.
        """
        data = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": self.config.to_dict(),
            "dtype": self.dtype,
            "source": self.source,
            "files": dict(sorted(self.files.items())),
        }
        try:
            return json.dumps(data, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"A checkpoint's source is kept as JSON, and this cannot be: {error}. "
                "Give it as dicts, lists, strings and finite numbers."
            ) from None

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Reads the manifest of the checkpoint in `directory`.

        Raises:
            FileNotFoundError: there is nothing at that path.
            CheckpointError: what is there is no checkpoint, a damaged one, or one that a
                newer version wrote.
        """
        if not directory.exists():
            raise FileNotFoundError(nothing_at(directory, "checkpoint or Hugging Face folder"))
        if not directory.is_dir():
            raise CheckpointError(a_file(directory))
        file = directory / MANIFEST
        if not file.is_file():
            raise CheckpointError(
                a_gguf_file(directory)
                or f"A checkpoint is a directory with a {MANIFEST}, a Hugging Face folder one "
                f"with a config.json; {directory} has neither. Give the directory that ffjax.save "
                "or `ffjax convert` wrote, or the folder that was downloaded."
            )
        check_utf8(directory)
        try:
            data = json.loads(file.read_bytes())
        except ValueError as error:
            raise CheckpointError(
                f"The checkpoint at {directory} is damaged: its {MANIFEST} is not JSON ({error}). "
                "Copy or save it again."
            ) from None
        return cls._from_data(data, directory)

    @classmethod
    def _from_data(cls, data: Any, directory: Path) -> Manifest:
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise CheckpointError(
                f"{directory} is not a checkpoint of ffjax: its {MANIFEST} does not say "
                f'"format": "{FORMAT}". Give the directory that ffjax.save or `ffjax convert` '
                "wrote."
            )
        version = data.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"The checkpoint at {directory} has format version {version}; this ffjax reads "
                f"versions up to {FORMAT_VERSION}. Update ffjax to read it."
            )
        damaged = f"The checkpoint at {directory} is damaged: its {MANIFEST}"
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{damaged} gives {version!r} as its format version.")
        config, dtype, source, files = (
            data.get(key) for key in ("config", "dtype", "source", "files")
        )
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{damaged} gives {dtype!r} as dtype of the weights; it is one of "
                f"{', '.join(DTYPES)}."
            )
        if not isinstance(config, dict):
            raise CheckpointError(f"{damaged} holds no model configuration.")
        if not isinstance(files, dict) or not files:
            raise CheckpointError(f"{damaged} lists no files of weights.")
        try:
            made = ModelConfig.from_dict(config)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{damaged} describes no possible model: {str(error).rstrip('.')}."
            ) from None
        return cls(config=made, dtype=dtype, source=source, files=files)

    def check_files(self, directory: Path) -> None:
        """Whether every file of the checkpoint in `directory` is there, whole.

        Raises:
            CheckpointError: one is missing, or of another size.
        """
        for name, size in self.files.items():
            try:
                found = (directory / name).stat().st_size
            except OSError:
                raise CheckpointError(
                    f"The checkpoint at {directory} is incomplete: {name} is missing. "
                    "Copy or save it again."
                ) from None
            if found != size:
                raise CheckpointError(
                    f"The checkpoint at {directory} is damaged: {name} has {found} bytes, and "
                    f"was saved with {size}. Copy or save it again."
                )


def nothing_at(path: Path, what: str) -> str:
    """A sentence: there is nothing at a path.

    Args:
        path: the path.
        what: what was looked for there, as in "checkpoint".
    """
    return f"There is no {what} at {path}. Nothing is downloaded: give a folder on this machine."


def check_utf8(directory: Path) -> None:
    """Whether TensorStore can read a checkpoint there, which takes names in UTF-8 alone.

    Raises:
        CheckpointError: it cannot.
    """
    try:
        str(directory).encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            f"The path of a checkpoint is UTF-8, and {str(directory)!a} is not. Choose another "
            "name."
        ) from None


def a_gguf_file(directory: Path) -> str | None:
    """A sentence, where a directory has GGUF files and is no model itself; else None."""
    files = sorted(directory.glob("*.gguf"))
    if not files:
        return None
    return (
        f"A GGUF file is a model by itself; {directory} has {len(files)}, and no other weights. "
        f"Give the file: {files[0]}."
    )


def a_file(path: Path) -> str:
    """A sentence: a path is that of a file, where a folder is needed."""
    return f"{path} is a file. Give the folder that it lies in."


def supported_dtype(what: str, dtype: Any) -> Any:
    """The dtype, if a checkpoint may have it.

    Args:
        what: the sentence's beginning, as in "The weights are loaded as".
        dtype: a dtype or its name.

    Raises:
        CheckpointError: it is none of `DTYPES`.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in DTYPES:
        raise CheckpointError(f"{what} one of {', '.join(DTYPES)}; got {name}.")
    return jnp.dtype(dtype)
