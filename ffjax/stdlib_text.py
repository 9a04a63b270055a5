"""The shipped model's text: the Python standard library's own sources, some of them held out."""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
from pathlib import Path

__all__ = ["Source", "is_held_out", "read_sources"]

# Left out, wherever they stand in a path: what was installed later;
_INSTALLED = ("site-packages", "dist-packages", "__pycache__")
# tests, which many systems do not install;
_TESTS = ("test", "tests", "idle_test")
# near copies of other files, that would flatter the held-out figure: tables of codecs, and
# lib2to3's own tokenizer and drivers;
_NEAR_COPIES = ("encodings", "lib2to3")
# documentation, generated as one Python file.
_GENERATED = ("pydoc_data",)
LEFT_OUT = frozenset((*_INSTALLED, *_TESTS, *_NEAR_COPIES, *_GENERATED))
# One file in so many is kept out of training.
HELD_OUT_ONE_IN = 16


@dataclasses.dataclass(frozen=True)
class Source:
    """One whole file.

    Attributes:
        name: its path within the library, with forward slashes.
        text: its bytes, lines ended by a line feed.
    """

    name: str
    text: bytes


def is_held_out(name: str) -> bool:
    """Whether the file of that name is kept out of training.

    The name alone decides, so that a file is held out whatever else a machine has, and in
    every version of Python.
    """
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def read_sources(root: Path | None = None) -> tuple[list[Source], list[Source]]:
    """The standard library's files, in the order of their names.

    Args:
        root: the directory to read; None: the running Python's standard library.

    Returns:
        The files to train on, and those held out.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    train: list[Source] = []
    held_out: list[Source] = []
    for name, file in sorted((f.relative_to(root).as_posix(), f) for f in root.rglob("*.py")):
        # _sysconfigdata_* is written by the build and differs from machine to machine.
        if LEFT_OUT.intersection(name.split("/")) or name.startswith("_sysconfigdata"):
            continue
        if text := file.read_bytes().replace(b"\r\n", b"\n"):
            (held_out if is_held_out(name) else train).append(Source(name, text))
    return train, held_out
