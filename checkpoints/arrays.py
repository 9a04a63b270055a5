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
import os
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from checkpoints.atomic import why_not_written
from checkpoints.host_arrays import empty
from checkpoints.manifest import CheckpointError, NotWrittenError
from checkpoints.skeleton import nested
from ffjax.interrupts import interrupts_held_back

__all__ = [
    "forget_where_written",
    "lay_out",
    "open_arrays",
    "read_array",
    "read_opened",
    "write_array",
]

# Numbers that TensorStore writes at a time, in bytes. A chunk is copied before.
_CHUNK_BYTES = 64 << 20
# What may be on its way at a time when an array is read, in bytes.
_READ_BYTES = 1 << 30
# Files are mapped into memory and copied from there to their place. Read into memory of its own
# first, every byte costs a page that the system has to find and to clear: on two cores, 5 s in
# place of 1 s for 2.5 GB.
_MAPPED = tensorstore.Context({"file_io_mode": {"mode": "memmap"}})
# More than Orbax lays out, files that come and go among it, in all and for each array.
_LAID_OUT_BYTES, _LAID_OUT_BYTES_AN_ARRAY = 128 << 10, 16 << 10
# What a key ends with that describes an array.
_ARRAY = "/.zarray"
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
    # Here: importing it takes longer than a small model takes to load, and reading does without.
    import orbax.checkpoint as ocp

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
        # What Orbax has set stays, but for the shape, and for the compression: it makes bfloat16
        # weights smaller by a quarter, and takes longer to undo than a disk takes to read them.
        made_by_orbax = json.loads(tensorstore.KvStore.open(kvstore).result()[".zarray"])
        rows = _rows_of_a_chunk(array)
        spec = {
            "driver": "zarr",
            "kvstore": kvstore,
            "store_data_equal_to_fill_value": True,  # as Orbax: what is missing is damage
            "metadata": {
                **made_by_orbax,
                "compressor": None,
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


def open_arrays(directory: Path) -> dict[str, tensorstore.TensorStore]:
    """Every array of a checkpoint by its dotted name: shape and dtype, no numbers yet.

    What there is, whoever wrote it: Orbax's own notes are not asked.

    Raises:
        ValueError, OSError: as TensorStore says it.
    """
    names = [
        key.decode().removesuffix(_ARRAY)
        for key in tensorstore.KvStore.open(_kvstore(directory)).result().list().result()
        if key.endswith(_ARRAY.encode())
    ]
    opened = {name: _open(directory, name) for name in names}
    return {name: array.result() for name, array in opened.items()}


def read_opened(store: tensorstore.TensorStore, dtype: Any = None) -> np.ndarray:
    """The numbers of an array, on the host.

    Chunks are read, decompressed and put in place side by side; what is on its way is bounded.

    Args:
        store: the array, as `open_arrays` gives it.
        dtype: to which it is cast; None: as it is.

    Raises:
        ValueError, OSError: as TensorStore says it.
    """
    if dtype is not None and store.dtype.numpy_dtype != dtype:
        store = tensorstore.cast(store, np.dtype(dtype))
    out = empty(store.shape, store.dtype.numpy_dtype)
    target = tensorstore.array(out)
    chunk = store.chunk_layout.read_chunk.shape
    rows = (chunk[0] if chunk else None) or len(out)
    chunk_bytes = rows * math.prod(store.shape[1:]) * out.itemsize
    most = max(2, min(2 * (os.cpu_count() or 1), _READ_BYTES // max(chunk_bytes, 1)))
    under_way: deque[Any] = deque()
    for start in range(0, store.shape[0], rows):
        if len(under_way) == most:
            under_way.popleft().result()
        stop = min(start + rows, store.shape[0])
        under_way.append(target[start:stop].write(store[start:stop]))
    while under_way:
        under_way.popleft().result()
    return out


def read_array(directory: Path, name: str) -> np.ndarray:
    """An array of a checkpoint, on the host.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return read_opened(_open(directory, name).result())
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"The array {name} of the checkpoint at {directory.parent} cannot be read: "
            f"{why_not_written(error)}. Copy or save it again."
        ) from error


def _open(directory: Path, name: str) -> tensorstore.Future[tensorstore.TensorStore]:
    spec = {
        "driver": "zarr",
        "kvstore": _kvstore(directory, name),
        "fill_missing_data_reads": False,  # as Orbax: an error, not zeros
    }
    return tensorstore.open(spec, open=True, context=_MAPPED)


def _kvstore(directory: Path, name: str | None = None) -> dict[str, Any]:
    """Where an array lies; or all of them."""
    base = {"driver": "file", "path": f"{directory}/"}
    return {"driver": "ocdbt", "base": base, "path": "" if name is None else f"{name}/"}


def _rows_of_a_chunk(array: np.ndarray) -> int:
    row = math.prod(array.shape[1:]) * array.itemsize
    return max(1, min(len(array), _CHUNK_BYTES // row))
