"""A checkpoint's weights, array by array: written and read without the whole model in memory.

Orbax writes a tree of arrays at once, so all of them exist at once. Here Orbax lays out a tree
of one-element arrays, and TensorStore, through which Orbax itself reads and writes, gives each
its shape and its numbers. What comes out is an Orbax checkpoint like any other.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from checkpoints.atomic import why_not_written
from checkpoints.manifest import CheckpointError, NotWrittenError
from checkpoints.skeleton import nested
from ffjax.interrupts import interrupts_held_back

__all__ = ["forget_where_written", "lay_out", "read_array", "write_array"]

# Numbers that TensorStore compresses and writes at a time, in bytes. A chunk is copied before
# it is compressed, and each processor holds one.
_CHUNK_BYTES = 64 << 20
# More than Orbax lays out, files that come and go among it, in all and for each array.
_LAID_OUT_BYTES, _LAID_OUT_BYTES_AN_ARRAY = 128 << 10, 16 << 10
# What Orbax and TensorStore raise where the system refuses a write.
_OF_WRITING = (ValueError, OSError)


def lay_out(directory: Path, shapes: Mapping[str, Any]) -> None:
    """Makes an Orbax checkpoint whose arrays are still to be written by `write_array`.

    Args:
        directory: where Orbax makes it.
        shapes: shape and dtype of every array by its dotted name.

    Raises:
        NotWrittenError: it cannot be written.
    """
    leaves = {name: np.zeros((1,) * len(leaf.shape), leaf.dtype) for name, leaf in shapes.items()}
    reason = None
    with interrupts_held_back(), _tracebacks_kept():
        try:
            _check_room(directory, len(leaves))
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                checkpointer.save(directory, args=ocp.args.StandardSave(nested(leaves)))
        except Exception as error:  # Orbax raises errors of many kinds
            if not isinstance(error, _OF_WRITING):
                raise
            reason = why_not_written(error)
        if reason is not None:
            gc.collect()  # asyncio prints what its tasks ended with when they are freed
    if reason is not None:
        raise NotWrittenError(f"The checkpoint cannot be written: {reason}. Is the disk full?")
    forget_where_written(directory)


def _check_room(directory: Path, arrays: int) -> None:
    """Whether there is room for what Orbax lays out: it prints much where there is none."""
    room = directory.with_name("room")
    try:
        room.write_bytes(bytes(_LAID_OUT_BYTES + arrays * _LAID_OUT_BYTES_AN_ARRAY))
    finally:
        room.unlink(missing_ok=True)


@contextlib.contextmanager
def _tracebacks_kept() -> Iterator[None]:
    """Keeps to itself what Orbax and asyncio log within the block: they raise it, too."""

    def quiet(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(quiet)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(quiet)


def forget_where_written(directory: Path) -> None:
    """Removes Orbax's note of where it wrote, a name that is about to go. It reads without it."""
    (directory / "commit_success.txt").unlink(missing_ok=True)


def write_array(directory: Path, name: str, array: np.ndarray) -> None:
    """Gives an array of a checkpoint made by `lay_out` its shape and its numbers.

    Holds, beside the array, a few chunks of 64 MiB. A Ctrl-C takes effect between chunks.

    Raises:
        NotWrittenError: it cannot be written: the disk is full, for example.
    """
    kvstore = _kvstore(directory, name)
    try:
        # What Orbax has set, its compression for one, stays; only the shape is another.
        made_by_orbax = json.loads(tensorstore.KvStore.open(kvstore).result()[".zarray"])
        rows = _rows_of_a_chunk(array)
        spec = {
            "driver": "zarr",
            "kvstore": kvstore,
            "store_data_equal_to_fill_value": True,  # as Orbax: what is missing is damage
            "metadata": {
                **made_by_orbax,
                "shape": array.shape,
                "chunks": (rows, *array.shape[1:]),
            },
        }
        with interrupts_held_back():
            store = tensorstore.open(spec, create=True, delete_existing=True).result()
        for start in range(0, len(array), rows):
            # One at a time: TensorStore would copy all of them before it has written the first.
            stop = min(start + rows, len(array))
            with interrupts_held_back():
                store[start:stop].write(array[start:stop]).result()
    except _OF_WRITING as error:
        raise NotWrittenError(
            f"The array {name} cannot be written: {why_not_written(error)}. Is the disk full?"
        ) from error


def read_array(directory: Path, name: str) -> np.ndarray:
    """An array of a checkpoint, on the host.

    Raises:
        CheckpointError: it cannot be read.
    """
    spec = {
        "driver": "zarr",
        "kvstore": _kvstore(directory, name),
        "fill_missing_data_reads": False,  # as Orbax: an error, not zeros
    }
    try:
        return tensorstore.open(spec, open=True).result().read().result()
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"The array {name} of the checkpoint at {directory.parent} cannot be read: "
            f"{why_not_written(error)}. Copy or save it again."
        ) from error


def _kvstore(directory: Path, name: str) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{directory}/"}
    return {"driver": "ocdbt", "base": base, "path": f"{name}/"}


def _rows_of_a_chunk(array: np.ndarray) -> int:
    row = math.prod(array.shape[1:]) * array.itemsize
    return max(1, min(len(array), _CHUNK_BYTES // row))
