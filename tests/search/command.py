"""The search's command line."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence

from . import plans
from .draw import Case, draw_case
from .pool import check_all, shrink_with
from .report import Report
from .worker import Verdict, Worker, serve

__all__ = ["main"]

# A case that takes longer hangs. A kernel compiles in some 15 s, in several times that where
# as many processes compile as there are cores.
_LIMIT_S = 240.0
# The exit status where no case ran: without a GPU, or where no kernel takes what was drawn.
_NOTHING = 2
# Failures that are made smaller.
_MOST_SHRUNK = 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.search",
        description="Draws model shapes, formats and caches from seeds, and compares the streamed "
        "kernel with the reference; or, with --plans, checks their hand-overs on a CPU.",
    )
    add = parser.add_argument
    add("--count", type=int, default=200, help="how many seeds (200)")
    add("--seed", type=int, default=0, help="the first of them (0)")
    add("--seeds", type=_range, metavar="FROM:TO", help="instead: these, the last one left out")
    add("--only", type=int, metavar="SEED", help="this one alone")
    add("--jobs", type=int, default=1, help="worker processes (1)")
    add("--seconds", type=float, default=math.inf, help="begin no case after so many")
    add("--json", type=pathlib.Path, metavar="FILE", help="write what was found there too")
    add("--plans", action="store_true", help="check plans alone, on a CPU")
    add(
        "--shrink",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="make failures smaller",
    )
    add("--shrink-seconds", type=float, default=120.0, help="for each of the first three (120)")
    add("--limit", type=float, default=_LIMIT_S, help="seconds after which a case hangs (240)")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _seeds(args: argparse.Namespace) -> range:
    if args.only is not None:
        return range(args.only, args.only + 1)
    return args.seeds or range(args.seed, args.seed + args.count)


def _range(text: str) -> range:
    """Seeds of the command line."""
    first, _, end = text.partition(":")
    try:
        seeds = range(int(first), int(end))
    except ValueError:
        seeds = range(0)
    if not seeds:
        raise argparse.ArgumentTypeError(f"is FROM:TO, the first less than the last, got {text!r}")
    return seeds


def _check(case: Case) -> str | None:
    import jax  # here, so that checking plans alone starts no device

    from .compare import check_case

    try:
        return check_case(case)
    finally:
        jax.clear_caches()  # programs of one case are of no use to the next


def _serve() -> int:
    from .compare import Refused

    serve(_check, Refused)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 1 if something failed, 2 if nothing was checked.

    Args:
        arguments: of the command line; None: the process's.
    """
    args = _parser().parse_args(arguments)
    if args.worker:
        return _serve()
    seeds, report, start = _seeds(args), Report(), time.monotonic()
    print(f"seeds {seeds.start}:{seeds.stop}", flush=True)
    if args.plans:
        _check_plans(seeds, args, report)
        report.print_table(time.monotonic() - start, "plans")
    else:
        _search(seeds, args, report, start)
    if args.json is not None:
        args.json.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    if not report.run:
        print("tests.search: nothing was checked, see above for why.", file=sys.stderr)
        return _NOTHING
    return int(report.failed > 0)


def _check_plans(seeds: range, args: argparse.Namespace, report: Report) -> None:
    end = time.monotonic() + args.seconds
    for seed in seeds:
        if time.monotonic() >= end:
            return
        kind, why, case, gpu = plans.check_plan(seed)
        where = f"{gpu.name}, {gpu.cores} multiprocessors: " if why else ""
        report.add(seed, case, Verdict(kind, where + why if kind == "wrong" else why))


def _search(seeds: range, args: argparse.Namespace, report: Report, start: float) -> None:
    """Runs the search, and makes what failed smaller."""
    workers = [Worker(args.limit) for _ in range(max(1, min(args.jobs, len(seeds))))]
    try:
        check_all(seeds, draw_case, workers, report, start + args.seconds)
        took = time.monotonic() - start
        if args.shrink and report.failures:
            print("\nTo paste into FOUND of tests/search/cases.py:")
            for seed, case, _ in report.failures[:_MOST_SHRUNK]:
                small = shrink_with(workers[0], case, args.shrink_seconds)
                print(f'    "seed {seed}": {small!r},', flush=True)
        report.print_table(took)
    finally:
        for worker in workers:
            worker.close()
