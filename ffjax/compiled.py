"""Compiled programs on disk: what one command line has compiled, the next one reads.

JAX keeps them, in a folder under keys that hold the program, the versions and the kind of device;
here is which folder, how large it grows, and what is said where something is wrong with it. The
library sets none of this: JAX's configuration belongs to the program that imports it.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

__all__ = ["compiled_programs_kept", "default_folder"]

# The most bytes that are left when a command ends which has added some. A program takes 10 KB to
# some MB.
_MOST_BYTES = 1 << 30
# JAX leaves out what compiles fast, and has XLA keep files of its own, which nothing bounds and
# without which no program compiles where they cannot be written.
_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_enable_xla_caches": "none",
}
_FOLDER = "jax_compilation_cache_dir"
# How JAX warns of it.
_WARNING = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '([\w.<>-]+)': (.*)", re.DOTALL
)
_FILES = "-cache"  # how JAX's names of entries end, after the program's name and a key


def default_folder() -> Path:
    """Where compiled programs are kept: in the place that the system has for a user's caches.

    Three systems take a few lines, which is less than a dependency.

    Raises:
        OSError: the user has no home.
    """
    if os.path.isabs(given := os.environ.get("XDG_CACHE_HOME", "")):
        return Path(given) / "ffjax" / "compiled"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise OSError(
            "there is no home folder; set HOME, or XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR to "
            "a folder"
        ) from error
    if sys.platform == "darwin":
        caches = home / "Library" / "Caches"
    elif sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        caches = home / ".cache"
    return caches / "ffjax" / "compiled"


@contextlib.contextmanager
def compiled_programs_kept(say: Callable[[str], None]) -> Iterator[None]:
    """Within it, programs that are compiled are kept on disk, and those that are there are read.

    What JAX's own environment variables say goes before: where `JAX_ENABLE_COMPILATION_CACHE` is
    false, nothing is kept; `JAX_COMPILATION_CACHE_DIR` is another folder, whose size is the user's
    affair. A program that has set JAX's folder keeps it.

    Nothing that is wrong with the folder stops the command: it is said, once, and programs are
    compiled.

    Args:
        say: prints a line.
    """
    if not jax.config.jax_enable_compilation_cache:  # pyright: ignore[reportAttributeAccessIssue]
        yield
        return
    settings = {name: to for name, to in _SETTINGS.items() if name.upper() not in os.environ}
    own: Path | None = None
    named = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    try:
        if named is None:
            own = default_folder()
            _make(own)
            settings[_FOLDER] = str(own)
        elif "://" not in named:  # an address in a cloud is JAX's affair
            os.makedirs(named, exist_ok=True)
    except OSError as error:
        say(_not_kept(_reason(error)))
        with _nothing_kept():
            yield
        return
    before = {name: jax.config.values[name] for name in settings}
    changed = None if own is None else _changed(own)
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        with _warnings_told(say, own):
            yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        if own is not None:
            compilation_cache.reset_cache()  # JAX holds on to the folder it began with
            if _changed(own) != changed:
                _shrink(own, _MOST_BYTES)


@contextlib.contextmanager
def _nothing_kept() -> Iterator[None]:
    """Within it JAX tries no folder, its own setting neither."""
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def _make(folder: Path) -> None:
    """Makes the folder, and refuses one whose files others may have written: JAX runs them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if os.name != "posix":
        return
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(
            f"{folder} belongs to another user, or others may write there; set "
            "JAX_COMPILATION_CACHE_DIR to a folder of your own"
        )


def _not_kept(reason: str) -> str:
    return (
        f"Compiled programs are not kept, and the next command compiles them again: {reason}. "
        "With --no-compilation-cache nothing is tried."
    )


def _reason(error: OSError) -> str:
    if error.errno is None:
        return str(error)
    said = error.strerror or type(error).__name__
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{where}{said[0].lower()}{said[1:]}"


@contextlib.contextmanager
def _warnings_told(say: Callable[[str], None], own: Path | None) -> Iterator[None]:
    """Within it, JAX's warnings of its cache are a line each kind; others are shown as before.

    JAX never replaces an entry: one that cannot be read, or that a full disk has cut off, would be
    compiled anew for ever. Those of our own folder are removed; JAX writes what it then compiles.
    """
    said: set[str] = set()
    shown = warnings.showwarning

    def show(message: Warning | str, *where: object, **more: object) -> None:
        if (found := _WARNING.fullmatch(str(message).strip())) is None:
            shown(message, *where, **more)  # pyright: ignore[reportArgumentType]
            return
        doing, program, error = found.groups()
        if own is not None:
            _remove(own, program)
        if doing in said:
            return
        said.add(doing)
        error = error.strip().splitlines()[0].rstrip(".")
        if doing == "writing":
            say(_not_kept(error))
        else:
            say(f"A compiled program that was kept cannot be read ({error}); it is compiled again.")

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=r"Error \w+ persistent compilation cache entry")
        warnings.showwarning = show
        yield


def _remove(folder: Path, program: str) -> None:
    for entry in _entries(folder):
        if entry.name.startswith(f"{program}-"):
            with contextlib.suppress(OSError):
                os.unlink(entry)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if entry.name.endswith(_FILES)]
    except OSError:
        return []


def _changed(folder: Path) -> int | None:
    """When entries have come or gone."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return None


def _shrink(folder: Path, most: int) -> None:
    """Removes entries, those first that nobody has read for longest, until `most` bytes are left.

    JAX bounds a folder too, with a package more and a lock at every look.
    """
    found: list[tuple[int, int, str]] = []
    for entry in _entries(folder):
        with contextlib.suppress(OSError):  # another process may remove them, too
            status = entry.stat()
            used = max(status.st_atime_ns, status.st_mtime_ns)
            found.append((used, status.st_size, entry.path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most:
            return
        total -= size
        with contextlib.suppress(OSError):
            os.unlink(path)
