"""Saving and restoring a model: an Orbax checkpoint of the weights, a manifest for the rest.

A checkpoint is a directory:

    manifest.json    format, configuration, dtype, source, and the sizes of the files below
    weights/         the weights, as Orbax lays them out
    huggingface/     the tokenizer's files, where `convert_hf` found some or `save` was given some
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from checkpoints.arrays import open_arrays, read_blocks, write_blocks
from checkpoints.atomic import why_not_written, written_beside
from checkpoints.blocks import Block, blocks_of
from checkpoints.gguf import is_gguf, write_tokenizer
from checkpoints.hf_import import keep_companions
from checkpoints.incoming import load_incoming
from checkpoints.manifest import (
    HF_FILES,
    MANIFEST,
    WEIGHTS,
    CheckpointError,
    Manifest,
    supported_dtype,
)
from checkpoints.opening import comes_in, open_incoming
from checkpoints.places import check_free, model_path, real_path
from checkpoints.placing import Placing, is_host
from checkpoints.skeleton import (
    array_shapes,
    flat,
    nested,
    quantized_arrays,
    skeleton,
    weights_of,
)
from ffjax.config import ModelConfig
from ffjax.model import Transformer
from ffjax.settings import own_settings

__all__ = [
    "SHIPPED_MODEL",
    "load",
    "read_checkpoint",
    "save",
    "tokenizer_at",
    "tokenizer_directory",
    "write_checkpoint",
]

SHIPPED_MODEL: Path = Path(__file__).parent / "shipped"
"""The trained model that is installed with the package; see MODEL_CARD.md."""


@own_settings()
def save(
    model: Transformer,
    path: str | Path,
    *,
    source: dict[str, Any] | None = None,
    tokenizer_from: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Saves a model: its weights, bit by bit, and its configuration.

    A model in memory does not know its tokenizer. `tokenizer_from` says where that lies, and
    keeps its files beside the weights, where `ffjax.load_tokenizer` and the command line look.

    Everything is written beside `path` and renamed to it at the end: an error, a full disk,
    Ctrl-C, SIGTERM or SIGHUP leaves nothing half-written, and a checkpoint that was at `path` as
    it was. What a process leaves that was killed, the next save to `path` removes. The host holds
    a copy of a layer of one array at a time, or of some layers.

    Args:
        model: the model, its weights all bfloat16 or all float32, but for quantized ones.
        path: the directory to make; the directories above it are made too.
        source: where the weights come from, JSON-able; kept in the manifest.
        tokenizer_from: a checkpoint, Hugging Face folder or GGUF file whose tokenizer is this
            model's, or a folder of a tokenizer alone. `path` itself may be it, with overwrite.
            None: the checkpoint has no tokenizer, which means bytes.
        overwrite: whether a checkpoint already at `path` may be replaced.

    Raises:
        FileExistsError: there is something at `path`, and overwrite is false or it is
            no checkpoint; or another process writes there now.
        NotWrittenError: the disk is full; a CheckpointError and an OSError.
        FileNotFoundError: there is no tokenizer at `tokenizer_from`.
        CheckpointError: the weights are of another dtype, or of several; or those that the
            configuration calls quantized are not.
        TypeError: the source is not JSON-able.
    """
    path = real_path(path)
    if tokenizer_from is None:
        _save(model, path, source, None, overwrite)
        return
    with tokenizer_at(tokenizer_from) as tokenizer:
        if tokenizer is None:
            raise FileNotFoundError(
                "tokenizer_from is a Hugging Face folder with a tokenizer.json, a GGUF file, or a "
                f"checkpoint that keeps one; {tokenizer_from} is not. Leave it out for a model of "
                "bytes."
            )
        _save(model, path, source, tokenizer, overwrite)


def _save(
    model: Transformer,
    path: Path,
    source: dict[str, Any] | None,
    tokenizer: Path | None,
    overwrite: bool,
) -> None:
    weights = weights_of(nnx.state(model, nnx.Param))
    dtype = _dtype_of(weights, model.config)
    arrays = flat(weights)
    blocks = (block for name, array in arrays.items() for block in blocks_of(name, array))
    manifest = Manifest(config=model.config, dtype=dtype, source=source, files={})
    write_checkpoint(manifest, arrays, blocks, path, tokenizer, overwrite=overwrite)


def write_checkpoint(
    manifest: Manifest,
    shapes: Mapping[str, Any],
    blocks: Iterable[Block],
    path: Path,
    tokenizer: Path | None,
    *,
    overwrite: bool,
) -> None:
    """Makes a checkpoint of a model that comes block by block; see `save`.

    Args:
        manifest: what is to be said of it; its files are filled in.
        shapes: shape and dtype of every array by its dotted name.
        blocks: all blocks of them.
        path: the checkpoint to make, in full.
        tokenizer: where the tokenizer's files lie; None: there are none.
        overwrite: as in `save`.

    Raises:
        FileExistsError: as `save`.
        NotWrittenError: as `save`.
        TypeError: as `save`.
    """
    manifest.to_json()  # a source that cannot be kept is refused before the weights are written
    with written_beside(path, lambda: check_free(path, overwrite)) as partial:
        write_blocks(partial / WEIGHTS, shapes, blocks)
        if tokenizer is not None:
            keep_companions(tokenizer, partial)
        manifest.write(partial)


@own_settings()
def load(
    path: str | Path,
    *,
    dtype: Any = None,
    ignore_fields: Collection[str] = (),
    integers: bool = True,
) -> Transformer:
    """Loads a model: from a checkpoint, or straight from a Hugging Face folder or a GGUF file.

    The weights are restored into the places of a model that was never allocated, on
    the default device: no second copy of them exists at any time. Beside it the host holds some
    layers of an array that are read, and those before as long as they are on their way; the device
    holds these twice.

    Args:
        path: the directory of a checkpoint, or of a Hugging Face model: `config.json`
            beside safetensors; or a GGUF file; or "org/name", a model of the Hugging Face cache.
        dtype: bfloat16 or float32, to which the weights are cast; None: as they were
            saved, bit by bit. Those of a Hugging Face folder or a GGUF file are cast to bfloat16
            then. Quantized weights stay as they are; it is what products with them take as
            inputs.
        ignore_fields: names of fields of a Hugging Face folder's config.json, or of a GGUF file's
            metadata, to leave out, which would be refused, and of which the caller knows that
            they change nothing.
        integers: whether quantized matrices of a Hugging Face folder or a GGUF file keep their
            integers, where ours have such a format; False: they are made whole. A checkpoint's are
            as they were saved.

    Returns:
        The model, on the default device.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: fields are to be ignored, and there is a checkpoint.
        CheckpointError: what is there is no checkpoint, a damaged or truncated one, or
            one that a newer version wrote; a Hugging Face folder or a GGUF file that asks for
            what is not supported; or the dtype is another.
        NotImplementedError: a GGUF file needs the extra `gguf`, and it is not installed.
    """
    path = model_path(path)
    if dtype is not None:
        dtype = supported_dtype("The weights are loaded as", dtype)
    if comes_in(path):
        incoming = open_incoming(path, ignore_fields=ignore_fields, integers=integers)
        return load_incoming(incoming, jnp.dtype(jnp.bfloat16) if dtype is None else dtype)
    if ignore_fields and path.exists():
        raise ValueError(
            "ignore_fields are fields of a Hugging Face folder's config.json, or of a GGUF file; "
            f"{path} is neither. Leave them out."
        )
    manifest = Manifest.read(path)
    model = skeleton(manifest.config, manifest.dtype if dtype is None else dtype)
    state = nnx.state(model, nnx.Param)
    targets = flat(weights_of(state))
    stored = targets if dtype is None else array_shapes(manifest.config, manifest.dtype)
    placing = Placing(targets)
    for block in _read(path, manifest, stored, targets, whole=is_host()):
        placing.put(block)  # on its way to the device while the next is read
        del block
    nnx.replace_by_pure_dict(state, nested(placing.arrays))
    nnx.update(model, state)
    return model


def read_checkpoint(path: Path) -> tuple[Manifest, Iterator[Block]]:
    """What a checkpoint says of itself, and its arrays, block by block, as they are stored.

    Args:
        path: the checkpoint, in full.

    Raises:
        CheckpointError: it is none, or a damaged one. What the numbers show is found when they are
            read.
    """
    manifest = Manifest.read(path)
    shapes = array_shapes(manifest.config, manifest.dtype)
    return manifest, _read(path, manifest, shapes, shapes, whole=False)


def _read(
    path: Path,
    manifest: Manifest,
    stored: Mapping[str, Any],
    targets: Mapping[str, Any],
    *,
    whole: bool,
) -> Iterator[Block]:
    """The arrays of a checkpoint, block by block, cast to the dtypes of others of their shapes.

    Args:
        path: the checkpoint.
        manifest: what it says of itself.
        stored: shape and dtype of every array by its dotted name, as the manifest has them.
        targets: by dotted name, each with a `dtype`.
        whole: whether each array comes as one block.
    """
    manifest.check_files(path)
    try:
        arrays = open_arrays(path / WEIGHTS)
        _check_arrays(path, arrays, stored)
        for name, array in arrays.items():
            dtype = targets[name].dtype
            yield from read_blocks(name, array, dtype, whole=whole)
    except (ValueError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"The checkpoint at {path} is damaged: its weights cannot be read "
            f"({why_not_written(error)}). Copy or save it again."
        ) from error


def tokenizer_directory(path: str | Path) -> Path | None:
    """Where the tokenizer's files of a checkpoint or Hugging Face folder lie; None if it has none.

    Args:
        path: the directory of either; or of a tokenizer alone, as transformers saves one. For
            a GGUF file see `tokenizer_at`.
    """
    path = model_path(path)
    places = path, path / HF_FILES
    return next((place for place in places if (place / "tokenizer.json").is_file()), None)


@contextlib.contextmanager
def tokenizer_at(path: str | Path) -> Iterator[Path | None]:
    """Where the tokenizer's files of a model lie, as long as the block lasts; None if it has none.

    Those of a GGUF file are written into a directory that is removed after the block.

    Args:
        path: as in `tokenizer_directory`, or a GGUF file.

    Raises:
        CheckpointError: a GGUF file is damaged, or its tokenizer is not supported.
    """
    path = model_path(path)
    if not is_gguf(path):
        yield tokenizer_directory(path)
        return
    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(path, Path(directory))
        yield Path(directory)


def _dtype_of(weights: dict[str, Any], config: ModelConfig) -> str:
    """The one dtype of all weights that are not quantized."""
    arrays = flat(weights)
    for name, leaf in quantized_arrays(config).items():
        found = arrays.pop(name, None)
        if found is None or (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
            raise CheckpointError(
                f"The configuration of {config.name} calls weights quantized ({config.weights}), "
                f"where {name} is {_one(leaf)}; the model has {_one(found)}. Save what "
                "ffjax.quantize returns."
            )
    names = sorted({leaf.dtype.name for leaf in arrays.values()})
    if len(names) > 1:
        raise CheckpointError(
            f"A model's weights share one dtype; these have {', '.join(names)}. "
            "Cast them before saving."
        )
    return supported_dtype("A checkpoint's weights are", names[0]).name


def _one(leaf: Any) -> str:
    return "no such array" if leaf is None else f"{leaf.dtype.name}{list(leaf.shape)}"


def _check_arrays(path: Path, arrays: dict[str, Any], wanted: Mapping[str, Any]) -> None:
    """Whether the weights are those that the manifest promises, before any is read."""
    stored = {name: _one(array) for name, array in arrays.items()}
    expected = {name: _one(leaf) for name, leaf in wanted.items()}
    scales = {name for name in stored.keys() ^ expected.keys() if name.endswith("_scale")}
    if scales:
        name = min(scales)
        found, needed = "quantized", "not quantized"
        if name in expected:
            found, needed = needed, found
        raise CheckpointError(
            f"The weights of the checkpoint at {path} are not those of its {MANIFEST}: "
            f"{name.removesuffix('_scale')} is {found}, and in the model there it is {needed}. "
            "Copy or save it again."
        )
    for name in sorted(stored.keys() | expected.keys()):
        if (found := stored.get(name)) != (needed := expected.get(name)):
            raise CheckpointError(
                f"The weights of the checkpoint at {path} are not those of its {MANIFEST}: "
                f"{name} is {found or 'missing'}, and the model there has "
                f"{needed or 'no such weight'}. Copy or save it again."
            )
