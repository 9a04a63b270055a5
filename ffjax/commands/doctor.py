"""Prints what a bug report needs, and says what is wrong.

It prints versions, devices and settings; which implementation can run, and why another cannot; and
a self-test: a few decode steps beside the reference's, twice, and the speed of memory. Of a model
it finds weights that are not finite, and runs the reference over a text: it names the first tensor
that is not finite, and the largest magnitudes. Where the model has no tokenizer, it reads 64 token
ids spread evenly over its vocabulary instead. With --config, only the sizes are a model's, and
weights are random. Exit code 0: all is well; 1: something is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from ffjax.commands.folders import (
    add_ignore_field,
    check_nothing_ignored,
    is_folder,
    load_model,
    notes_on_stderr,
)
from ffjax.commands.formats import PLAIN, add_format_arguments, chosen_config
from ffjax.config import PRESETS

if TYPE_CHECKING:
    from ffjax.doctor.diagnosis import Patient

__all__ = ["HELP", "add_arguments", "run"]

HELP = "print what a bug report needs; find what is wrong with a machine or a model"

_WRONG = 1
_TEXT = "def main():\n    # The quick brown fox jumps over the lazy dog, 12 times.\n    return 0\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ffjax doctor`."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="checkpoint, Hugging Face folder or GGUF file; default: the shipped model",
    )
    parser.add_argument(
        "--config",
        metavar="NAME",
        help=f"a preset's sizes instead, with random weights: {', '.join(PRESETS)}",
    )
    add_format_arguments(parser)
    parser.add_argument("--text", help="what the reference reads; default: two lines of Python")
    parser.add_argument(
        "--no-self-test", action="store_true", help="run no decode steps, measure nothing"
    )
    add_ignore_field(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the report on stdout; returns 1 where something is wrong."""
    import jax

    from ffjax.doctor.diagnosis import diagnose
    from ffjax.doctor.text import as_data, as_text

    if args.config is not None and args.model is not None:
        raise ValueError(
            "A model has its own sizes: --config and MODEL were both given. Leave one of them out."
        )
    if args.config is None and (args.weights is not None or args.head is not None):
        raise ValueError(
            "--weights and --head say how the random weights of --config are made; a checkpoint "
            "is in the format that it was saved in. Give --config, or leave them out."
        )
    if args.config is not None:
        check_nothing_ignored(args, f"--config {args.config}")
    if args.config is not None and args.text is not None:
        raise ValueError(
            "--text is what a model reads, and the random weights of --config read none. Leave one "
            "of them out."
        )
    if args.text == "":
        raise ValueError("--text has at least one character; it is empty.")
    patient = _preset(args) if args.config is not None else _checkpoint(args)
    # Numbers that are not finite are to be found here, not to end the search for them.
    with jax.debug_nans(False), jax.debug_infs(False):
        say = _quiet if args.json else _say
        found = diagnose(patient, self_test=not args.no_self_test, say=say)
    print(json.dumps(as_data(found), allow_nan=False) if args.json else as_text(found))
    return _WRONG if found.wrong else 0


def _preset(args: argparse.Namespace) -> Patient:
    from ffjax.doctor.diagnosis import Patient

    return Patient(f"random weights of {args.config}", chosen_config(args), PLAIN)


def _checkpoint(args: argparse.Namespace) -> Patient:
    import checkpoints
    from checkpoints.opening import open_incoming
    from checkpoints.places import model_path
    from ffjax.doctor.diagnosis import Patient
    from ffjax.text.tokenizers import load_tokenizer

    path = model_path(checkpoints.SHIPPED_MODEL if args.model is None else args.model)
    # What it is comes first: where JAX starts no device, that is all there is to say.
    if is_folder(args, path):
        with notes_on_stderr("doctor"):
            incoming = open_incoming(path, ignore_fields=args.ignore_field)
        config, dtype = incoming.config, PLAIN
    else:
        manifest = checkpoints.Manifest.read(path)
        manifest.check_files(path)
        config, dtype = manifest.config, manifest.dtype
    text = _TEXT if args.text is None else args.text
    return Patient(
        source="the shipped model" if args.model is None else args.model,
        config=config,
        dtype=dtype,
        load=lambda: load_model(args, path, said=True),
        tokens=lambda: load_tokenizer(path, config).encode(text),
    )


def _say(text: str) -> None:
    print(f"ffjax doctor: {text}", file=sys.stderr, flush=True)


def _quiet(text: str) -> None:
    pass
