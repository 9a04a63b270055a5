"""Where the fused kernel leaves the specification, with random weights of a model's sizes.

No command of `ffjax`, but

    python -m pallas_kernels.spec --config llama3.2-1b --batch 1 --position 5000
    python -m pallas_kernels.spec --config llama3.2-1b --batch 2 --tokens 4 --weights int8 --layer 3

On a GPU it runs the kernel compiled; elsewhere its body, interpreted, which takes minutes for all
but the smallest models. It prints one paragraph. Exit code 0: no difference but rounding; 1: there
is one; 2: it cannot run.
"""

from __future__ import annotations

import argparse
import sys

import jax

from ffjax.commands.compile import add_step_arguments, dims_of
from pallas_kernels.backends import BACKENDS
from pallas_kernels.gpu import INTERPRETER, Gpu
from pallas_kernels.spec.bisecting import bisect, compare_layer
from pallas_kernels.spec.made import random_state, random_tokens, random_weights
from pallas_kernels.spec.running import compiled, interpreted
from pallas_kernels.stream.planner import make_stream_plan, tuned, why_not_on

__all__ = ["command_line", "main"]


def command_line() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.spec",
        description="Compares each buffer of a fused decode step with the specification.",
    )
    add_step_arguments(parser)
    parser.add_argument(
        "--position",
        type=_positions,
        default=[96],
        metavar="N[,N...]",
        help="cached positions of each sequence, or of all of them (default 96)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--layer", type=int, help="compare this layer alone, from 0 on")
    which.add_argument(
        "--every-layer",
        action="store_true",
        help="look into every layer, and not only where the residual after one differs",
    )
    parser.add_argument("--backend", choices=BACKENDS, help="of Pallas, which compiles the kernel")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    return parser


def _positions(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = command_line()
    asked = parser.parse_args(arguments)
    lengths = asked.position * (asked.batch if len(asked.position) == 1 else 1)
    if len(lengths) != asked.batch or min(lengths) < 0:
        parser.error(
            f"--position takes one number, or one for each of {asked.batch} sequences, none below "
            f"0; got {','.join(map(str, asked.position))}."
        )
    try:
        dims = dims_of(asked)
        gpu = Gpu.of(jax.devices()[0]) or INTERPRETER
        tuning = tuned(dims, gpu)
        if (reason := why_not_on(gpu, dims, tuning)) is not None:
            raise NotImplementedError(reason)
    except (ValueError, OSError, NotImplementedError) as error:
        print(error, file=sys.stderr)
        return 2
    plan = make_stream_plan(dims, gpu, tuning)
    if asked.backend is not None:
        plan = plan.compiled_by(asked.backend)
    if asked.layer is not None and not 0 <= asked.layer < dims.num_layers:
        parser.error(f"--layer is one of 0 to {dims.num_layers - 1}, got {asked.layer}.")
    run = interpreted if gpu == INTERPRETER else compiled
    how = "interpreted on a CPU" if gpu == INTERPRETER else f"on {gpu.name}, {plan.backend}"
    print(f"{dims.num_layers} layers, {asked.batch} sequences, {dims.tokens} tokens each, {how}.")
    step = random_weights(dims, asked.seed), random_state(dims, lengths), random_tokens(dims)
    if asked.layer is None:
        found = bisect(plan, *step, run, every_layer=asked.every_layer)
    else:
        found = compare_layer(plan, *step, run, asked.layer)
    print(found or "Every buffer is what the specification says, but for rounding.")
    return 0 if found is None else 1
