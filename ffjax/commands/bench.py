"""Times decode steps of a model of real shapes with random weights, and checks their numbers.

Weights are made in the format that --weights and --head name: int8, or int4 in groups of 128.
Every batch is timed at every position, in loops on the device that feed each step the token
of the one before it. With --compare xla, a baseline in plain JAX, one array per layer, is
timed in turn with it. The exit code is 1 where a step had a logit that is not finite, or
where repeating it gave other bits.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from ffjax.commands.formats import add_format_arguments, chosen_config
from ffjax.commands.options import whole, wholes
from ffjax.decode import Implementation

__all__ = ["HELP", "add_arguments", "run"]

HELP = "time decode steps and check their numbers"

_WRONG = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ffjax bench`."""
    parser.add_argument("--config", metavar="NAME", required=True, help="a preset: llama3.2-1b")
    add_format_arguments(parser)
    parser.add_argument(
        "--batch",
        metavar="B,..",
        type=wholes(1),
        default=(1,),
        help="sequences, one number or several; default: 1",
    )
    parser.add_argument(
        "--position",
        metavar="P,..",
        type=wholes(0),
        default=(96,),
        help="live positions before the first step, one number or several; default: 96",
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=whole(1),
        default=64,
        help="steps of a loop; default: %(default)s",
    )
    parser.add_argument(
        "--repetitions",
        metavar="N",
        type=whole(7),
        default=7,
        help="timed loops, 7 or more; default: %(default)s",
    )
    parser.add_argument(
        "--implementation",
        choices=get_args(Implementation),
        help="what to time; default: the fused kernel where it can run, else the reference",
    )
    parser.add_argument(
        "--compare", choices=("xla",), help="time a baseline in turn: XLA, one array per layer"
    )
    parser.add_argument(
        "--plot", metavar="FILE.png", type=Path, help="draw the times and the memory floor"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the table"
    )


def run(args: argparse.Namespace) -> int:
    """Prints a table on stdout, what is being done on stderr; or JSON."""
    from ffjax.benchmark import plot, report, suite

    sweep = suite.Sweep(
        config=chosen_config(args),
        batches=args.batch,
        positions=args.position,
        steps=args.steps,
        repetitions=args.repetitions,
        implementation=args.implementation,
        baseline=args.compare == "xla",
    )
    if args.plot is not None:
        plot.check_plot(args.plot)
    results = suite.run(sweep, say=(lambda text: None) if args.json else _say)
    if args.json:
        print(json.dumps(report.as_data(results), allow_nan=False))
    else:
        print(report.as_text(results))
    if args.plot is not None:
        plot.draw(results, args.plot)
    wrong = [point for point in results.points if not point.check.sound]
    for point in wrong:
        what = "gave other bits when repeated" if point.check.finite else "had logits not finite"
        _say(f"batch {point.batch}, position {point.position}: {point.implementation!r} {what}.")
    return _WRONG if wrong else 0


def _say(text: str) -> None:
    print(f"ffjax bench: {text}", file=sys.stderr, flush=True)
