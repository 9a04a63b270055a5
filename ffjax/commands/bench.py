"""Times decode steps, prompts or whole generations of a model of real shapes with random weights.

Weights are made in the format that --weights and --head name: int8, or int4 in groups of 128. The
exit code is 1 where numbers were wrong.

By itself: every batch is timed at every position, in loops on the device that feed each step the
token of the one before it, and the logits are checked. With --compare xla, a baseline in plain
JAX, one array per layer, is timed in turn with it. Wrong is a logit that is not finite, or other
bits when a step is repeated. With --backend triton,mosaic_gpu the fused kernel is timed as each of
them compiles it, in turn. With --tokens, a step takes so many tokens of each sequence; they are
compared with the reference, which is fed them one by one.

With --prompt: the time from a request to its first token on the host, for prompts of each length,
beside the time that their multiplications take at the device's rate of dense products and the
time of a bare decode step. 10-1500 stands for prompts of unequal lengths, one for each sequence of
--batch, evenly spread. With --compare xla, the reference model is timed in turn. Wrong is a first
token or a cache that is not the reference's.

With --loop: the time a token of `ffjax.generate` and `ffjax.stream` after prompts of --position
tokens, beside that of bare decode steps at the same positions. Wrong are tokens that differ from
one run to the next, or logits that are not finite.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ffjax.commands.implementations import add_implementation
from ffjax.commands.options import spans, whole, wholes
from ffjax.commands.sizes import add_size_arguments, chosen_sizes
from pallas_kernels.backends import why_not_backend

__all__ = ["HELP", "add_arguments", "run"]

HELP = "time decode steps, prompts or generations and check their numbers"

_WRONG = 1
_POSITION = 96
_STEPS, _LOOP_STEPS = 64, 512
# The fused kernel, by the backend of Pallas that compiles it.
_IMPLEMENTATIONS = {"triton": "pallas", "mosaic_gpu": "pallas_mosaic_gpu"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ffjax bench`."""
    add_size_arguments(parser)
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
        help=f"live positions before the first step, one number or several; default: {_POSITION}",
    )
    parser.add_argument(
        "--tokens",
        metavar="T,..",
        type=wholes(1),
        help="tokens of each sequence that a step takes, one number or several; default: 1",
    )
    parser.add_argument(
        "--prompt",
        metavar="N,..",
        type=spans(1),
        help="time prompts of so many tokens up to their first new one, one number or several, or "
        "10-1500 for unequal ones",
    )
    parser.add_argument(
        "--loop", action="store_true", help="time whole generations, beside their bare steps"
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=whole(1),
        help=f"steps of a loop; default: {_STEPS}, with --loop {_LOOP_STEPS}",
    )
    parser.add_argument(
        "--repetitions",
        metavar="N",
        type=whole(7),
        default=7,
        help="timed loops or requests, 7 or more; default: %(default)s",
    )
    add_implementation(
        parser,
        "what to time; default: the fused kernel where it can run, else the reference",
    )
    parser.add_argument(
        "--backend",
        metavar="NAME,..",
        type=_backends,
        help="time the fused kernel as Pallas's backends compile it, in turn: triton, mosaic_gpu, "
        "or both",
    )
    parser.add_argument(
        "--compare",
        choices=("xla",),
        help="time a baseline in turn: XLA, one array per layer; of prompts, the reference model",
    )
    parser.add_argument(
        "--plot", metavar="FILE.png", type=Path, help="draw the times and their floor"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the table"
    )


def run(args: argparse.Namespace) -> int:
    """Prints a table on stdout, what is being done on stderr; or JSON."""
    if args.tokens is not None and (args.loop or args.prompt is not None):
        raise ValueError("--tokens times decode steps; leave it out, or --loop and --prompt.")
    if args.backend is not None and args.implementation is not None:
        raise ValueError(
            "--backend says which kernels are timed, and so does --implementation. Give one."
        )
    if args.backend is not None and args.prompt is not None:
        raise ValueError("--backend times decode steps; leave it out, or --prompt.")
    if args.loop:
        for name in ("prompt", "compare", "plot", "backend"):
            if getattr(args, name) is not None:
                raise ValueError(f"--loop times whole generations; leave --{name} out.")
        wrong = _run_loops(args)
    elif args.prompt is not None:
        if args.position is not None:
            raise ValueError(
                "--prompt times prompts from position 0 on; leave --position out, or --prompt."
            )
        wrong = _run_prompts(args)
    else:
        wrong = _run_steps(args)
    for what in wrong:
        _say(what)
    return _WRONG if wrong else 0


def _backends(text: str) -> tuple[str, ...]:
    """Implementations, by the names of the backends that compile them."""
    names = tuple(_IMPLEMENTATIONS.get(name, "") for name in text.split(","))
    if "" in names or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(
            f"{', '.join(_IMPLEMENTATIONS)} or both, with a comma between, is needed, got {text!r}"
        )
    return names


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """What every kind of measurement is told."""
    return {
        "config": chosen_sizes(args, "bench"),
        "batches": args.batch,
        "repetitions": args.repetitions,
        "implementation": args.implementation,
    }


def _run_steps(args: argparse.Namespace) -> list[str]:
    """Measures and prints decode steps; returns a sentence for each point that is wrong."""
    from ffjax.benchmark import plot, report, suite

    named: Any = args.backend or (args.implementation,)
    # Without Triton, "pallas" is the other one.
    asked = args.backend is not None and "pallas" in named
    if asked and (reason := why_not_backend("triton")) is not None:
        raise ValueError(f"--backend triton: {reason}")
    sweep = suite.Sweep(
        **_asked(args) | {"implementation": named[0]},
        others=named[1:],
        positions=args.position or (_POSITION,),
        steps=args.steps or _STEPS,
        baseline=args.compare == "xla",
        tokens=args.tokens or (1,),
    )
    if args.plot is not None:
        if max(sweep.tokens) > 1:
            raise ValueError("--plot draws steps of one token; leave it out, or --tokens.")
        if sweep.others:
            raise ValueError("--plot draws one kernel; name one of them with --backend.")
        plot.check_plot(args.plot)
    results = suite.run(sweep, say=_sayer(args))
    _print(args, results, report)
    if args.plot is not None:
        plot.draw(results, args.plot)
    wrong = []
    for point in results.points:
        if not point.check.sound:
            what = (
                "gave other bits when repeated" if point.check.finite else "had logits not finite"
            )
            name = point.implementation
            several = f", {point.tokens} tokens" * (point.tokens > 1)
            where = f"batch {point.batch}, position {point.position}{several}"
            wrong.append(f"{where}: {name!r} {what}.")
    return wrong


def _run_prompts(args: argparse.Namespace) -> list[str]:
    """The same of prompts."""
    from ffjax.benchmark import plot, prompt_plot, prompt_report, prompts

    sweep = prompts.PromptSweep(
        **_asked(args),
        spans=args.prompt,
        steps=args.steps or _STEPS,
        reference=args.compare == "xla",
    )
    if args.plot is not None:
        plot.check_plot(args.plot)
    results = prompts.run(sweep, say=_sayer(args))
    _print(args, results, prompt_report)
    if args.plot is not None:
        prompt_plot.draw_prompts(results, args.plot)
    return [
        f"batch {point.batch}, prompts of {point.span}: the prefill {point.check.complaint}."
        for point in results.points
        if not point.check.sound
    ]


def _run_loops(args: argparse.Namespace) -> list[str]:
    """The same of generations."""
    from ffjax.benchmark import loop_report, loops
    from ffjax.broken import NotFiniteError

    sweep = loops.LoopSweep(
        **_asked(args),
        positions=args.position or (_POSITION,),
        steps=args.steps or _LOOP_STEPS,
    )
    try:
        results = loops.run(sweep, say=_sayer(args))
    except NotFiniteError as error:  # whose times would be of no use
        return [str(error)]
    _print(args, results, loop_report)
    return [
        f"batch {point.batch}, position {point.position}: {way.name} gave other tokens than "
        "before, or not as many as asked for."
        for point in results.points
        for way in point.ways
        if not way.sound
    ]


def _print(args: argparse.Namespace, results: Any, report: ModuleType) -> None:
    if args.json:
        print(json.dumps(report.as_data(results), allow_nan=False))
    else:
        print(report.as_text(results))


def _sayer(args: argparse.Namespace) -> Callable[[str], None]:
    return (lambda text: None) if args.json else _say


def _say(text: str) -> None:
    print(f"ffjax bench: {text}", file=sys.stderr, flush=True)
