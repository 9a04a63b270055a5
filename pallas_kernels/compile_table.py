"""What decode steps become on every GPU of `gpus/`, as a table in Markdown.

    python -m pallas_kernels.compile_table > table.md

Each row is compiled by the kernel that a step would use there, with its tuning: the streamed one
where it can run, else the phased one. What neither can run has its sentence below the table. It
takes some minutes.
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
from pallas_kernels.compile import CompileError, CompileReport, Kernel
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
_KERNELS: tuple[Kernel, ...] = ("streamed", "phased")
_HEAD = (
    *("GPU", "model", "weights", "sequences", "kernel", "launches", "registers", "spilled bytes"),
    *("shared memory, bytes", "of"),
)


class Row(NamedTuple):
    """What became of a step on a GPU.

    Attributes:
        gpu: name of the target.
        step: the step.
        kernel: that was compiled, or None.
        report: what it became, or None.
        refusals: why a kernel was not, sentence by sentence.
    """

    gpu: str
    step: Step
    kernel: Kernel | None
    report: CompileReport | None
    refusals: list[str]


def compile_row(gpu: str, step: Step, capacity: int = 16_384) -> Row:
    """Compiles a step by the first kernel that can run it there.

    Args:
        gpu: name of the target.
        step: the step.
        capacity: S, cache slots.

    Raises:
        CompileError: there is no compiler here.
    """
    if (reason := compiler.why_no_compiler()) is not None:
        raise CompileError(reason)
    refusals: list[str] = []
    for kernel in _KERNELS:
        options = {"config": step.config, "weights": step.weights, "batch": step.batch}
        options |= {"kernel": kernel, "capacity": capacity}
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        try:
            dims = compiler.dims_of(compiler.command_line().parse_args(words))
            report = compiler.compile_for(gpu, dims, kernel=kernel, tuned=True)
        except (ValueError, CompileError) as error:
            refusals.append(" ".join(str(error).split()))
            continue
        return Row(gpu, step, kernel, report, refusals)
    return Row(gpu, step, None, None, refusals)


def markdown(rows: Iterable[Row]) -> str:
    """The table, and below it why a kernel was not taken, each sentence once."""
    rows = list(rows)
    notes: dict[str, int] = {}
    lines = [_line(_HEAD), _line([*["---"] * 5, *["---:"] * 5])]
    for row in rows:
        for reason in row.refusals:
            notes.setdefault(reason, len(notes) + 1)
        marks = ", ".join(str(notes[reason]) for reason in row.refusals)
        kernel = row.kernel or "none: XLA"
        cells = [target(row.gpu).gpu.name.removeprefix("NVIDIA "), *map(str, row.step)]
        cells.append(f"{kernel} ({marks})" if marks else kernel)
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
