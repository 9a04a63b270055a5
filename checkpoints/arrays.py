"""A checkpoint's weights, block by block: written and read without a whole array in memory.

Orbax writes a tree of arrays at once, so all of them exist at once. Here Orbax lays out a tree
of one-element arrays, and TensorStore, through which Orbax itself reads and writes, gives each
its shape and its numbers. What comes out is an Orbax checkpoint like any other.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from checkpoints.atomic import why_not_written
from checkpoints.blocks import Block, ranges, rows_of_a_chunk
from checkpoints.host_arrays import empty
from checkpoints.manifest import NotWrittenError
from checkpoints.skeleton import nested
from ffjax.interrupts import interrupts_held_back

__all__ = [
    "forget_where_written",
    "open_arrays",
    "read_blocks",
    "read_opened",
    "write_blocks",
]

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


def _lay_out(directory: Path, shapes: Mapping[str, Any]) -> None:
    """Makes an Orbax checkpoint whose arrays are still to be written.

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


def write_blocks(directory: Path, shapes: Mapping[str, Any], blocks: Iterable[Block]) -> None:
    """Makes an Orbax checkpoint of arrays that come block by block.

    Holds, beside a block, a few chunks of 64 MiB. A Ctrl-C takes effect between chunks.

    Args:
        directory: where it is made.
        shapes: shape and dtype of every array by its dotted name.
        blocks: all rows of every array; those of one array in order.

    Raises:
        NotWrittenError: it cannot be written: the disk is full, for example.
    """
    _lay_out(directory, shapes)
    stores: dict[str, tensorstore.TensorStore] = {}
    written = dict.fromkeys(shapes, 0)
    for block in blocks:
        name, start, numbers = block
        del block
        assert start == written[name], f"Rows {written[name]} of {name} come next, not {start}."
        try:
            if name not in stores:
                stores[name] = _make(directory, name, shapes[name], len(numbers))
            _write(stores[name], start, numbers)
        except _OF_WRITING as error:
            raise NotWrittenError(
                f"The array {name} cannot be written: {why_not_written(error)}. Is the disk full?"
            ) from error
        written[name] = start + len(numbers)
        if written[name] == shapes[name].shape[0]:
            del stores[name]
        del numbers  # before the next is allocated
    if missing := [name for name, leaf in shapes.items() if written[name] != leaf.shape[0]]:
        raise AssertionError(f"Rows of {missing} have not come.")


def _make(directory: Path, name: str, leaf: Any, rows: int) -> tensorstore.TensorStore:
    """Gives an array its shape; its numbers are still missing.

    Args:
        directory: where the arrays lie.
        name: its dotted name.
        leaf: its shape and dtype.
        rows: of its first block.
    """
    kvstore = _kvstore(directory, name)
    # What Orbax has set stays, but for the shape, and for the compression: it makes bfloat16
    # weights smaller by a quarter, and takes longer to undo than a disk takes to read them.
    made_by_orbax = json.loads(tensorstore.KvStore.open(kvstore).result()[".zarray"])
    spec = {
        "driver": "zarr",
        "kvstore": kvstore,
        "store_data_equal_to_fill_value": True,  # as Orbax: what is missing is damage
        "metadata": {
            **made_by_orbax,
            "compressor": None,
            "shape": leaf.shape,
            "chunks": _chunk(leaf, rows),
        },
    }
    with interrupts_held_back():
        return tensorstore.open(spec, create=True, delete_existing=True).result()


def _chunk(leaf: Any, rows: int) -> tuple[int, ...]:
    """The shape of an array's chunks. A row that is more than a chunk is cut along its columns."""
    rows = min(rows, rows_of_a_chunk(leaf.shape, leaf.dtype))
    if rows > 1 or len(leaf.shape) < 2:
        return (rows, *leaf.shape[1:])
    columns, *inner = leaf.shape[1:]
    most = rows_of_a_chunk((columns, *inner), leaf.dtype)
    return (1, -(-columns // -(-columns // most)), *inner)  # all of one size, or nearly


def _write(store: tensorstore.TensorStore, start: int, numbers: np.ndarray) -> None:
    """Writes rows, which begin where a chunk does, chunk by chunk."""
    rows, *columns = (size or 1 for size in store.chunk_layout.write_chunk.shape or ())
    every = range(0, len(numbers), rows)
    across = range(0, store.shape[1], columns[0]) if columns else (0,)
    # One at a time: TensorStore would copy all of them before it has written the first.
    for first, left in itertools.product(every, across):
        part = np.s_[first : first + rows]
        place = np.s_[start + first : min(start + first + rows, start + len(numbers))]
        if columns:
            right = min(left + columns[0], store.shape[1])
            part, place = (part, np.s_[left:right]), (place, np.s_[left:right])
        with interrupts_held_back():
            store[place].write(numbers[part]).result()


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
    """The numbers of an array, or of rows of one (`store[start:stop]`), on the host.

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
    store = store[tensorstore.d[:].translate_to[0]]
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


def read_blocks(
    name: str, store: tensorstore.TensorStore, dtype: Any = None, *, whole: bool = False
) -> Iterator[Block]:
    """The blocks of an array of a checkpoint, each read when it is asked for.

    Args:
        name: its dotted name.
        store: the array, as `open_arrays` gives it.
        dtype: to which it is cast; None: as it is.
        whole: whether it comes as one block.

    Raises:
        ValueError, OSError: as TensorStore says it.
    """
    dtype = store.dtype.numpy_dtype if dtype is None else np.dtype(dtype)
    for start, stop in [(0, store.shape[0])] if whole else ranges(store.shape, dtype):
        yield Block(name, start, read_opened(store[start:stop], dtype))


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
