"""What a GGUF file says of itself: metadata by name, and where its tensors lie.

A GGUF file is the letters GGUF, a version, two counts, fields with a name, a type and a value, for
each tensor its name, sizes, type and place, and the tensors' bytes, each at a multiple of an
alignment. It is read here by hand: that gives a sentence for whatever is wrong in one, and takes
a fraction of a second where a vocabulary has 250,000 tokens.
Source: https://github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints.gguf.tensors import SIZES, GGUFTensor, type_name
from checkpoints.hf_files import LFS_POINTER, some
from checkpoints.manifest import CheckpointError

__all__ = ["MAGIC", "Header", "read_header"]

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32

# Types of values: the numbers by struct's letters, and two that are none.
_NUMBERS = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_AGAIN = "Download or copy it again."


class Header(NamedTuple):
    """What comes before the tensors' bytes.

    Attributes:
        file: the file.
        fields: the metadata: numbers, strings, truth values, lists of strings, and arrays.
        tensors: every tensor, none of them read.
    """

    file: Path
    fields: dict[str, Any]
    tensors: list[GGUFTensor]


def read_header(file: Path) -> Header:
    """Reads what a GGUF file says of itself.

    Args:
        file: the file.

    Raises:
        CheckpointError: it is no GGUF file, or truncated, damaged, of another version or byte
            order, one of several parts, or has tensors of types that are not supported.
        OSError: it cannot be opened.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        first = opened.read(len(LFS_POINTER))
        if first == LFS_POINTER:
            raise CheckpointError(
                f"{file} is a pointer of Git LFS, which stands for the model and does not hold it. "
                "Run `git lfs pull` there, or download the file."
            )
        if first[:4] != MAGIC:
            raise CheckpointError(
                f"A GGUF file begins with the letters GGUF; {file} does not, and is none. {_AGAIN}"
            )
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _Reader(file, mapped, size).header()


class _Reader:
    """Walks through a header."""

    def __init__(self, file: Path, mapped: mmap.mmap, size: int):
        self._file = file
        self._bytes = mapped
        self._size = size
        self._at = 4

    def header(self) -> Header:
        self._check_version()
        count, fields_count = self._number("Q"), self._number("Q")
        fields: dict[str, Any] = {}
        for _ in range(fields_count):
            name = self._string()
            if name in fields:
                raise self._damaged(f"the field {name} is there twice")
            fields[name] = self._value(self._number("I"))
        _refuse_a_part(self._file, fields)
        tensors = [self._tensor() for _ in range(count)]
        alignment = fields.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise self._damaged(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        tensors = [one._replace(offset=start + one.offset) for one in tensors]
        _check_types(self._file, tensors)
        self._check_places(tensors, alignment)
        return Header(self._file, fields, tensors)

    def _check_version(self) -> None:
        version = self._number("I")
        if version & 0xFFFF == 0 and version:
            raise CheckpointError(
                f"A GGUF file is read where its numbers are little-endian; those of {self._file} "
                "are big-endian. Take the little-endian file of the model."
            )
        if version not in _VERSIONS:
            raise CheckpointError(
                f"GGUF files of version {' and '.join(map(str, _VERSIONS))} are read; {self._file} "
                f"is of version {version}. Take a newer file of the model, or update ffjax."
            )

    def _tensor(self) -> GGUFTensor:
        name = self._string()
        sizes = [self._number("Q") for _ in range(self._number("I"))]
        kind, offset = self._number("I"), self._number("Q")
        # Theirs begin with the size of a row; ours end with it.
        shape, dtype = tuple(reversed(sizes)), type_name(kind)
        numbers, nbytes = SIZES.get(dtype, (1, 0))
        if numbers > 1 and (not shape or shape[-1] % numbers):
            raise self._damaged(
                f"a row of the tensor {name} has {shape[-1] if shape else 1} numbers, and {dtype} "
                f"stores {numbers} at a time"
            )
        return GGUFTensor(
            name, self._file, dtype, shape, offset, math.prod(shape) // numbers * nbytes
        )

    def _check_places(self, tensors: list[GGUFTensor], alignment: int) -> None:
        """Whether each tensor lies within the file, none within another."""
        end, before = 0, ""
        for tensor in sorted(tensors, key=lambda one: (one.offset, one.nbytes)):
            if tensor.offset < end:
                raise self._damaged(f"the tensors {before} and {tensor.name} lie in one place")
            if tensor.offset % alignment:
                raise self._damaged(
                    f"the tensor {tensor.name} starts at byte {tensor.offset}, which is no "
                    f"multiple of {alignment}"
                )
            end, before = tensor.offset + tensor.nbytes, tensor.name
        if end > self._size:
            raise CheckpointError(
                f"{self._file} is damaged: it has {self._size} bytes, and its header describes "
                f"{end}. {_AGAIN}"
            )

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(self._letter(kind))
        kind, count = self._number("I"), self._number("Q")
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        dtype = np.dtype(f"<{self._letter(kind)}")
        start = self._take(count * dtype.itemsize)
        return np.frombuffer(self._bytes, dtype, count, start).copy()

    def _letter(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise self._damaged(f"a value has type {kind}, which no version of GGUF has")
        return _NUMBERS[kind]

    def _number(self, letter: str) -> Any:
        size = struct.calcsize(letter)
        return struct.unpack_from(f"<{letter}", self._bytes, self._take(size))[0]

    def _string(self) -> str:
        length = self._number("Q")
        start = self._take(length)
        # Tokens of some vocabularies are not UTF-8.
        return self._bytes[start : start + length].decode("utf-8", "replace")

    def _take(self, count: int) -> int:
        """Steps over bytes, and says where they begin."""
        start = self._at
        if start + count > self._size:
            raise CheckpointError(
                f"{self._file} is damaged: it ends at byte {self._size}, before its header does. "
                f"{_AGAIN}"
            )
        self._at = start + count
        return start

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._file} is damaged: {why}. {_AGAIN}")


def _refuse_a_part(file: Path, fields: dict[str, Any]) -> None:
    count = fields.get("split.count", 0)
    if isinstance(count, int) and count > 1:
        raise CheckpointError(
            f"A GGUF file is read in one piece; {file} is one of {count} parts. Put them together "
            "first: llama-gguf-split --merge FIRST_PART WHOLE_FILE."
        )


def _check_types(file: Path, tensors: list[GGUFTensor]) -> None:
    odd = [tensor for tensor in tensors if tensor.dtype not in SIZES]
    if odd:
        names = some((f"{one.name} ({one.dtype})" for one in odd), most=3)
        raise CheckpointError(
            f"Tensors of another type than {', '.join(SIZES)} are not supported; {file} has "
            f"{names}. Take another file of the model: Q8_0 is nearest to the original, Q4_K_M is "
            "small."
        )
