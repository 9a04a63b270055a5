"""The safetensors files of a Hugging Face folder: where each tensor lies, read and written.

A safetensors file is 8 bytes with the length of a header, the header (JSON: dtype, shape and
place of every tensor), and the tensors' numbers without a gap. It is read here by hand because
that lets a tensor go from the file to its rows of a stacked array with no copy between, and
the memory it took does not grow with the file, as a mapped file's would.
Source: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from checkpoints.manifest import CheckpointError, a_gguf_file

__all__ = [
    "FLOATS",
    "INDEX",
    "LFS_POINTER",
    "SINGLE",
    "StoredTensor",
    "TensorWriter",
    "broken_link",
    "check_dtypes",
    "downloaded_json",
    "dtype_name",
    "fill",
    "find_tensors",
    "read_header",
    "same_numbers",
    "some",
    "truncated",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}

FLOATS = tuple(_DTYPES)
"""Dtypes that are read, as safetensors calls them."""

# Dtypes in which nobody stores weights, quantized ones either: masks, positions, counters.
_NO_WEIGHTS = ("BOOL", "I64", "U64")

# How a file begins that Git LFS left in place of a large one.
LFS_POINTER = b"version https://git-lfs"
# The longest header that the safetensors library accepts: more is no header.
_LONGEST_HEADER = 100_000_000

# Numbers that are cast or compared at a time, in bytes of the file.
_BLOCK_BYTES = 16 << 20
# Numbers that a thread reads at a time, in bytes of the file.
_PART_BYTES = 32 << 20
_ALL = slice(None)


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file.

    Attributes:
        name: its name there.
        file: the file.
        dtype: its dtype, as safetensors calls it: "BF16", "F32".
        shape: its shape.
        offset: where its numbers start in the file, in bytes.
        nbytes: how many bytes they take.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def parts(self) -> list[slice]:
        """The numbers of the tensor in parts that can be read side by side."""
        count = math.prod(self.shape)
        size = _PART_BYTES // _DTYPES[self.dtype].itemsize
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def read_into(self, out: np.ndarray, part: slice = _ALL) -> None:
        """Reads the tensor into an array, rounding where the array's dtype is another.

        Args:
            out: contiguous, of the tensor's shape; bfloat16 or float32.
            part: which of the numbers, one of `parts`; all of them if not said.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        flat = out.reshape(-1)[part]
        stored = _DTYPES[self.dtype]
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + (part.start or 0) * stored.itemsize)
            if stored == out.dtype:
                fill(file, flat.view(np.uint8), self)
                return
            block = np.empty(min(flat.size, _BLOCK_BYTES // stored.itemsize), stored)
            for start in range(0, flat.size, block.size):
                filled = block[: flat.size - start]
                fill(file, filled.view(np.uint8), self)
                flat[start : start + filled.size] = filled


def downloaded_json(file: Path) -> Any:
    """What the JSON in a downloaded file says.

    Raises:
        CheckpointError: it is not JSON.
    """
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is damaged: it is not JSON ({error}). Download or copy it again."
        ) from None


def truncated(file: Path, found: int, needed: int) -> CheckpointError:
    """The error of a file that is shorter, or longer, than its header says."""
    return CheckpointError(
        f"{file} is damaged: it has {found} bytes, and its header describes {needed}. "
        "Download or copy it again."
    )


def read_header(file: Path) -> list[StoredTensor]:
    """Every tensor of a safetensors file, none of them read.

    Raises:
        CheckpointError: the file is truncated, damaged, or no safetensors file.
        OSError: it cannot be opened.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        first = opened.read(8)
        if first == LFS_POINTER[:8] and opened.read(len(LFS_POINTER) - 8) == LFS_POINTER[8:]:
            raise CheckpointError(
                f"{file} is a pointer of Git LFS, which stands for the weights and does not hold "
                "them. Run `git lfs pull` there, or download the file."
            )
        length = int.from_bytes(first, "little")
        if size < 8 or length > _LONGEST_HEADER or 8 + length > size:
            raise CheckpointError(
                f"{file} is damaged, or no safetensors file: it has {size} bytes, and does not "
                "begin with the length of a header that fits into them. Download or copy it again."
            )
        text = opened.read(length)
    start, tensors = 8 + length, []
    try:
        # Pairs, not a dict: of two tensors with one name a dict would keep the last.
        entries = json.loads(text, object_pairs_hook=list)
        for name, pairs in entries:
            if name == "__metadata__":
                continue
            entry = dict(pairs)
            first, last = entry["data_offsets"]
            shape = tuple(int(size) for size in entry["shape"])
            stored = StoredTensor(name, file, entry["dtype"], shape, start + first, last - first)
            tensors.append(stored)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{file} is damaged: its header is not that of a safetensors file ({_reason(error)}). "
            "Download or copy it again."
        ) from None
    _check_places(file, size, start, tensors)
    return tensors


def _reason(error: Exception) -> str:
    return f"there is no {error}" if isinstance(error, KeyError) else str(error)


def _check_places(file: Path, size: int, start: int, tensors: list[StoredTensor]) -> None:
    """Whether the tensors fill the file, without a gap, each with what its shape takes."""
    end = start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end or tensor.nbytes < 0:
            raise CheckpointError(
                f"{file} is damaged: the tensor {tensor.name} starts at byte {tensor.offset}, "
                f"and the one before it ends at {end}. Download or copy it again."
            )
        end += tensor.nbytes
        known = _DTYPES.get(tensor.dtype)
        if known is not None and tensor.nbytes != math.prod(tensor.shape) * known.itemsize:
            raise CheckpointError(
                f"{file} is damaged: the tensor {tensor.name}, {tensor.dtype}"
                f"{list(tensor.shape)}, takes {tensor.nbytes} bytes. Download or copy it again."
            )
    if end != size:
        raise truncated(file, size, end)


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a Hugging Face folder, by its name.

    As transformers does, takes `model.safetensors` if there is one, else the shards that
    `model.safetensors.index.json` lists.

    Raises:
        CheckpointError: there are no safetensors; a shard is missing, truncated or damaged;
            the index promises tensors that its shards lack; or a name is there twice.
    """
    if (directory / SINGLE).is_file():
        promised, files = {}, [directory / SINGLE]
    elif (directory / INDEX).is_file():
        promised = _read_index(directory)
        files = [directory / name for name in sorted(set(promised.values()))]
    elif (link := broken_link(directory, SINGLE, INDEX)) is not None:
        raise CheckpointError(link)
    elif shards := sorted(file.name for file in directory.glob("*.safetensors")):
        raise CheckpointError(
            f"Safetensors in shards have an index; {directory} has {some(shards, 3)}, and no "
            f"{INDEX}. Download that, too."
        )
    else:
        raise CheckpointError(
            a_gguf_file(directory)
            or f"A Hugging Face folder has {SINGLE} or {INDEX}; {directory} has neither. Weights "
            "in other formats (pytorch_model.bin) are not supported: save them as safetensors."
        )
    if (link := broken_link(directory, *(file.name for file in files))) is not None:
        raise CheckpointError(link)
    if absent := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{directory} is incomplete: of the {len(files)} shards that {INDEX} lists, "
            f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing. Download it again."
        )
    found: dict[str, StoredTensor] = {}
    twice: list[str] = []
    for tensor in (tensor for file in files for tensor in read_header(file)):
        if (other := found.get(tensor.name)) is not None:
            twice.append(f"{tensor.name} (in {other.file.name} and {tensor.file.name})")
        found[tensor.name] = tensor
    if twice:
        raise CheckpointError(
            f"A tensor's name is there once; {directory} has twice: {', '.join(twice)}."
        )
    elsewhere = [
        f"{name} (in {file})"
        for name, file in sorted(promised.items())
        if name not in found or found[name].file.name != file
    ]
    if elsewhere:
        raise CheckpointError(
            f"{INDEX} of {directory} lists tensors that are not in the shards it names: "
            f"{', '.join(elsewhere)}. Download it again."
        )
    return found


def broken_link(directory: Path, *names: str) -> str | None:
    """A sentence, where a file of a folder is a link to what is not there; None if none is.

    As in the Hugging Face cache, whose files are links, after a download that did not finish.
    """
    for name in names:
        file = directory / name
        if file.is_symlink() and not file.exists():
            return (
                f"{file} is a link, and {file.readlink()}, to which it leads, is not there. "
                "Download it again."
            )
    return None


def check_dtypes(directory: Path, tensors: Iterable[StoredTensor]) -> None:
    """Whether all tensors are of a dtype that can be read.

    Args:
        directory: the folder, for messages.
        tensors: those that the model has a use for.

    Raises:
        CheckpointError: one is not.
    """
    odd = [tensor for tensor in tensors if tensor.dtype not in _DTYPES]
    if not odd:
        return
    if all(tensor.dtype in _NO_WEIGHTS for tensor in odd):
        hint = (
            "Truth values and integers of this size are no weights, as a mask or a counter is "
            "none: these tensors are none of a model that is supported."
        )
    else:
        hint = "The weights are quantized: use a version of the model whose weights are not."
    names = some(f"{tensor.name} ({tensor.dtype})" for tensor in odd)
    raise CheckpointError(
        f"Tensors of another dtype than {', '.join(_DTYPES)} are not supported; {directory} has "
        f"{names}. {hint}"
    )


def _read_index(directory: Path) -> dict[str, str]:
    """Of every tensor, the name of its shard."""
    file = directory / INDEX
    try:
        index = json.loads(file.read_bytes())["weight_map"]
        promised = {str(name): str(shard) for name, shard in index.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f'{file} is damaged: it holds no "weight_map" ({_reason(error)}). Download or copy it '
            "again."
        ) from None
    # A shard lies beside its index: a path that leads elsewhere is nobody's honest download.
    if leading := [shard for shard in promised.values() if Path(shard).name != shard]:
        raise CheckpointError(f"{file} names a shard outside its folder: {leading[0]!r}.")
    return promised


def some(names: Iterable[str], most: int = 20, between: str = ", ") -> str:
    """The names, or the first of very many, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


class _Placed(Protocol):
    @property
    def file(self) -> Path: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


def fill(file: BinaryIO, out: np.ndarray, tensor: _Placed) -> None:
    """Reads as many bytes as an array has.

    Args:
        file: the open file, at the place where they begin.
        out: uint8, contiguous.
        tensor: what they are of: its file, and where it lies there.

    Raises:
        CheckpointError: the file ends before.
    """
    view, done = memoryview(out).cast("B"), 0
    while done < len(view):
        # A system may return less than was asked for: Linux, 2 GiB at most.
        got = file.readinto(view[done:])  # pyright: ignore[reportAttributeAccessIssue]
        if not got:
            size = tensor.file.stat().st_size
            raise truncated(tensor.file, size, tensor.offset + tensor.nbytes)
        done += got


def same_numbers(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors are the same, bit by bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with a.file.open("rb") as left, b.file.open("rb") as right:
        left.seek(a.offset)
        right.seek(b.offset)
        remaining = a.nbytes
        while remaining:
            count = min(remaining, _BLOCK_BYTES)
            if left.read(count) != right.read(count):
                return False
            remaining -= count
    return True


def dtype_name(dtype: Any) -> str:
    """What safetensors calls a dtype: "BF16" or "F32"."""
    return next(name for name, known in _DTYPES.items() if known == np.dtype(dtype))


class TensorWriter:
    """Writes a safetensors file, one tensor after the other, in the order announced."""

    def __init__(self, file: Path, dtype: Any, shapes: dict[str, tuple[int, ...]]):
        """Opens the file and writes its header.

        Args:
            file: the file to make.
            dtype: of all its tensors.
            shapes: their shapes by name, in the order in which they will be written.
        """
        # transformers loads no file that does not say for which framework it was saved.
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
            header[name] = {
                "dtype": dtype_name(dtype),
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8
        self._dtype = np.dtype(dtype)
        self._expected = list(shapes.items())
        self._file = file.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Writes the next tensor.

        Raises:
            CheckpointError: the file cannot be written: the disk is full, for example.
        """
        expected = self._expected.pop(0)
        if expected != (name, tensor.shape) or tensor.dtype != self._dtype:
            raise AssertionError(f"{name} {tensor.shape} comes where {expected} was announced.")
        numbers = memoryview(np.ascontiguousarray(tensor).view(np.uint8).reshape(-1))
        try:
            self._file.write(numbers)
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"The tensor {name} cannot be written: {error.strerror}. Is the disk full?"
            ) from error

    def __enter__(self) -> TensorWriter:
        """The writer, its file closed at the end of the block."""
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Closes the file."""
        # On a full disk closing fails as writing did, and would hide its sentence.
        with contextlib.suppress(*(() if error is None else (OSError,))):
            self._file.close()
