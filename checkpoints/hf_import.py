"""Hugging Face folders as models that come in, and checkpoints of ours made of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from checkpoints.converting import convert_incoming
from checkpoints.hf_adapter import ADAPTER, refuse_adapter
from checkpoints.hf_config import architecture_of, config_from_hf, read_config
from checkpoints.hf_fields import CONFIG
from checkpoints.hf_files import (
    StoredTensor,
    check_dtypes,
    find_tensors,
    same_numbers,
)
from checkpoints.hf_quantized import drop_empty_biases, take_matrices, taken_settings
from checkpoints.hf_table import EMBED, HEAD, NameRules, slots_of
from checkpoints.hf_token_ids import check_end_tokens
from checkpoints.incoming import (
    Conversion,
    Incoming,
    check_tensors,
)
from checkpoints.integers import keep_integers, wholes
from checkpoints.manifest import (
    HF_FILES,
    MANIFEST,
    CheckpointError,
    a_file,
    nothing_at,
)
from checkpoints.skeleton import array_shapes
from ffjax.settings import own_settings

__all__ = [
    "COMPANIONS",
    "HFFolder",
    "companions_in",
    "convert_hf",
    "copy_companions",
    "is_hf_folder",
    "keep_companions",
    "name_of",
]

# What lies beside the weights and is kept with them: the tokenizer, its chat template, and the
# files that name the tokens which end a text.
COMPANIONS = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
# Templates with names of their own lie in a directory, any number of them.
_TEMPLATES = "additional_chat_templates"


def is_hf_folder(path: Path) -> bool:
    """Whether a directory holds a Hugging Face model or adapter, and no checkpoint of ours."""
    theirs = any((path / name).is_file() for name in (CONFIG, ADAPTER))
    return theirs and not (path / MANIFEST).is_file()


def companions_in(directory: Path) -> list[str]:
    """What lies beside a model's weights in a folder: paths relative to it, with `/`."""
    names = [name for name in COMPANIONS if (directory / name).is_file()]
    templates = sorted((directory / _TEMPLATES).glob("*.jinja"))
    return names + [f"{_TEMPLATES}/{file.name}" for file in templates if file.is_file()]


def copy_companions(names: list[str], source: Path, target: Path) -> None:
    """Copies files by their relative paths, with the directories that they lie in."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def keep_companions(directory: Path, checkpoint: Path) -> list[str]:
    """Copies what lies beside a model's weights into a checkpoint that is being written.

    Args:
        directory: where the files lie.
        checkpoint: the directory of the checkpoint.

    Returns:
        The relative paths of those there were.
    """
    names = companions_in(directory)
    copy_companions(names, directory, checkpoint / HF_FILES)
    return names


class HFFolder(Incoming):
    """A Hugging Face model on disk, checked from end to end, its numbers not yet read."""

    form = "huggingface"
    whole = ("F32", "F16", "BF16")

    @classmethod
    def open(
        cls, directory: Path, *, ignore_fields: Collection[str] = (), integers: bool = True
    ) -> HFFolder:
        """Reads `config.json` and the files' headers, and checks that they fit.

        What is left out, and taken to change nothing, is named in an `HFFolderWarning`.

        Args:
            directory: the folder.
            ignore_fields: as in `convert_hf`.
            integers: likewise.

        Raises:
            FileNotFoundError: there is nothing at that path.
            CheckpointError: the folder is incomplete or damaged, or holds or asks for what
                is not supported.
        """
        if not directory.exists():
            raise FileNotFoundError(nothing_at(directory, "Hugging Face folder"))
        if not directory.is_dir():
            raise CheckpointError(a_file(directory))
        refuse_adapter(directory, whole=(directory / CONFIG).is_file())
        data = read_config(directory)
        architecture = architecture_of(data, directory)
        settings = taken_settings(data, directory, integers=integers)
        config = config_from_hf(
            data, directory, name=name_of(directory), ignore_fields=ignore_fields
        )
        check_end_tokens(directory, config.vocab_size)  # not only when a text is to end
        slots = slots_of(config, array_shapes(config, "bfloat16"))
        named, left_out = NameRules.of(architecture).apply(found := find_tensors(directory))
        if settings is None:
            # Before the names: those of quantized tensors are unknown, and their dtype says why.
            check_dtypes(directory, (found[name] for names in named.values() for name in names))
        if twice := [names for names in named.values() if len(names) > 1]:
            raise CheckpointError(
                f"Each tensor is there under one name; {directory} has several for one: "
                f"{'; '.join(' and '.join(names) for names in twice)}."
            )
        tensors = {name: found[theirs] for name, (theirs,) in named.items()}
        matrices = take_matrices(settings, tensors)
        if settings is not None:
            left_out += drop_empty_biases(tensors, slots)
        check_dtypes(directory, (x for x in tensors.values() if isinstance(x, StoredTensor)))
        if config.tied_embeddings and HEAD in tensors and EMBED in tensors:
            _check_tied(directory, tensors[HEAD], tensors[EMBED])
            left_out.append(tensors.pop(HEAD).name)
        check_tensors(directory, config, slots, {**tensors, **wholes(matrices)}, says=CONFIG)
        kept = keep_integers(config, slots, tensors, matrices, integers=integers)
        return cls(directory, architecture, kept.config, kept.slots, kept.tensors, left_out)

    def check_companions(self) -> None:
        """Nothing is refused: they are copied as they are; see `Incoming`."""

    def keep_companions(self, checkpoint: Path) -> list[str]:
        """Copies the tokenizer's files and the like; see `Incoming`."""
        return keep_companions(self.path, checkpoint)


def name_of(directory: Path) -> str:
    """What to call the model: its folder, or its repository where that is a cache's."""
    directory = directory.resolve()
    if directory.parent.name == "snapshots":  # models--OWNER--NAME/snapshots/REVISION
        return directory.parent.parent.name.rpartition("--")[2]
    return directory.name


def _check_tied(directory: Path, head: StoredTensor, embed: StoredTensor) -> None:
    """Whether a head that the files hold beside the embedding is the embedding."""
    if not same_numbers(head, embed):
        raise CheckpointError(
            f"{CONFIG} of {directory} says that the head is the embedding "
            f"(tie_word_embeddings), and {head.name} differs from {embed.name}. If the head is "
            "one of its own, set tie_word_embeddings to false there."
        )


@own_settings()
def convert_hf(
    directory: str | Path,
    path: str | Path,
    *,
    dtype: Any = "bfloat16",
    overwrite: bool = False,
    ignore_fields: Collection[str] = (),
    adapter: str | Path | None = None,
    integers: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Makes a checkpoint of a Hugging Face folder.

    Tensors go from the files to some layers of one of our arrays at a time: the host holds
    these, or the embedding, and the chunks in which they are written, however many layers there
    are. As with `save`, an error or Ctrl-C leaves nothing half-written at `path`.

    Args:
        directory: the folder: `config.json`, safetensors in one file or in shards, and the
            tokenizer's files.
        path: the checkpoint to make.
        dtype: of its weights, bfloat16 or float32.
        overwrite: whether a checkpoint already at `path` may be replaced.
        ignore_fields: names of fields of config.json to leave out: those that are refused
            because they might change what the model computes, where it is known that they do
            not. A field that is understood cannot be ignored.
        adapter: the folder of a LoRA adapter of this model, in peft's format, to be merged into it:
            W + scaling * B @ A for each matrix W `[out, in]`, B `[out, r]`, A `[r, in]`, where
            scaling is lora_alpha / r (arXiv 2106.09685), or lora_alpha / sqrt(r) with use_rslora
            (arXiv 2312.03732). Computed as peft does on a CPU with a model loaded as `dtype`.
        integers: whether quantized matrices keep their integers, where ours have such a format;
            False: all are made whole, and rounded to `dtype`.
        progress: is told, after each tensor, how many bytes were read and of how many.

    Returns:
        What was made, rounded and left out. The model itself: `ffjax.load(path)`.

    Raises:
        FileNotFoundError: there is no such folder.
        FileExistsError: there is something at `path`, and overwrite is false or it is no
            checkpoint.
        CheckpointError: the folder is incomplete or damaged, or holds or asks for what is
            not supported; or the adapter does, or is one of another model; or the checkpoint
            cannot be written.
    """
    return convert_incoming(
        HFFolder,
        directory,
        path,
        dtype=dtype,
        overwrite=overwrite,
        ignore_fields=ignore_fields,
        adapter=adapter,
        integers=integers,
        progress=progress,
    )
