"""Hugging Face checkpoints in: onto the device, or into a checkpoint of ours."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from checkpoints.arrays import lay_out, write_array
from checkpoints.atomic import written_beside
from checkpoints.hf_adapter import ADAPTER, refuse_adapter
from checkpoints.hf_config import architecture_of, config_from_hf, read_config
from checkpoints.hf_fields import CONFIG
from checkpoints.hf_files import (
    StoredTensor,
    check_dtypes,
    dtype_name,
    find_tensors,
    parts_of,
    read_into,
    same_numbers,
    some,
)
from checkpoints.hf_table import NameRules, Slot, slots_of
from checkpoints.hf_token_ids import check_end_tokens
from checkpoints.host_arrays import empty
from checkpoints.manifest import (
    HF_FILES,
    MANIFEST,
    WEIGHTS,
    CheckpointError,
    Manifest,
    a_file,
    nothing_at,
    supported_dtype,
)
from checkpoints.places import check_apart, check_free, real_path
from checkpoints.skeleton import array_shapes, nested, skeleton
from ffjax.config import ModelConfig
from ffjax.model import Transformer
from ffjax.settings import own_settings

__all__ = [
    "COMPANIONS",
    "Conversion",
    "HFFolder",
    "companions_in",
    "convert_hf",
    "copy_companions",
    "is_hf_folder",
    "keep_companions",
    "load_hf",
]

_log = logging.getLogger("ffjax.folders")

# Threads that read: a disk is at its fastest with several requests at a time.
_MOST_THREADS = 16

_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"

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


@dataclasses.dataclass(frozen=True)
class HFFolder:
    """A Hugging Face model on disk, checked from end to end, its numbers not yet read.

    Attributes:
        directory: where it lies.
        architecture: what its `config.json` calls it.
        config: its configuration as ours.
        slots: for each of our arrays the places of its tensors.
        tensors: every tensor, by its name in the table.
        left_out: names of tensors in its files that the model has no use for.
    """

    directory: Path
    architecture: str
    config: ModelConfig
    slots: dict[str, list[Slot]]
    tensors: dict[str, StoredTensor]
    left_out: list[str]

    @classmethod
    def open(cls, directory: Path, *, ignore_fields: Collection[str] = ()) -> HFFolder:
        """Reads `config.json` and the files' headers, and checks that they fit.

        What is left out, and taken to change nothing, is named in an `HFFolderWarning`.

        Args:
            directory: the folder.
            ignore_fields: as in `convert_hf`.

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
        config = config_from_hf(
            data, directory, name=_name_of(directory), ignore_fields=ignore_fields
        )
        check_end_tokens(directory, config.vocab_size)  # not only when a text is to end
        slots = slots_of(config, array_shapes(config, "bfloat16"))
        named, left_out = NameRules.of(architecture).apply(found := find_tensors(directory))
        # Before the names: those of quantized tensors are unknown, and their dtype says why.
        check_dtypes(directory, (found[name] for names in named.values() for name in names))
        if twice := [names for names in named.values() if len(names) > 1]:
            raise CheckpointError(
                f"Each tensor is there under one name; {directory} has several for one: "
                f"{'; '.join(' and '.join(names) for names in twice)}."
            )
        tensors = {name: found[theirs] for name, (theirs,) in named.items()}
        if config.tied_embeddings and _HEAD in tensors and _EMBED in tensors:
            _check_tied(directory, tensors[_HEAD], tensors[_EMBED])
            left_out.append(tensors.pop(_HEAD).name)
        _check_names(directory, config, slots, tensors)
        _check_shapes(directory, slots, tensors)
        return cls(directory, architecture, config, slots, tensors, left_out)

    @property
    def dtypes(self) -> dict[str, int]:
        """How many of the tensors have which dtype, as safetensors calls them."""
        return dict(sorted(Counter(tensor.dtype for tensor in self.tensors.values()).items()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def source(self, dtype: Any, ignored: Collection[str] = ()) -> dict[str, Any]:
        """Where weights of a dtype that are made of this folder come from, for a manifest.

        Args:
            dtype: bfloat16 or float32.
            ignored: fields of config.json that were left out.
        """
        source = {
            "format": "huggingface",
            "name": self.config.name,
            "architecture": self.architecture,
            "dtypes": self.dtypes,
            "rounded": self.rounded(dtype),
            "left_out": self.left_out,
        }
        return source | ({"ignored_fields": sorted(ignored)} if ignored else {})

    def rounded(self, dtype: Any) -> dict[str, int]:
        """How many tensors, of which dtype, the given one cannot hold exactly."""
        held = ("F32", "F16", "BF16") if dtype_name(dtype) == "F32" else (dtype_name(dtype),)
        return {name: count for name, count in self.dtypes.items() if name not in held}

    def arrays(
        self, dtype: Any, progress: Callable[[int], None] | None = None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Our arrays, filled from the files by several threads.

        One array exists at a time, as long as the caller keeps no other.

        Args:
            dtype: bfloat16 or float32.
            progress: is told, after each tensor, the bytes that were read.
        """
        pool = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1))
        try:
            for name, shape in array_shapes(self.config, dtype).items():
                array = empty(shape.shape, shape.dtype)
                under_way = [
                    (tensor, [pool.submit(read_into, tensor, out, part) for part in parts])
                    for tensor, out, parts in self._pieces(name, array)
                ]
                for tensor, reads in under_way:
                    for read in reads:
                        read.result()
                    if progress is not None:
                        progress(tensor.nbytes)
                del under_way
                yield name, array
                del array  # before the next is allocated
        finally:
            pool.shutdown(cancel_futures=True)

    def _pieces(
        self, name: str, array: np.ndarray
    ) -> Iterator[tuple[StoredTensor, np.ndarray, list[slice]]]:
        """Of every tensor of one of our arrays: where it goes, and its parts."""
        for slot in self.slots[name]:
            tensor = self.tensors[slot.theirs]
            yield tensor, array[slot.place], parts_of(tensor)


def _name_of(directory: Path) -> str:
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


def _check_names(
    directory: Path,
    config: ModelConfig,
    slots: dict[str, list[Slot]],
    tensors: dict[str, StoredTensor],
) -> None:
    wanted = {slot.theirs for mine in slots.values() for slot in mine}
    missing = sorted(wanted - tensors.keys())
    unknown = sorted(tensor.name for name, tensor in tensors.items() if name not in wanted)
    if missing or unknown:
        wrong = [
            f"{len(names)} {what}: {some(names)}"
            for names, what in ((missing, "missing"), (unknown, "unknown"))
            if names
        ]
        raise CheckpointError(
            f"The tensors in {directory} are not those of a {config.family} model with the sizes "
            f"in its {CONFIG}; {'; '.join(wrong)}."
        )


def _check_shapes(
    directory: Path, slots: dict[str, list[Slot]], tensors: dict[str, StoredTensor]
) -> None:
    wrong = [
        f"{tensor.name} is {list(tensor.shape)}, expected {list(slot.shape)}"
        for mine in slots.values()
        for slot in mine
        if (tensor := tensors[slot.theirs]).shape != slot.shape
    ]
    if wrong:
        raise CheckpointError(
            f"The tensors in {directory} have not the shapes that its {CONFIG} gives them: "
            f"{some(wrong, most=3, between='; ')}."
        )


@own_settings()
def load_hf(
    directory: str | Path, *, dtype: Any = None, ignore_fields: Collection[str] = ()
) -> Transformer:
    """Loads a Hugging Face folder onto the default device: what `load` does with one.

    Beside the model on the device, the host holds one of its arrays at a time.

    Args:
        directory: the folder.
        dtype: bfloat16 or float32; None: bfloat16.
        ignore_fields: as in `convert_hf`.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: it is incomplete or damaged, or asks for what is not supported.
    """
    folder = HFFolder.open(real_path(directory), ignore_fields=ignore_fields)
    dtype = supported_dtype("The weights are loaded as", "bfloat16" if dtype is None else dtype)
    if rounded := folder.rounded(dtype):
        _log.info("%s: %s.", folder.config.name, rounding_note(rounded, dtype))
    model = skeleton(folder.config, dtype)
    state = nnx.state(model, nnx.Param)
    weights = {}
    for name, array in folder.arrays(dtype):
        weights[name] = jax.device_put(array)
        del array
    nnx.replace_by_pure_dict(state, nested(weights))
    nnx.update(model, state)
    return model


def rounding_note(rounded: dict[str, int], dtype: Any) -> str:
    """A clause that says how many tensors were rounded."""
    counts = " and ".join(f"{count} of {name}" for name, count in rounded.items())
    return f"tensors were rounded to {np.dtype(dtype).name}: {counts}"


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Attributes:
        config: of the model.
        dtype: of the checkpoint's weights.
        rounded: how many tensors of which dtype were rounded to it.
        left_out: names of tensors that the model has no use for.
        companions: files that were kept beside the weights.
    """

    config: ModelConfig
    dtype: str
    rounded: dict[str, int]
    left_out: list[str]
    companions: list[str]


@own_settings()
def convert_hf(
    directory: str | Path,
    path: str | Path,
    *,
    dtype: Any = "bfloat16",
    overwrite: bool = False,
    ignore_fields: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Makes a checkpoint of a Hugging Face folder.

    Tensors go from the files to one of our arrays at a time: the host never holds more than
    the largest of them, and the chunks in which it is written. As with `save`, an error or
    Ctrl-C leaves nothing half-written at `path`.

    Args:
        directory: the folder: `config.json`, safetensors in one file or in shards, and the
            tokenizer's files.
        path: the checkpoint to make.
        dtype: of its weights, bfloat16 or float32.
        overwrite: whether a checkpoint already at `path` may be replaced.
        ignore_fields: names of fields of config.json to leave out: those that are refused
            because they might change what the model computes, where it is known that they do
            not. A field that is understood cannot be ignored.
        progress: is told, after each tensor, how many bytes were read and of how many.

    Returns:
        What was made, rounded and left out. The model itself: `ffjax.load(path)`.

    Raises:
        FileNotFoundError: there is no such folder.
        FileExistsError: there is something at `path`, and overwrite is false or it is no
            checkpoint.
        CheckpointError: the folder is incomplete or damaged, or holds or asks for what is
            not supported; or the checkpoint cannot be written.
    """
    path = real_path(path)
    dtype = supported_dtype("A checkpoint's weights are", dtype)
    check_free(path, overwrite)
    check_apart(path, directory := real_path(directory))
    folder = HFFolder.open(directory, ignore_fields=ignore_fields)
    total, read = folder.nbytes, 0

    def count(nbytes: int) -> None:
        nonlocal read
        read += nbytes
        if progress is not None:
            progress(read, total)

    rounded = folder.rounded(dtype)
    source = folder.source(dtype, ignore_fields)
    manifest = Manifest(config=folder.config, dtype=dtype.name, source=source, files={})
    with written_beside(path, lambda: check_free(path, overwrite)) as partial:
        lay_out(partial / WEIGHTS, array_shapes(folder.config, dtype))
        for name, array in folder.arrays(dtype, count):
            write_array(partial / WEIGHTS, name, array)
            del array
        companions = keep_companions(folder.directory, partial)
        manifest.write(partial)
    return Conversion(folder.config, dtype.name, rounded, folder.left_out, companions)
