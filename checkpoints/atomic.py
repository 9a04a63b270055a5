"""A directory that appears whole or not at all: written beside its place, then renamed to it.

What a failed write leaves behind is decided here: nothing. Of a process that was killed there
stay `.NAME.partial`, and `.NAME.replaced` where it had moved away what was there before; the next
write to the same place puts that back and removes the rest. A lock says whether their writer
lives: the system drops it with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from checkpoints.manifest import NotWrittenError
from ffjax.interrupts import interrupts_held_back, stops_unwind

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["why_not_written", "written_beside"]

# No room: on the disk, in a quota, in the size a file may have; or a disk that is only read.
_NO_ROOM = tuple(
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS") if hasattr(errno, name)
)
# What making room does not help against.
_PLACES = (
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOENT),
    errno.ENAMETOOLONG,
)
# A file system that knows no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def written_beside(path: Path, check_free: Callable[[], None]) -> Iterator[Path]:
    """An empty directory beside `path`, renamed to `path` when the block ends well.

    An error, Ctrl-C, SIGTERM or SIGHUP within the block leaves nothing of it, and what was at
    `path` as it was. One process at a time writes to a path.

    Args:
        path: where the directory is to appear; the directories above it are made too.
        check_free: raises if nothing may be put at `path`. Called at the start and again
            before the renaming; what is at `path` after it has returned is replaced.

    Yields:
        The directory, by a name that leads nowhere once it is given up: threads that still write
        then find no place to.

    Raises:
        FileExistsError: another process writes there now.
        NotWrittenError: the disk is full.
    """
    check_free()
    with stops_unwind(), _said_of(path), _made(path.parent), _claimed(path) as partial:
        _put_back(path)
        check_free()
        with _reachable(partial) as directory:
            yield directory
        check_free()
        _move_into_place(partial, path)


def why_not_written(error: BaseException) -> str:
    """What a write failed of, in a few words: Orbax and TensorStore go on for several lines."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    for number in _NO_ROOM:
        if os.strerror(number) in text:
            return os.strerror(number)
    return (text.strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextlib.contextmanager
def _said_of(path: Path) -> Iterator[None]:
    """A system's error of what is written becomes a sentence; one of what is read stays."""
    try:
        yield
    except NotWrittenError:
        raise
    except OSError as error:
        if error.errno not in _NO_ROOM and not _of_output(error, path):
            raise
        raise NotWrittenError(
            f"{path} cannot be written: {_cause(error, path)}. Nothing of it is left; "
            f"{'write' if error.errno in _PLACES else 'make room, or write'} elsewhere."
        ) from error


def _of_output(error: OSError, path: Path) -> bool:
    """Whether an error names the place that is written, one above it, or one beside it."""
    if error.errno is None or error.filename is None:
        return False
    place = Path(os.fsdecode(error.filename))
    beside = [_beside(path, role) for role in ("partial", "replaced")]
    return place in path.parents or any(one in (place, *place.parents) for one in (path, *beside))


def _cause(error: OSError, path: Path) -> str:
    above = next((place for place in path.parents if place.exists()), path.parent)
    if not above.is_dir():
        return f"{above} is a file, not a folder"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"you may not write in {above}"
    said = why_not_written(error)
    return f"{said[0].lower()}{said[1:]}"


@contextlib.contextmanager
def _made(directory: Path) -> Iterator[None]:
    """Makes a directory and those above it; those that were made go again after an error."""
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in missing:
            with contextlib.suppress(OSError):  # somebody else has put something there
                place.rmdir()
        raise


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[Path]:
    """An empty directory beside `path`, hence on the same file system: no other process has it.

    It is removed at the end, unless it has another name by then.
    """
    partial = _beside(path, "partial")
    lock, claimed = None, False
    try:
        with interrupts_held_back():  # an interrupt comes at its end, and finds it claimed
            lock = _lock(partial, path)
            claimed = True
        yield partial
    finally:
        with interrupts_held_back():
            if claimed and (lock is None or _is(partial, lock)):
                _remove(partial)
            if lock is not None:
                _unlock(lock)


def _beside(path: Path, role: str) -> Path:
    return path.parent / f".{path.name}.{role}"


def _lock(partial: Path, path: Path) -> int | None:
    """Makes the directory, or takes and empties a dead process's; a descriptor that locks it."""
    while True:
        try:
            partial.mkdir()
            new = True
        except FileExistsError:
            new = False
        if fcntl is None:
            if not new:
                raise _taken(path, partial)
            return None
        try:
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # its writer has just ended
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if new and error.errno in _NO_LOCKS:
                return None
            raise _taken(path, partial) from None
        if not _is(partial, lock):  # removed or renamed before it was locked
            _unlock(lock)
            continue
        for left in partial.iterdir():
            _remove(left)
        return lock


def _taken(path: Path, partial: Path) -> FileExistsError:
    return FileExistsError(
        f"One process at a time writes to a place, and another writes to {path} now. Wait until "
        f"it has ended, or write elsewhere. (If none does, remove {partial}.)"
    )


def _unlock(lock: int) -> None:
    # Closing is not enough where a child process has inherited the descriptor.
    fcntl.flock(lock, fcntl.LOCK_UN)  # pyright: ignore[reportOptionalMemberAccess]
    os.close(lock)


def _is(directory: Path, descriptor: int) -> bool:
    """Whether a name is that of an open directory."""
    try:
        return os.path.samestat(os.stat(directory), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _reachable(directory: Path) -> Iterator[Path]:
    """A name of the directory that leads nowhere after an error within the block.

    A library whose write has failed may have threads that still write, and make the directories
    they lack. Through a descriptor they cannot: it becomes that of a device, and stays open, that
    nothing else gets its number.
    """
    through, descriptor = None, -1
    if fcntl is not None:
        with interrupts_held_back():
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            through = Path(f"/proc/self/fd/{descriptor}")
            if not through.is_dir():  # Linux alone has such names
                os.close(descriptor)
                through = None
    if through is None:
        yield directory
        return
    try:
        yield through
    except BaseException:
        with interrupts_held_back():
            nowhere = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nowhere, descriptor, inheritable=False)
            os.close(nowhere)
        raise
    os.close(descriptor)


def _remove(place: Path) -> None:
    """Removes a file or directory, also one in which a thread is still putting a file."""
    for _ in range(100):
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)
        if not os.path.lexists(place):
            return
        time.sleep(0.01)


def _put_back(path: Path) -> None:
    """Ends the renaming in which another process was killed."""
    old = _beside(path, "replaced")
    if not old.exists():
        return
    if path.exists():
        _remove(old)
    else:
        old.rename(path)


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
        _remove(old)
