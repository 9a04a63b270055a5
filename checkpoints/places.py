"""Where models are read and written: paths as people give them, and what may be replaced."""

from __future__ import annotations

import os
from pathlib import Path

from checkpoints.hub_cache import cached_repository, hub_name, snapshot_of
from checkpoints.manifest import HF_FILES, MANIFEST, WEIGHTS, CheckpointError, Manifest, check_utf8

__all__ = ["check_apart", "check_free", "model_path", "real_path"]

# What a save puts into a checkpoint's directory.
_OF_A_CHECKPOINT = (MANIFEST, WEIGHTS, HF_FILES)


def real_path(path: str | os.PathLike[str]) -> Path:
    """A path in full: from the root, `~` and symbolic links resolved.

    Raises:
        ValueError: it is empty, begins with the `~name` of no user, or is a link to itself.
    """
    if not os.fspath(path):
        raise ValueError("A path is empty. Give a folder; . is the one you are in.")
    try:
        full = Path(path).expanduser()
    except RuntimeError:
        name = Path(path).parts[0]
        raise ValueError(
            f"{name} stands for the home of a user, and there is no such user. Give {path} in full."
        ) from None
    try:
        return full.resolve()
    except RuntimeError:
        raise ValueError(
            f"{path} is a symbolic link that leads back to itself. Give the folder itself."
        ) from None


def model_path(path: str | os.PathLike[str]) -> Path:
    """Where a model lies that is to be read: what every command and function reads goes by it.

    A path that is there is itself. A repository of the Hugging Face cache stands for the folder of
    its newest files, and so does its name on the hub, "org/name", where no such path is there.

    Args:
        path: as people give it.

    Returns:
        The path in full; there may be nothing there, unless it may be a name on the hub.

    Raises:
        FileNotFoundError: it may be a name on the hub, and neither a path nor the cache has it.
        ValueError: as `real_path`.
        CheckpointError: as `checkpoints.hub_cache.snapshot_of`.
    """
    full = real_path(path)
    if full.exists() or (name := hub_name(path)) is None:
        return snapshot_of(full)
    if not (cached := cached_repository(name)).is_dir():
        raise FileNotFoundError(
            f"There is no model at {full}, and the Hugging Face cache ({cached.parent}) has none "
            f"called {name}. Nothing is downloaded: get its files with `hf download {name}`, or "
            "give a folder on this machine."
        )
    return snapshot_of(real_path(cached))


def check_free(path: Path, overwrite: bool) -> None:
    """Whether a checkpoint may be put at `path`: at nothing, an empty folder, or a checkpoint.

    Raises:
        FileExistsError: there is something, and overwrite is false or it is no checkpoint, or
            holds what no save has put there.
        CheckpointError: the path is not UTF-8.
    """
    check_utf8(path)
    if not path.exists():
        return
    within = sorted(place.name for place in path.iterdir()) if path.is_dir() else None
    if within == []:
        return
    try:
        Manifest.read(path)
        is_checkpoint = True
    except CheckpointError:
        is_checkpoint = False
    if not overwrite:
        how = ", or pass overwrite=True, which replaces a checkpoint" if is_checkpoint else ""
        raise FileExistsError(
            f"Nothing is replaced unless asked for, and there is something at {path}. Write "
            f"elsewhere{how}."
        )
    # A mistyped path must not cost somebody their files.
    if not is_checkpoint:
        raise FileExistsError(
            f"A checkpoint is replaced and nothing else, and {path} is none that can be read. "
            "Write elsewhere, or remove it yourself."
        )
    if others := [name for name in within or [] if name not in _OF_A_CHECKPOINT]:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise FileExistsError(
            f"A checkpoint is replaced and nothing else, and {path} also holds "
            f"{', '.join(others[:3])}{more}. Move that elsewhere, or write elsewhere."
        )


def check_apart(out: Path, source: Path) -> None:
    """Whether what is written lies outside what is read, and the reverse.

    Raises:
        ValueError: one lies within the other.
    """
    if source in out.parents:
        raise ValueError(
            f"A model is written outside the folder that it is read from; {out} lies in {source}. "
            "Write elsewhere."
        )
    if out in source.parents:
        raise ValueError(
            f"A model is written to a place of its own, and {out} holds {source}, from which it is "
            "read. Write elsewhere."
        )
