"""Checkpoints of ours, made of models that come in."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from checkpoints.adapters import merge_adapter
from checkpoints.incoming import Conversion, Incoming, write_incoming
from checkpoints.manifest import supported_dtype
from checkpoints.places import check_apart, check_free, model_path, real_path

__all__ = ["convert_incoming"]


def convert_incoming(
    kind: type[Incoming],
    source: str | Path,
    path: str | Path,
    *,
    dtype: Any,
    overwrite: bool,
    ignore_fields: Collection[str],
    adapter: str | Path | None,
    integers: bool,
    progress: Callable[[int, int], None] | None,
) -> Conversion:
    """Makes a checkpoint of a model of some kind; see `convert_hf` and `convert_gguf`.

    Args:
        kind: what `source` is opened as.
        source: the folder or file.
        path: the checkpoint to make.
        dtype: as in those.
        overwrite: as in those.
        ignore_fields: as in those.
        adapter: as in those, whose numbers are whole then.
        integers: as in those.
        progress: as in those.

    Raises:
        FileNotFoundError: as those.
        FileExistsError: as those.
        CheckpointError: as those.
        NotImplementedError: as those.
    """
    path = real_path(path)
    dtype = supported_dtype("A checkpoint's weights are", dtype)
    check_free(path, overwrite)
    check_apart(path, source := model_path(source))
    whole = not integers or adapter is not None
    incoming = kind.open(source, ignore_fields=ignore_fields, integers=not whole)
    incoming.check_companions()
    return write_incoming(
        incoming if adapter is None else merge_adapter(incoming, adapter, out=path),
        path,
        dtype=dtype,
        overwrite=overwrite,
        ignored=ignore_fields,
        progress=progress,
    )
