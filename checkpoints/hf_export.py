"""Our checkpoints out: safetensors and config.json as Hugging Face has them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.arrays import open_arrays, read_blocks
from checkpoints.atomic import why_not_written, written_beside
from checkpoints.gguf import is_gguf
from checkpoints.hf_config import config_to_hf
from checkpoints.hf_fields import CONFIG
from checkpoints.hf_files import INDEX, SINGLE, TensorWriter
from checkpoints.hf_import import companions_in, copy_companions, is_hf_folder
from checkpoints.hf_table import Slot, slots_of
from checkpoints.manifest import HF_FILES, WEIGHTS, CheckpointError, Manifest
from checkpoints.places import check_apart, model_path, real_path
from checkpoints.reordered import in_their_order
from checkpoints.skeleton import array_shapes

__all__ = ["SHARD_BYTES", "Export", "export_hf"]

# Where a file ends and the next begins: that of transformers 4 and of most releases.
SHARD_BYTES = 5_000_000_000

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Export:
    """What an export made.

    Attributes:
        architecture: what its config.json says.
        dtype: of its tensors.
        tensors: how many there are.
        files: the files with tensors.
        companions: other files that had been kept with the checkpoint, given back.
    """

    architecture: str
    dtype: str
    tensors: int
    files: list[str]
    companions: list[str]


def export_hf(
    checkpoint: str | Path,
    path: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Export:
    """Writes a checkpoint as a Hugging Face folder, which transformers reads.

    Nothing is rounded: converted back, the folder gives the same weights, bit by bit. The
    host holds a layer of one of our arrays at a time, or some layers. An error or Ctrl-C leaves
    nothing half-written.

    Args:
        checkpoint: a checkpoint of ours.
        path: the folder to make; there may be nothing at this path.
        shard_bytes: where a file of tensors ends and the next begins.
        progress: is told, after each tensor, how many bytes were written and of how many.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: there is nothing at `checkpoint`.
        FileExistsError: there is something at `path`.
        CheckpointError: the checkpoint is damaged, or a Hugging Face folder itself, or
            quantized; or Hugging Face has no model of its kind.
        ValueError: shard_bytes is not positive.
    """
    checkpoint = model_path(checkpoint)
    path = real_path(path)
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}.")
    if is_gguf(checkpoint):
        raise CheckpointError(
            f"An export starts from a checkpoint of ffjax; {checkpoint} is a GGUF file. Convert it "
            "first (`ffjax convert`)."
        )
    if is_hf_folder(checkpoint):
        raise CheckpointError(
            f"An export starts from a checkpoint of ffjax; {checkpoint} is a Hugging Face folder. "
            "Use it as it is, or copy it."
        )
    check_apart(path, checkpoint)
    manifest = Manifest.read(checkpoint)
    manifest.check_files(checkpoint)
    if manifest.config.weights.quantized:
        raise CheckpointError(
            "An export rounds nothing, and Hugging Face's tensors are not quantized as those of "
            f"{checkpoint} are ({manifest.config.weights}). Export the checkpoint that it was "
            "made of; in Python, a model that ffjax.dequantize returns can be saved and exported."
        )
    shapes = array_shapes(manifest.config, manifest.dtype)
    slots = [slot for mine in slots_of(manifest.config, shapes).values() for slot in mine]
    itemsize = np.dtype(shapes["embed"].dtype).itemsize
    kept = checkpoint / HF_FILES
    data = config_to_hf(manifest.config, manifest.dtype, _token_ids(kept))
    companions = [name for name in companions_in(kept) if name != CONFIG]
    with written_beside(path, lambda: _check_nothing_at(path)) as partial:
        shards = _shards(slots, itemsize, shard_bytes)
        _write_tensors(checkpoint, partial, shards, shapes["embed"].dtype, progress)
        if len(shards) > 1:
            _write_json(partial / INDEX, _index(shards, itemsize))
        _write_json(partial / CONFIG, data)
        copy_companions(companions, kept, partial)
    return Export(data["architectures"][0], manifest.dtype, len(slots), list(shards), companions)


def _check_nothing_at(path: Path) -> None:
    if path.exists():
        raise FileExistsError(
            f"An export replaces nothing, and there is something at {path}. Export elsewhere."
        )


def _token_ids(kept: Path) -> dict[str, Any]:
    """The ids of special tokens in the config.json that was kept, to be given back.

    None where it was silent: transformers would assume ids of the family's first model.
    """
    data = json.loads((kept / CONFIG).read_bytes()) if (kept / CONFIG).is_file() else {}
    data = {**data, **(data.get("text_config") or {})}
    return {name: data.get(name) for name in _TOKEN_IDS}


def _nbytes(slot: Slot, itemsize: int) -> int:
    return int(np.prod(slot.shape)) * itemsize


def _shards(slots: list[Slot], itemsize: int, shard_bytes: int) -> dict[str, list[Slot]]:
    """The tensors of each file, by the file's name."""
    groups: list[list[Slot]] = [[]]
    size = 0
    for slot in slots:
        nbytes = _nbytes(slot, itemsize)
        if groups[-1] and size + nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(slot)
        size += nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {
        f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)
    }


def _index(shards: dict[str, list[Slot]], itemsize: int) -> dict[str, Any]:
    every = [slot for group in shards.values() for slot in group]
    return {
        "metadata": {"total_size": sum(_nbytes(slot, itemsize) for slot in every)},
        "weight_map": {slot.theirs: file for file, group in shards.items() for slot in group},
    }


def _write_tensors(
    checkpoint: Path,
    directory: Path,
    shards: dict[str, list[Slot]],
    dtype: Any,
    progress: Callable[[int, int], None] | None,
) -> None:
    itemsize = np.dtype(dtype).itemsize
    slots = [slot for group in shards.values() for slot in group]
    total, written = sum(_nbytes(slot, itemsize) for slot in slots), 0
    tensors = _read(checkpoint, slots)
    for file, group in shards.items():
        shapes = {slot.theirs: slot.shape for slot in group}
        with TensorWriter(directory / file, dtype, shapes) as writer:
            for slot in group:
                writer.write(slot.theirs, next(tensors))
                written += _nbytes(slot, itemsize)
                if progress is not None:
                    progress(written, total)


def _read(checkpoint: Path, slots: list[Slot]) -> Iterator[np.ndarray]:
    """The tensors of slots, in turn. Those of one array follow each other.

    Raises:
        CheckpointError: an array cannot be read.
    """
    for name, group in itertools.groupby(slots, key=lambda slot: slot.ours):
        mine = list(group)
        stacked = isinstance(mine[0].place[0], int)
        try:
            array = open_arrays(checkpoint / WEIGHTS)[name]
            for block in read_blocks(name, array, whole=not stacked):
                _, start, rows = block
                del block
                for slot in mine:
                    layer, *place = slot.place
                    if not isinstance(layer, int):
                        yield in_their_order(rows[slot.place], slot.order)
                    elif start <= layer < start + len(rows):
                        yield in_their_order(rows[(layer - start, *place)], slot.order)
                del rows  # before the next is read
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"The array {name} of the checkpoint at {checkpoint} cannot be read: "
                f"{why_not_written(error)}. Copy or save it again."
            ) from error


def _write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
