"""A directory that appears whole or not at all: written beside its place, then renamed to it."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from checkpoints.interrupts import interrupts_held_back

__all__ = ["written_beside"]


@contextlib.contextmanager
def written_beside(path: Path, check_free: Callable[[], None]) -> Iterator[Path]:
    """An empty directory beside `path`, renamed to `path` when the block ends well.

    An error or Ctrl-C within the block leaves nothing of it, and what was at `path` as it was.

    Args:
        path: where the directory is to appear; the directories above it are made too.
        check_free: raises if nothing may be put at `path`. Called at the start and again
            before the renaming; what is at `path` after it has returned is replaced.
    """
    check_free()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _removed_at_end(_beside(path, "partial")) as partial:
        partial.mkdir()
        yield partial
        check_free()
        _move_into_place(partial, path)


def _beside(path: Path, role: str) -> Path:
    """A free name beside `path`, hence on the same file system."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.{role}"


@contextlib.contextmanager
def _removed_at_end(directory: Path) -> Iterator[Path]:
    """The directory, removed with what is left of it, whatever happens."""
    try:
        yield directory
    finally:
        with interrupts_held_back():
            shutil.rmtree(directory, ignore_errors=True)


def _move_into_place(partial: Path, path: Path) -> None:
    """Renames the finished directory to `path`; one that was there goes last."""
    if not path.exists():
        partial.rename(path)
        return
    old = _beside(path, "replaced")
    with interrupts_held_back():
        path.rename(old)
        try:
            partial.rename(path)
        except BaseException:
            old.rename(path)  # what was there comes back
            raise
        shutil.rmtree(old, ignore_errors=True)
