"""What the commands that read a model share: models from elsewhere, and their warnings as lines."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffjax.model import Transformer

__all__ = [
    "add_ignore_field",
    "check_nothing_ignored",
    "is_folder",
    "load_model",
    "notes_on_stderr",
]


def add_ignore_field(parser: argparse.ArgumentParser) -> None:
    """Adds --ignore-field."""
    parser.add_argument(
        "--ignore-field",
        metavar="NAME",
        action="append",
        default=[],
        help="leave out a field of a Hugging Face folder's config.json or of a GGUF file that is "
        "refused, where you know that it changes nothing; may be given several times",
    )


@contextlib.contextmanager
def notes_on_stderr(command: str, *, said: bool = False) -> Iterator[None]:
    """Within it, what there is to say of a Hugging Face folder is on stderr, a line each.

    That is its warnings, which are never errors then, and that weights were rounded.

    Args:
        command: the subcommand, which the line begins with.
        said: whether the lines were printed before, and are not to be repeated.
    """
    from checkpoints import HFFolderWarning

    def tell(text: object) -> None:
        if not said:
            print(f"ffjax {command}: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if said else "always", HFFolderWarning)
        with _logged("ffjax.folders", tell):
            yield


class _Told(logging.Handler):
    """Passes the lines of a log on to a function."""

    def __init__(self, tell: Callable[[str], None]):
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(record.getMessage())


@contextlib.contextmanager
def _logged(name: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Within it, what a logger notes is told to a function, and to nobody else."""
    handler, log = _Told(tell), logging.getLogger(name)
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


def load_model(
    args: argparse.Namespace,
    path: str | Path,
    dtype: Any = None,
    *,
    said: bool = False,
    integers: bool = True,
) -> Transformer:
    """Loads what a command was given: a checkpoint, a Hugging Face folder or a GGUF file.

    Args:
        args: the command line, with `command` and `ignore_field`.
        path: of the model.
        dtype: as `ffjax.load` takes it.
        said: as in `notes_on_stderr`.
        integers: as `ffjax.load` takes it.

    Raises:
        FileNotFoundError: there is nothing at that path.
        ValueError: it is damaged or not supported; or fields are to be ignored, and it is a
            checkpoint.
        NotImplementedError: a package that it needs is not installed.
    """
    import checkpoints

    if not is_folder(args, path):
        return checkpoints.load(path, dtype=dtype)
    with notes_on_stderr(args.command, said=said):
        how = {"ignore_fields": args.ignore_field, "integers": integers}
        return checkpoints.load(path, dtype=dtype, **how)


def is_folder(args: argparse.Namespace, path: str | Path) -> bool:
    """Whether there is a Hugging Face folder or a GGUF file at a path.

    Raises:
        ValueError: fields are to be ignored, and there is something else.
    """
    from checkpoints.opening import comes_in
    from checkpoints.places import model_path

    path = model_path(path)
    if comes_in(path):
        return True
    if path.exists():
        check_nothing_ignored(args, str(path))
    return False


def check_nothing_ignored(args: argparse.Namespace, what: str) -> None:
    """Refuses --ignore-field where there is neither a Hugging Face folder nor a GGUF file.

    Args:
        args: the command line.
        what: what there is instead.

    Raises:
        ValueError: a field is to be ignored.
    """
    if args.ignore_field:
        raise ValueError(
            "--ignore-field is for a Hugging Face folder, which has a config.json, or for a GGUF "
            f"file; {what} is neither. Leave it out."
        )
