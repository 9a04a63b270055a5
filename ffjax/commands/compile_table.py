"""What decode steps become on every GPU of `gpus/`, as a table in Markdown.

    python -m pallas_kernels.compile_table > table.md
    python -m pallas_kernels.compile_table --gpu h200 --config all --backend mosaic_gpu

A row is a step, a column a GPU, for which it is compiled as it would be there, with its tuning, or
a GPU and one of Pallas's backends. What cannot run there has its sentence below the table. On two
cores each of the two takes a quarter of an hour.
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
from ffjax.commands.formats import KINDS
from ffjax.config import PRESETS
from pallas_kernels import compile as compiler
from pallas_kernels.backends import BACKENDS, Backend
from pallas_kernels.compile import CompileError, CompileReport
from pallas_kernels.targets import target, target_names

__all__ = ["Row", "Step", "compile_row", "main", "markdown", "steps"]

# What is compiled unless other presets are asked for.
_CONFIGS = ("llama3.2-1b", "llama3.2-3b", "llama3.1-8b", "gemma3-1b", "qwen3-0.6b")
_ALL = "all"


class Step(NamedTuple):
    """A step of a preset's shapes.

    Attributes:
        config: the preset's name.
        weights: how the layers' matrices are stored.
        batch: sequences.
        head: how the head is stored; None: as the embedding is.
    """

    config: str
    weights: str
    batch: int
    head: str | None = None


def steps(configs: Iterable[str] = _CONFIGS, head: str | None = None) -> list[Step]:
    """The table's steps: each preset in bfloat16, int8 and int4, with 1 and with 8 sequences.

    Args:
        configs: names of presets.
        head: how the head is stored where the layers are integers; None: as the embedding is.
    """
    formats = ("bfloat16", None), ("int8", head), ("int4", head)
    return [
        Step(config, weights, batch, of_head)
        for config, (weights, of_head), batch in itertools.product(configs, formats, (1, 8))
    ]


class Row(NamedTuple):
    """What became of a step on a GPU.

    Attributes:
        gpu: name of the target.
        step: the step.
        report: what it became, or None.
        refusal: why it was not compiled, a sentence; or None.
        backend: that of Pallas which was asked for; None: none was.
    """

    gpu: str
    step: Step
    report: CompileReport | None
    refusal: str | None
    backend: Backend | None = None


def compile_row(
    gpu: str, step: Step, backend: Backend | None = None, capacity: int = 16_384
) -> Row:
    """Compiles a step as it would run there.

    Args:
        gpu: name of the target.
        step: the step.
        backend: that of Pallas which compiles it; None: see `backends.default_backend`.
        capacity: S, cache slots.

    Raises:
        CompileError: there is no compiler here.
    """
    if (reason := compiler.why_no_compiler()) is not None:
        raise CompileError(reason)
    options = {**step._asdict(), "capacity": capacity}
    given = {name: str(value) for name, value in options.items() if value is not None}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    report, refusal = None, None
    try:
        dims = dims_of(command_line().parse_args(words))
        report = compiler.compile_for(gpu, dims, tuned=True, backend=backend)
    except (ValueError, CompileError) as error:
        refusal = " ".join(str(error).split())
    return Row(gpu, step, report, refusal, backend)


def markdown(rows: Iterable[Row]) -> str:
    """The table, and below it why a step is XLA's somewhere, each sentence once.

    A cell has the registers of a thread; in brackets after them the bytes that one spills, if it
    does; and how many launches a step is, if it is not one. The last rows say how many steps of a
    column spill, of those that were compiled; and the bytes of shared memory that a program takes
    at most, and may take.
    """
    found = {(row.step, row.gpu, row.backend): row for row in rows}
    keys: list[tuple[str, Backend | None]] = [(row.gpu, row.backend) for row in found.values()]
    columns = list(dict.fromkeys(keys))
    notes: dict[str, int] = {}
    names = [_name(gpu, backend) for gpu, backend in columns]
    lines = [
        _line(["config", "weights", "batch", *names]),
        _line(["---", "---", *["---:"] * (1 + len(columns))]),
    ]
    for step in dict.fromkeys(step for step, _, _ in found):
        cells = (_cell(found.get((step, *column)), notes) for column in columns)
        weights = step.weights if step.head is None else f"{step.weights}, {step.head} head"
        lines.append(_line([step.config, weights, str(step.batch), *cells]))
    compiled = [
        [row.report for row in found.values() if (row.gpu, row.backend) == column and row.report]
        for column in columns
    ]
    spilling = (f"{sum(x.spill_bytes > 0 for x in of)} of {len(of)}" for of in compiled)
    taken = (f"{max(x.shared_memory_bytes for x in of):,}" if of else "" for of in compiled)
    there = (f"{target(gpu).gpu.shared_memory:,}" for gpu, _ in columns)
    lines.append(_line(["steps that spill", "", "", *spilling]))
    lines.append(_line(["shared memory, bytes", "", "", *taken]))
    lines.append(_line(["of", "", "", *there]))
    said = [f"{number}. {reason}" for reason, number in notes.items()]
    return "\n".join([*lines, *([""] if said else []), *said])


def _name(gpu: str, backend: Backend | None) -> str:
    """What stands above a column."""
    name = target(gpu).gpu.name.removeprefix("NVIDIA ")
    return name if backend is None else f"{name}, {backend}"


def _cell(row: Row | None, notes: dict[str, int]) -> str:
    """What became of a step on a GPU; a refusal gets a number, which stands in `notes`."""
    if row is None:
        return ""
    if row.refusal is not None:
        instead = "XLA" if row.backend is None else "no"
        return f"{instead} ({notes.setdefault(row.refusal, len(notes) + 1)})"
    assert row.report is not None
    cell = str(row.report.registers)
    if row.report.spill_bytes:
        cell += f" ({row.report.spill_bytes})"
    if row.report.kernels != 1:
        cell += f", {row.report.kernels} launches"
    return cell


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    asked = _parser().parse_args(arguments)
    configs = asked.config or _CONFIGS
    if _ALL in configs:
        configs = tuple(PRESETS)
    wanted = itertools.product(
        asked.gpu or target_names(), steps(configs, asked.head), asked.backend or [None]
    )
    try:
        with ThreadPoolExecutor(asked.jobs) as pool:  # each compiles in a process of its own
            rows = list(pool.map(lambda each: compile_row(*each), wanted))
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    print(markdown(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.compile_table",
        description="Compiles decode steps of presets for every GPU, and prints a table.",
    )
    parser.add_argument(
        "--gpu", choices=target_names(), action="append", help="may be repeated; default: all"
    )
    parser.add_argument(
        "--config",
        choices=(*PRESETS, _ALL),
        metavar="PRESET",
        action="append",
        help=f"{_ALL}, or one of {', '.join(PRESETS)}; may be repeated; default: "
        f"{', '.join(_CONFIGS)}",
    )
    parser.add_argument(
        "--head",
        choices=KINDS,
        help="format of the head where the layers' matrices are integers; default: bfloat16",
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        action="append",
        help="of Pallas, which compiles the kernel; may be repeated, a column each; default: "
        "triton where JAX has it",
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
