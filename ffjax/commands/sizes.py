"""The options that say of which model's sizes random weights are made."""

from __future__ import annotations

import argparse

from ffjax.commands.folders import add_ignore_field, check_nothing_ignored, notes_on_stderr
from ffjax.commands.formats import add_format_arguments, in_formats
from ffjax.config import PRESETS, ModelConfig, preset

__all__ = ["add_size_arguments", "chosen_sizes"]


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --config or --model, one of which must be given; --weights, --head, --ignore-field."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--config", metavar="PRESET", help=f"sizes of a released model: {', '.join(PRESETS)}"
    )
    which.add_argument(
        "--model",
        metavar="PATH",
        help="sizes of a checkpoint, Hugging Face folder or GGUF file, or of a folder with a "
        "config.json alone; or org/name, of the Hugging Face cache. The weights there are not read",
    )
    add_format_arguments(parser)
    add_ignore_field(parser)


def chosen_sizes(args: argparse.Namespace, command: str) -> ModelConfig:
    """The configuration that --config or --model names, in the formats that were asked for.

    Args:
        args: the command line.
        command: what lines on stderr begin with.

    Raises:
        FileNotFoundError: there is nothing at that path.
        ValueError: there is no such preset; what is at the path is damaged or not supported; or
            its matrices cannot have that format.
        NotImplementedError: a package that is needed is not installed.
    """
    from checkpoints.opening import comes_in, config_at
    from checkpoints.places import model_path

    if args.model is None:
        check_nothing_ignored(args, f"--config {args.config}")
        return in_formats(preset(args.config), args)
    path = model_path(args.model)
    if not comes_in(path):
        check_nothing_ignored(args, args.model)
    with notes_on_stderr(command):
        config = config_at(path, ignore_fields=args.ignore_field)
    return in_formats(config, args)
