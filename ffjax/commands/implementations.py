"""Options that name implementations."""

from __future__ import annotations

import argparse
from typing import get_args

from ffjax.decode import Implementation
from ffjax.prefill.choice import Prefill

__all__ = ["add_implementations"]


def add_implementations(parser: argparse.ArgumentParser) -> None:
    """Adds --implementation and --prefill."""
    parser.add_argument(
        "--implementation",
        choices=get_args(Implementation),
        help="of the decode steps; default: the fused kernel where it can run",
    )
    parser.add_argument(
        "--prefill",
        choices=get_args(Prefill),
        help="implementation of the prefill: pallas, the fast one, or xla, the reference model; "
        "default: the fast one where it can run, but xla with --implementation xla",
    )
