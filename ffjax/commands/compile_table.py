"""What decode steps become on every GPU of `gpus/`, as a table in Markdown.

    python -m pallas_kernels.compile_table > table.md

A row is a step, a column a GPU, for which it is compiled as it would be there, with its tuning.
What cannot run there has its sentence below the table. On two cores it takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ffjax.commands.compile import command_line, dims_of
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
    Step(*each)
    for each in itertools.product(
        ("llama3.2-1b", "llama3.2-3b", "llama3.1-8b", "gemma3-1b", "qwen3-0.6b"),
        ("bfloat16", "int8", "int4"),
        (1, 8),
    )
]


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
        dims = dims_of(command_line().parse_args(words))
        return Row(gpu, step, compiler.compile_for(gpu, dims, tuned=True), None)
    except (ValueError, CompileError) as error:
        return Row(gpu, step, None, " ".join(str(error).split()))


def markdown(rows: Iterable[Row]) -> str:
    """The table, and below it why a step is XLA's somewhere, each sentence once.

    A cell has the registers of a thread; in brackets after them the bytes that one spills, if it
    does; and how many launches a step is, if it is not one. The last two rows have the bytes of
    shared memory that a program takes at most, and may take.
    """
    found = {(row.step, row.gpu): row for row in rows}
    gpus = list(dict.fromkeys(gpu for _, gpu in found))
    notes: dict[str, int] = {}
    names = [target(gpu).gpu.name.removeprefix("NVIDIA ") for gpu in gpus]
    lines = [_line([*Step._fields, *names]), _line(["---", "---", *["---:"] * (1 + len(gpus))])]
    for step in dict.fromkeys(step for step, _ in found):
        cells = (_cell(found.get((step, gpu)), notes) for gpu in gpus)
        lines.append(_line([*map(str, step), *cells]))
    taken = [_most_shared(found.values(), gpu) for gpu in gpus]
    lines.append(_line(["shared memory, bytes", "", "", *taken]))
    lines.append(_line(["of", "", "", *(f"{target(gpu).gpu.shared_memory:,}" for gpu in gpus)]))
    said = [f"{number}. {reason}" for reason, number in notes.items()]
    return "\n".join([*lines, *([""] if said else []), *said])


def _cell(row: Row | None, notes: dict[str, int]) -> str:
    """What became of a step on a GPU; a refusal gets a number, which stands in `notes`."""
    if row is None:
        return ""
    if row.refusal is not None:
        return f"XLA ({notes.setdefault(row.refusal, len(notes) + 1)})"
    assert row.report is not None
    cell = str(row.report.registers)
    if row.report.spill_bytes:
        cell += f" ({row.report.spill_bytes})"
    if row.report.kernels != 1:
        cell += f", {row.report.kernels} launches"
    return cell


def _most_shared(rows: Iterable[Row], gpu: str) -> str:
    taken = [row.report.shared_memory_bytes for row in rows if row.gpu == gpu and row.report]
    return f"{max(taken):,}" if taken else ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    asked = _parser().parse_args(arguments)
    gpus = asked.gpu or target_names()
    steps = [step for step in STEPS if asked.config is None or step.config in asked.config]
    pairs = [(gpu, step) for gpu in gpus for step in steps]
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
        description="Compiles decode steps of five presets for every GPU, and prints a table.",
    )
    parser.add_argument(
        "--gpu", choices=target_names(), action="append", help="may be repeated; default: all"
    )
    parser.add_argument(
        "--config",
        choices=sorted({step.config for step in STEPS}),
        action="append",
        help="may be repeated; default: all",
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
