"""Models in the Hugging Face cache, where `hf download org/name` puts what it downloads.

A repository is a folder there: `snapshots/` holds one folder a commit, with the model's files, and
`refs/main` the commit that the branch was at. Nothing is downloaded here.
Source: huggingface_hub's guide, "Understand caching".
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from checkpoints.hf_fields import CONFIG
from checkpoints.manifest import MANIFEST, CheckpointError

__all__ = ["cached_repository", "hub_cache", "hub_name", "snapshot_of"]

_SNAPSHOTS = "snapshots"
# What the hub allows: letters, digits, and within them - _ and .
_NAME = re.compile(r"\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?", re.ASCII)


def hub_cache() -> Path:
    """The folder of all repositories: as the variables HF_HUB_CACHE, HF_HOME and XDG_CACHE_HOME
    say, in this order, or `~/.cache/huggingface/hub`.
    """
    if named := os.environ.get("HF_HUB_CACHE"):
        return Path(named).expanduser()
    if not (home := os.environ.get("HF_HOME")):
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def hub_name(path: str | os.PathLike[str]) -> str | None:
    """What was given, if it may be a model's name on the hub, as "org/name"; else None."""
    given = os.fspath(path)
    return given if _NAME.fullmatch(given) else None


def cached_repository(name: str) -> Path:
    """Where a repository of that name, "org/name", lies in the cache, if it does."""
    return hub_cache() / f"models--{name.replace('/', '--')}"


def snapshot_of(directory: Path) -> Path:
    """The folder of a repository's files, where a directory is a repository; else itself.

    That is the commit which `refs/main` names, or else the only one.

    Args:
        directory: any path.

    Raises:
        CheckpointError: it is a repository, and which commit is meant is not to be found out, or
            its files are not there.
    """
    within = directory / _SNAPSHOTS
    if not within.is_dir() or any((directory / name).exists() for name in (CONFIG, MANIFEST)):
        return directory
    commits = sorted(path for path in within.iterdir() if path.is_dir())
    branch = directory / "refs" / "main"
    if branch.is_file():
        commit = within / branch.read_text(encoding="utf-8", errors="replace").strip()
        if commit in commits:
            return commit
    elif len(commits) == 1:
        return commits[0]
    if not commits:
        raise CheckpointError(
            f"A repository of the Hugging Face cache has a folder of files for a commit; "
            f"{directory} has none. {_again(directory)}"
        )
    raise CheckpointError(
        f"{directory} is a repository of the Hugging Face cache, and its refs/main names none of "
        f"the commits whose files are there. Give the folder of one, as {commits[-1]}. "
        f"{_again(directory)}"
    )


def _again(directory: Path) -> str:
    """What gets a repository's files."""
    name = directory.name.removeprefix("models--").replace("--", "/", 1)
    return f"`hf download {name}` gets the files of the newest."
