"""Options that name implementations."""

from __future__ import annotations

import argparse
import sys
from typing import get_args

from ffjax.decode import FORMER_NAMES, Implementation
from ffjax.prefill.choice import Prefill

__all__ = ["add_implementation", "add_implementations"]


def _implementation(text: str) -> str:
    """An implementation's name of today, for argparse; of a former one it says so on stderr."""
    if (name := FORMER_NAMES.get(text)) is None:
        return text
    print(
        f"--implementation {text} is called {name} now; the next version does not know {text}.",
        file=sys.stderr,
    )
    return name


def add_implementation(parser: argparse.ArgumentParser, help: str | None = None) -> None:
    """Adds --implementation, with a command's own words about it."""
    parser.add_argument(
        "--implementation", type=_implementation, choices=get_args(Implementation), help=help
    )


def add_implementations(parser: argparse.ArgumentParser) -> None:
    """Adds --implementation and --prefill."""
    add_implementation(parser, "of the decode steps; default: the fused kernel where it can run")
    parser.add_argument(
        "--prefill",
        choices=get_args(Prefill),
        help="implementation of the prefill: pallas, the fast one; steps, fused decode steps of "
        "several tokens, for a few short prompts; or xla, the reference model; default: pallas "
        "where it can run, but xla with --implementation xla",
    )
