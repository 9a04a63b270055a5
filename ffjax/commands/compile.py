"""Compiles a model's decode step for a GPU that need not be here: no command of `ffjax`, but

    python -m pallas_kernels.compile --config llama3.2-1b --gpu h200 --batch 1 --json
    python -m pallas_kernels.compile --config llama3.2-1b --weights int8 --json
    python -m pallas_kernels.compile --config llama3.2-1b --backend mosaic_gpu --json

The sizes are looked up here, since the kernels know no models; `pallas_kernels.compile` does the
rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys

from ffjax.commands.sizes import add_size_arguments, chosen_sizes
from ffjax.dims import step_dims
from pallas_kernels.backends import BACKENDS
from pallas_kernels.compile import CompileError, compile_for
from pallas_kernels.dims import Dims
from pallas_kernels.targets import target_names

__all__ = ["add_step_arguments", "command_line", "dims_of", "main"]


def dims_of(asked: argparse.Namespace) -> Dims:
    """The sizes of a step of a model, its matrices in the formats asked for.

    Raises:
        FileNotFoundError: there is no model at that path.
        ValueError: there is no such preset; what is at the path is damaged or not supported; its
            matrices cannot have that format, or the kernel computes no such model.
        NotImplementedError: a package that is needed is not installed.
    """
    config = chosen_sizes(asked, "compile")
    return step_dims(config, asked.batch, asked.capacity, asked.tokens)


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `dims_of` reads: the model's sizes, --batch, --tokens and --capacity."""
    add_size_arguments(parser)
    parser.add_argument("--batch", type=int, default=1, help="sequences (default 1)")
    parser.add_argument("--tokens", type=int, default=1, help="of each sequence (default 1)")
    parser.add_argument("--capacity", type=int, default=16_384, help="cache slots (default 16384)")


def command_line() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.compile",
        description="Compiles the fused decode step for a GPU that need not be here.",
    )
    add_step_arguments(parser)
    parser.add_argument("--gpu", default="h200", help=f"one of {', '.join(target_names())}")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="of Pallas, which compiles the kernel; default: triton where JAX has it",
    )
    parser.add_argument(
        "--hidden-layers",
        type=int,
        nargs="+",
        default=[],
        metavar="LAYER",
        help="layers whose hidden states the step returns (0: the embedding); default: none",
    )
    parser.add_argument("--num-warps", type=int, help="overrides the plan's")
    parser.add_argument("--num-stages", type=int, help="overrides the plan's")
    parser.add_argument(
        "--keep",
        type=pathlib.Path,
        metavar="FOLDER",
        help="leave step.ptx and step.cubin there; `nvdisasm -c step.cubin` shows the SASS",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    asked = command_line().parse_args(arguments)
    for name in ("batch", "tokens", "capacity"):
        if getattr(asked, name) < 1:
            command_line().error(f"--{name} is a positive number, got {getattr(asked, name)}.")
    try:
        report = compile_for(
            asked.gpu,
            dims_of(asked),
            num_warps=asked.num_warps,
            num_stages=asked.num_stages,
            backend=asked.backend,
            hidden_layers=asked.hidden_layers,
            keep=asked.keep,
        )
    except (ValueError, OSError, NotImplementedError, CompileError) as error:
        print(error, file=sys.stderr)
        return 1
    names = ["config", "model", "weights", "head", "batch", "tokens", "capacity"]
    names += [n for n in ("group_size", "scales", "offset") if getattr(asked, n) is not None]
    names += ["hidden_layers"] if asked.hidden_layers else []
    asked_for = {name: getattr(asked, name) for name in names}
    if asked.config is not None:  # a model that is not a preset may be quantized as it is stored
        asked_for["weights"] = asked.weights or "bfloat16"
    fields = asked_for | dataclasses.asdict(report)
    if asked.json:
        print(json.dumps(fields, indent=2))
    else:
        width = max(map(len, fields))
        for name, value in fields.items():
            print(f"{name:<{width}}  {value}")
    return 0
