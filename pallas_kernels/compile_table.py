"""What decode steps become on every GPU of `gpus/`, as a table in Markdown.

    python -m pallas_kernels.compile_table > table.md

Each row is compiled as a step there would be, with its tuning. What cannot run there has its
sentence below the table. It takes some minutes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pallas_kernels import compile as compiler
from pallas_kernels.compile import CompileError, CompileReport
from pallas_kernels.targets import target, target_names

__all__ = ["STEPS", "Row", "Step", "compile_row", "main", "markdown"]


class Step(NamedTuple):
    """A step of a preset's shapes: its name, how its layers' matrices are stored, and sequences."""

    config: str
    weights: str
    batch: int


STEPS = [
    Step(config, weights, batch)
    for (config, weights), batch in itertools.product(
        [("llama3.2-1b", "bfloat16"), ("llama3.1-8b", "bfloat16"), ("llama3.1-8b", "int4")], (1, 8)
    )
]
_HEAD = (
    *("GPU", "model", "weights", "sequences", "launches", "registers", "spilled bytes"),
    *("shared memory, bytes", "of"),
)


class Row(NamedTuple):
    """What became of a step on a GPU.

    Attributes:
        gpu: name of the target.
        step: the step.
        report: what it became, or None.
        refusal: why it was not compiled, a sentence; or None.
    """

    gpu: str
    step: Step
    report: CompileReport | None
    refusal: str | None


def compile_row(gpu: str, step: Step, capacity: int = 16_384) -> Row:
    """Compiles a step as it would run there.

    Args:
        gpu: name of the target.
        step: the step.
        capacity: S, cache slots.

    Raises:
        CompileError: there is no compiler here.
    """
    if (reason := compiler.why_no_compiler()) is not None:
        raise CompileError(reason)
    options = {**step._asdict(), "capacity": capacity}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    try:
        dims = compiler.dims_of(compiler.command_line().parse_args(words))
        return Row(gpu, step, compiler.compile_for(gpu, dims, tuned=True), None)
    except (ValueError, CompileError) as error:
        return Row(gpu, step, None, " ".join(str(error).split()))


def markdown(rows: Iterable[Row]) -> str:
    """The table, and below it why a step is XLA's there, each sentence once."""
    rows = list(rows)
    notes: dict[str, int] = {}
    lines = [_line(_HEAD), _line([*["---"] * 4, *["---:"] * 5])]
    for row in rows:
        cells = [target(row.gpu).gpu.name.removeprefix("NVIDIA "), *map(str, row.step)]
        if row.refusal is not None:
            cells.append(f"XLA ({notes.setdefault(row.refusal, len(notes) + 1)})")
        if (report := row.report) is not None:
            limit = target(row.gpu).gpu.shared_memory
            figures = report.kernels, report.registers, report.spill_bytes
            cells += [*map(str, figures), f"{report.shared_memory_bytes:,}", f"{limit:,}"]
        lines.append(_line([*cells, *[""] * (len(_HEAD) - len(cells))]))
    said = [f"{number}. {reason}" for reason, number in notes.items()]
    return "\n".join([*lines, *([""] if said else []), *said])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    asked = _parser().parse_args(arguments)
    gpus = asked.gpu or target_names()
    pairs = [(gpu, step) for gpu in gpus for step in STEPS]
    try:
        with ThreadPoolExecutor(asked.jobs) as pool:  # each compiles in a process of its own
            rows = list(pool.map(lambda pair: compile_row(*pair), pairs))
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    print(markdown(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.compile_table",
        description="Compiles decode steps of 1B and 8B shapes for every GPU, and prints a table.",
    )
    parser.add_argument(
        "--gpu", choices=target_names(), action="append", help="may be repeated; default: all"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        choices=range(1, 65),
        metavar="N",
        default=os.cpu_count() or 1,
        help="compilers side by side; default: %(default)s",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
